"""The words of the service: names, ids and the two tables of moves."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow.records import (
    ACQUISITION_MOVES,
    ACTIVE_JOB_STATES,
    JOB_MOVES,
    AcquisitionState,
    JobState,
    acquisition_id,
    job_name,
)
from mpi_kernels.contract import ACQUISITION_ID, JOB_NAME


@given(share=st.text(max_size=20), relpath=st.binary(max_size=60), generation=st.integers(0, 10**6))
def test_ids_are_names_of_folders_and_always_the_same(share, relpath, generation):
    key = acquisition_id(share, relpath, generation)
    assert ACQUISITION_ID.fullmatch(key)
    assert key == acquisition_id(share, relpath, generation)


def test_ids_tell_shares_paths_and_generations_apart():
    keys = [acquisition_id(s, r, g) for s, r, g in itertools.product(("a", "b"), (b"x", b"x\xff"), (0, 1, 10))]
    assert len(set(keys)) == len(keys)


def test_an_id_is_the_same_in_every_release():
    """Rebuilt journals and old run folders must agree."""
    assert acquisition_id("scope1", b"d/scan.h5", 0) == "4dd9ba858dd22122"


@pytest.mark.parametrize("attempt", [0, 1, 99])
def test_job_names(attempt):
    found = JOB_NAME.fullmatch(job_name("0123456789abcdef", attempt))
    assert (found["acquisition"], int(found["attempt"])) == ("0123456789abcdef", attempt)


@pytest.mark.parametrize(("key", "attempt"), [("0123456789abcdef", 100), ("0123456789abcdef", -1), ("x", 1), ("", 1)])
def test_what_is_no_job_name(key, attempt):
    with pytest.raises(ValueError, match="no job name"):
        job_name(key, attempt)


def test_every_state_has_its_moves_and_nothing_moves_to_itself():
    assert set(ACQUISITION_MOVES) == set(AcquisitionState)
    assert set(JOB_MOVES) == set(JobState)
    for moves in (ACQUISITION_MOVES, JOB_MOVES):
        assert all(start not in ends for start, ends in moves.items())


def _reach(moves, start):
    seen, ends = set(), {start}
    while ends - seen:
        seen |= ends
        ends = set().union(*(moves[state] for state in seen))
    return seen


def test_every_state_can_be_reached_and_only_the_right_ones_are_ends():
    assert _reach(ACQUISITION_MOVES, AcquisitionState.GROWING) == set(AcquisitionState)
    assert _reach(JOB_MOVES, JobState.PLANNED) == set(JobState)
    assert {s for s, ends in ACQUISITION_MOVES.items() if not ends} == {AcquisitionState.SUPERSEDED}
    assert {s for s, ends in JOB_MOVES.items() if not ends} == {JobState.REDUCED, JobState.FAILED}
    assert {s for s, ends in JOB_MOVES.items() if ends} == ACTIVE_JOB_STATES
