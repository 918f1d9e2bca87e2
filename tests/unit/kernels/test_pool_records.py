"""The files of a pool: names that can't be, folders that are somewhere else, and when its time is up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mpi_kernels import jsonfile
from mpi_kernels.errors import FormatError
from mpi_kernels.pool.errors import PoolRefused
from mpi_kernels.pool.records import Endpoint, PoolSpec, Task, read_spec, run_folder
from mpi_kernels.pool.server import stops_ns

NAME = "20261128T120000-01"
TASK = Task(job=f"{'a' * 16}-01", folder=f"2026-11-28/{'a' * 16}/01")


def spec(**facts: Any) -> PoolSpec:
    return PoolSpec(**{"name": NAME, "runs": "/runs", "ranks": 2, "secret": "/secret"} | facts)


def test_a_run_folder_is_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "real" / TASK.folder).mkdir(parents=True)
    assert run_folder(tmp_path / "real", TASK) == tmp_path / "real" / TASK.folder
    (tmp_path / "runs").symlink_to(tmp_path / "real")  # the administrator's own link is no trick
    assert run_folder(tmp_path / "runs", TASK) == tmp_path / "runs" / TASK.folder


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_on_the_way_is_refused(tmp_path: Path, depth: int) -> None:
    (tmp_path / "elsewhere").mkdir()
    parts = TASK.folder.split("/")
    link = tmp_path.joinpath("runs", *parts[:depth])
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    tmp_path.joinpath("elsewhere", *parts[depth:]).mkdir(parents=True, exist_ok=True)
    with pytest.raises(PoolRefused, match="a link"):
        run_folder(tmp_path / "runs", TASK)


@pytest.mark.parametrize(
    "facts", [{"name": "20261128T120000-02"}, {"runs": "runs"}, {"ranks": 0}, {"nap_ms": -1.0}, {"nap_ms": 1e9}]
)
def test_a_pool_that_can_not_be(tmp_path: Path, facts: dict[str, Any]) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    jsonfile.publish(folder / "pool.json", jsonfile.encode(spec(**facts)))
    with pytest.raises(PoolRefused):
        read_spec(folder)
    jsonfile.publish(folder / "pool.json", jsonfile.encode(spec()))
    assert read_spec(folder) == spec()
    (folder / "pool.json").write_text('{"name": 1}')
    with pytest.raises(FormatError):
        read_spec(folder)


def test_when_its_time_is_up() -> None:
    before = Endpoint(
        host="h", addresses=(), port=0, pid=1, scheduler_id="", ranks=2, nodes=(), wall_ns=1, stops_ns=7, life=1
    )
    with_end, began = spec(walltime_s=100.0), {"EMFLOW_POOL_BEGAN": "1000"}
    assert stops_ns(with_end, before, {"SLURM_JOB_END_TIME": "5"}) == 5_000_000_000
    assert stops_ns(with_end, before, began) == 7
    assert stops_ns(with_end, None, began) == 1_100_000_000_000
    assert abs(stops_ns(with_end, None, {}) - time.time_ns() - 100e9) < 10e9
    assert stops_ns(spec(), None, began) == 0
