"""From events to rows and bars: in order, also when a step was taken twice or heard of late."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from emflow.journal import Journal
from emflow.records import Acquisition, AcquisitionState, Fingerprint, Job, JobState, job_name
from emflow.timeline import KERNEL_BARS, SERVICE_BARS, STEPS, row_of, step_times, waterfall
from mpi_kernels.contract import Event

KEY = "0123456789abcdef"
numbers = itertools.count()


def event(name: str, second: float, *, subject: str = KEY, plane: str = "management") -> Event:
    ns = round(second * 1e9)
    return Event(
        trace=KEY,
        subject=subject,
        plane=plane,
        host="h",
        pid=1,
        seq=next(numbers),
        name=name,
        wall_ns=ns,
        mono_ns=ns,
    )


def way(*names: str, start: float = 0.0) -> list[Event]:
    return [event(name, start + n) for n, name in enumerate(names)]


def kernels(attempt: int, *seconds: float) -> list[Event]:
    subject = job_name(KEY, attempt)
    names = ("claimed", "started", "reduced", "written")
    return [event(n, s, subject=subject, plane="data") for n, s in zip(names, seconds, strict=False)]


def test_each_step_has_the_time_of_its_event() -> None:
    assert step_times(way(*STEPS)) == {name: n * 10**9 for n, name in enumerate(STEPS)}


def test_what_is_no_step_is_left_out() -> None:
    events = [*way("noticed", "stalled", "planned"), event("reduced", 9, plane="data"), event("submitting", 10)]
    assert step_times(events) == {"noticed": 0}


def test_a_step_that_is_taken_again_begins_the_way_anew() -> None:
    events = [
        *way("noticed", "ready", "staged", "submitted", "running", "failed"),
        *way("submitted", "reduced", start=9),
    ]
    assert step_times(events) == {
        "noticed": 0,
        "ready": 10**9,
        "staged": 2 * 10**9,
        "submitted": 9 * 10**9,
        "reduced": 10 * 10**9,
    }
    retried = [*way(*STEPS), event("staged", 20)]
    assert list(step_times(retried)) == ["noticed", "ready", "staged"]


def test_no_events_no_bars() -> None:
    assert waterfall([]) == []
    assert waterfall(way("noticed")) == []
    assert waterfall(kernels(1, 1, 2)) == []


def test_bars_of_the_service_follow_each_other_without_a_gap() -> None:
    bars = waterfall(way(*STEPS))
    assert [bar.name for bar in bars] == [SERVICE_BARS[name] for name in STEPS[1:]]
    assert [(bar.start_s, bar.stop_s) for bar in bars] == [(n, n + 1) for n in range(6)]
    assert not any(bar.inside_job for bar in bars)


def test_bars_of_the_kernels_lie_inside_the_job() -> None:
    events = [*way(*STEPS), *kernels(1, 4.25, 4.5, 4.75, 4.875)]
    inside = [bar for bar in waterfall(events) if bar.inside_job]
    assert [bar.name for bar in inside] == [KERNEL_BARS[n] for n in ("claimed", "started", "reduced", "written")]
    assert [(bar.start_s, bar.stop_s) for bar in inside] == [(4, 4.25), (4.25, 4.5), (4.5, 4.75), (4.75, 4.875)]


def test_a_job_that_told_of_itself_before_the_service_heard_that_it_runs() -> None:
    events = [*way("noticed", "ready", "staged", "submitted"), event("running", 3.5), *kernels(1, 3.2, 3.3, 3.9)]
    inside = [bar for bar in waterfall(events) if bar.inside_job]
    assert [(bar.start_s, bar.stop_s) for bar in inside] == [(3, 3.2), (3.2, 3.3), (3.3, 3.9)]


def test_only_the_last_attempt_is_drawn() -> None:
    first = [*way("noticed", "ready", "staged", "submitted", "running"), *kernels(1, 4.1, 4.2)]
    events = [*first, event("submitted", 8), *kernels(2, 8.5, 8.6, 8.7, 8.8), event("reduced", 9), event("done", 10)]
    bars = waterfall(events)
    inside = [bar for bar in bars if bar.inside_job]
    assert [bar.start_s for bar in inside] == [8, 8.5, 8.6, 8.7]
    assert min(bar.stop_s - bar.start_s for bar in bars) >= 0


@given(
    st.lists(st.sampled_from([*STEPS, "failed", "stalled", "growing"]), max_size=30),
    st.lists(st.integers(0, 50), max_size=4),
)
def test_no_bar_ends_before_it_begins(names: list[str], seconds: list[int]) -> None:
    events = [event("noticed", 0), *way(*names, start=1), *kernels(1, *sorted(seconds))]
    for bar in waterfall(events):
        assert bar.stop_s >= bar.start_s
    times = list(step_times(events).values())
    assert times == sorted(times)


def test_a_row_has_the_newest_job_and_seconds_since_the_first_sight(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        acquisition = Acquisition(
            id=KEY,
            share="scope",
            relpath=b"a/\xff\n.npy",
            generation=0,
            state=AcquisitionState.STAGED,
            day="2026-01-01",
            trace=KEY,
            seen_ns=10**18,
            changed_ns=0,
            fingerprint=Fingerprint(size=1, mtime_ns=1, ctime_ns=1),
            format="npy",
            kind="4d",
            frames=7,
            digest="d",
        )
        journal.add_acquisition(acquisition)
        bare = row_of(journal, acquisition)
        assert (bare.job, bare.job_state, list(bare.seconds)) == ("", "", ["noticed"])
        for attempt in (1, 2):
            name = job_name(KEY, attempt)
            journal.add_job(
                Job(name=name, acquisition=KEY, attempt=attempt, state=JobState.PLANNED, recipe="r", scheduler="null")
            )
            if attempt == 1:
                journal.move_job(name, JobState.PLANNED, JobState.FAILED)
        row = row_of(journal, acquisition)
        assert (row.job, row.job_state) == (f"{KEY}-02", "PLANNED")
        assert row.path == "a/\\xff\n.npy"
        (noticed,) = [e.wall_ns for _, e in journal.events(names={"noticed"})]
        assert row.seconds == {"noticed": (noticed - 10**18) / 1e9}


def test_a_row_never_mixes_two_attempts() -> None:
    retried = [*way(*STEPS), event("growing", 20)]
    assert list(step_times(retried)) == ["noticed"]
    assert step_times([*retried, *way("ready", "staged", start=21)])["staged"] == 22 * 10**9
    failed = [*way("noticed", "ready", "staged", "planned", "submitted", "running", "failed"), event("planned", 20)]
    assert list(step_times(failed)) == ["noticed", "ready", "staged"]
