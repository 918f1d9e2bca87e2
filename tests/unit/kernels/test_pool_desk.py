"""What lies in a pool's spool, and what its clients are told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpi_kernels import jsonfile
from mpi_kernels.pool import wire
from mpi_kernels.pool.desk import Desk
from mpi_kernels.pool.records import PoolSpec, Task

ONE, TWO = (Task(job=f"{c * 16}-01", folder=f"2026-11-28/{c * 16}/01") for c in "ab")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Of a pool whose run folders are there."""
    for task in (ONE, TWO):
        (tmp_path / "runs" / task.folder).mkdir(parents=True)
    spec = PoolSpec(name="20261128T120000-01", runs=str(tmp_path / "runs"), ranks=2, secret="/secret")
    return Desk(tmp_path, spec, 1, lambda _: None)


def test_a_file_that_can_not_be_read_keeps_no_other_from_being_taken(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "spool" / f"{ONE.job}.json").mkdir()
    jsonfile.publish(tmp_path / "spool" / f"{TWO.job}.json", jsonfile.encode(TWO))
    assert desk.look()
    assert [p.name for p in (tmp_path / "taken").iterdir()] == [f"{TWO.job}.json"]
    assert desk.next(0.0) == TWO
    assert desk.next(0.0) is None
    assert desk.look()
    assert not desk.look()  # what stays there keeps no idle pool busy


def test_a_file_that_names_another_job_is_refused_and_gone(desk: Desk, tmp_path: Path) -> None:
    pushed: list[dict[str, Any]] = []
    desk.push = pushed.append
    jsonfile.publish(tmp_path / "spool" / f"{ONE.job}.json", jsonfile.encode(TWO))
    desk.look()
    assert "refused" in pushed[0]["ended"]
    assert not any([*(tmp_path / "spool").iterdir(), *(tmp_path / "taken").iterdir()])


@pytest.mark.parametrize("character", ["a", "\\", "\N{GRINNING FACE}"])
def test_whatever_went_wrong_fits_in_a_line(desk: Desk, character: str) -> None:
    pushed: list[dict[str, Any]] = []
    desk.push = pushed.append
    desk.take(ONE)
    desk.next(0.0)
    desk.finished(ONE, ZeroDivisionError(character * 5000), Path("/nowhere"), 1 << 60)
    wire.Session(b"s", "pool", b"name", b"1", b"2").seal(pushed[0])
