"""Which environment means a launcher, how many ranks it promises, and one process without any."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_kernels.errors import LaunchError
from mpi_kernels.ranks import Ranks, asked, check_size, launched, world


@pytest.mark.parametrize(
    ("environment", "is_launched"),
    [
        ({}, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, True),
        ({"PMIX_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # the batch script itself, or a service inside salloc
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "many"}, False),
    ],
)
def test_launchers_are_known_by_their_marks(environment: dict[str, str], is_launched: bool) -> None:
    assert launched(environment) is is_launched


def test_what_was_asked_for() -> None:
    assert asked({"EMFLOW_RANKS": "3", "SLURM_NTASKS": "8"}) == {"EMFLOW_RANKS": 3}
    assert asked({"SLURM_STEP_ID": "1", "SLURM_NTASKS": "8"}) == {"SLURM_NTASKS": 8}
    assert asked({"SLURM_STEP_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}) == {
        "SLURM_STEP_NUM_TASKS": 2
    }
    assert asked({"EMFLOW_RANKS": "x"}) == {}


def test_a_world_of_the_wrong_size_says_what_to_do() -> None:
    with pytest.raises(LaunchError, match=r"EMFLOW_RANKS asks for 4 ranks.*has 1.*mpiexec -n 4.*--mpi"):
        world({"EMFLOW_RANKS": "4"})
    check_size(Ranks(), 1, "job.json")


def test_one_process_is_a_world_of_its_own() -> None:
    ranks = world({})
    array = np.array([[1, 2]], np.int16)
    assert (ranks.rank, ranks.size, ranks.share(7, 3)) == (0, 1, (0, 7))
    assert ranks.broadcast(b"x") == b"x"
    assert ranks.reduce(array, "sum") is array
    assert ranks.gather_rows(array) is array
    assert ranks.gather_json({"a": 1}) == [{"a": 1}]
    ranks.abort(3)  # there is nobody else to end
