"""A rank that fails ends all ranks within two seconds, says why once, and leaves no result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpi_kernels.events import read_events

pytestmark = pytest.mark.needs_mpi
LIMIT_S = 2.0


def job(kernels: SimpleNamespace, tmp_path: Path, *, ranks: int, name: str = "run", **fault: object) -> Path:
    source = tmp_path / f"{name}.faulty"
    source.write_text(json.dumps({"frames": 30, "at": -1, "how": "none"} | fault))
    return kernels.folder(tmp_path / name, source, "faulty:Faulty", ranks=ranks, block_bytes=64)


def start_up_s(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, ranks: int) -> float:
    """What the same job takes where nothing fails: the two seconds count from the fault, not from the start."""
    folder = job(kernels, tmp_path, ranks=ranks, name="sound")
    before = time.monotonic()
    assert kernels.launch(mpiexec, ranks, "-m", "mpi_kernels", folder).returncode == 0
    return time.monotonic() - before


@pytest.mark.parametrize("at", [0, 15, 29], ids=["rank0", "rank1", "rank2"])
@pytest.mark.parametrize("how", ["raise", "bug", "kill", "sys.exit"])
def test_one_rank_fails(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, at: int, how: str) -> None:
    usual = start_up_s(kernels, mpiexec, tmp_path, 3)
    folder = job(kernels, tmp_path, ranks=3, at=at, how=how)
    before = time.monotonic()
    done = kernels.launch(mpiexec, 3, "-m", "mpi_kernels", folder)
    assert time.monotonic() - before < usual + LIMIT_S
    assert done.returncode != 0
    assert not (folder / "result.json").exists()
    assert not (folder / "result.h5").exists()
    if how == "kill":
        assert not (folder / "error.json").exists()  # nobody was left to write it: the scheduler's word has to do
        return
    error = json.loads((folder / "error.json").read_text())
    assert error["rank"] == at // 10
    assert error["code"] == ("missing-data" if how == "raise" else "unexpected")
    assert (error["frame"], error["path"]) == ((at, str(tmp_path / "run.faulty")) if how == "raise" else (None, None))
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpi_kernels:")]
    # error.json is the record; of what a rank writes last a busy launcher may pass nothing on
    assert len(lines) <= 1
    assert all(f"rank {at // 10}" in line for line in lines)


def test_a_rank_that_exits_0_in_the_middle_is_no_success(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path
) -> None:
    folder = job(kernels, tmp_path, ranks=2, at=20, how="exit")
    command = [mpiexec, "-n", "2", sys.executable, "-m", "mpi_kernels", str(folder)]
    process = subprocess.Popen(command, env=kernels.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(10)
    assert not (folder / "result.json").exists()


def test_a_world_of_the_wrong_size_claims_nothing(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    folder = job(kernels, tmp_path, ranks=3)
    done = kernels.launch(mpiexec, 2, "-m", "mpi_kernels", folder)
    assert done.returncode != 0
    assert not (folder / "claim").exists()
    error = json.loads((folder / "error.json").read_text())  # an mpiexec that is aborted may lose what was said last
    assert error["code"] == "launch"
    assert "job.json asks for 3 ranks, but this MPI world has 2" in error["message"]


@pytest.mark.parametrize(
    "env",
    [{"EMFLOW_RANKS": "2"}, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}],
    ids=["job script", "srun with the wrong PMI"],
)
def test_singletons_are_told_apart_from_a_world(kernels: SimpleNamespace, tmp_path: Path, env: dict[str, str]) -> None:
    folder = job(kernels, tmp_path, ranks=1)
    done = kernels.launch(None, 1, "-m", "mpi_kernels", folder, env=env)
    assert done.returncode == 1
    assert "asks for 2 ranks, but this MPI world has 1" in done.stderr
    assert not (folder / "claim").exists()
    assert not (folder / "result.json").exists()


def test_a_claimed_folder_is_left_alone(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    folder = job(kernels, tmp_path, ranks=2)
    assert kernels.launch(mpiexec, 2, "-m", "mpi_kernels", folder).returncode == 0
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    assert kernels.launch(mpiexec, 2, "-m", "mpi_kernels", folder).returncode == 0
    assert (
        kernels.launch(mpiexec, 1, "-m", "mpi_kernels", folder).returncode != 0
    )  # the wrong size, told on stderr only
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


def test_two_starts_at_once_give_one_result(kernels: SimpleNamespace, tmp_path: Path) -> None:
    folder = job(kernels, tmp_path, ranks=1, how="slow")
    command = [sys.executable, "-m", "mpi_kernels", str(folder)]
    processes = [subprocess.Popen(command, env=kernels.environment()) for _ in range(3)]
    assert [p.wait(30) for p in processes] == [0, 0, 0]
    events = [e for path in folder.glob("events-*.jsonl") for e in read_events(path)]
    assert [e.name for e in events if e.name in ("claimed", "written")] == ["claimed", "written"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_a_reason(kernels: SimpleNamespace, tmp_path: Path, number: int, code: int) -> None:
    folder = job(kernels, tmp_path, ranks=1, how="slow", frames=1000)
    command = [sys.executable, "-m", "mpi_kernels", str(folder)]
    process = subprocess.Popen(command, env=kernels.environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 20
    while not (folder / "heartbeat").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, text = process.communicate(timeout=10)
    assert process.returncode == code
    assert "stopped by" in text
    error = json.loads((folder / "error.json").read_text())
    assert (error["code"], error["retryable"]) == ("stopped", True)


def test_sigterm_to_mpiexec_ends_every_rank(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    folder = job(kernels, tmp_path, ranks=2, how="slow", frames=1000)
    command = [mpiexec, "-n", "2", sys.executable, "-m", "mpi_kernels", str(folder)]
    process = subprocess.Popen(command, env=kernels.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while not (folder / "heartbeat").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.terminate()
    before = time.monotonic()
    assert process.wait(10) != 0
    assert time.monotonic() - before < LIMIT_S
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["no-such-folder"], ["--frobnicate"]])
def test_wrong_usage(kernels: SimpleNamespace, tmp_path: Path, arguments: list[str]) -> None:
    done = kernels.launch(None, 1, "-m", "mpi_kernels", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: python -m mpi_kernels RUN_FOLDER" in done.stderr
    assert list(tmp_path.iterdir()) == []
