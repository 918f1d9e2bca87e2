"""Preflight and stop under a real Slurm of two virtual nodes: the wrong PMI, a node unlike the others, USR1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

import mpi_kernels
from mpi_kernels.events import read_events

if TYPE_CHECKING:
    from benchmarks.cluster import Cluster

pytestmark = [pytest.mark.needs_mpi, pytest.mark.needs_slurm]

NPY = "mpi_kernels.formats.npy:Npy"
ON_N2 = '#!/bin/bash\nif [ "$SLURMD_NODENAME" = n2 ]; then\n  {then}\nfi\nexec "$@"\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "scan.npy", np.random.default_rng(5).poisson(4, (6, 7, 24, 20)).astype("<u2"))
    return tmp_path / "scan.npy"


def srun(slurm: Cluster, kernels: SimpleNamespace, folder: Path, *prefix: str, mpi: str = "pmi2") -> Any:
    """Start a job on both nodes, as the job script does."""
    options = ["-n", "2", "-N", "2", "--time=5", f"--mpi={mpi}", "--kill-on-bad-exit=1", "--wait=5"]
    program = [*prefix, sys.executable, "-m", "mpi4py", "-m", "mpi_kernels", str(folder)]
    env = kernels.environment(**slurm.environment)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["srun", *options, *program], env=env, cwd=folder.parent, **pipes)


def script(path: Path, then: str) -> str:
    path.write_text(ON_N2.format(then=then))
    path.chmod(0o755)
    return str(path)


def error_of(folder: Path) -> dict[str, Any]:
    assert not (folder / "result.json").exists()
    found: dict[str, Any] = json.loads((folder / "error.json").read_text())
    return found


def test_both_nodes_are_looked_at(slurm: Cluster, kernels: SimpleNamespace, tmp_path: Path, source: Path) -> None:
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=2)
    out, _ = (started := srun(slurm, kernels, folder)).communicate(timeout=50)
    assert started.returncode == 0, out
    (attrs,) = (e.attrs for p in folder.glob("events-*") for e in read_events(p) if e.name == "preflight")
    assert attrs["checked"] == ["ranks", "folder", "clock", "space", "golden"]
    assert attrs["warnings"] == []


def test_the_wrong_pmi_is_named(slurm: Cluster, kernels: SimpleNamespace, tmp_path: Path, source: Path) -> None:
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=2)
    out, _ = (started := srun(slurm, kernels, folder, mpi="none")).communicate(timeout=50)
    assert started.returncode != 0, out
    error = error_of(folder)
    assert error["code"] == "launch"
    assert "asks for 2 ranks, but this MPI world has 1" in error["message"]
    assert "correct srun's --mpi" in error["next_step"]
    assert not (folder / "claim").exists()


@pytest.mark.needs_root
def test_a_node_that_mounts_something_else_is_named(
    slurm: Cluster, kernels: SimpleNamespace, tmp_path: Path, source: Path
) -> None:
    folder = kernels.folder(tmp_path / "runs" / "run", source, NPY, ranks=2)
    hidden = f'exec unshare -m bash -c \'mount -t tmpfs none {folder.parent} && exec "$@"\' - "$@"'
    started = srun(slurm, kernels, folder, script(tmp_path / "start.sh", hidden))
    out, _ = started.communicate(timeout=50)
    assert started.returncode != 0
    error = error_of(folder)
    assert error["code"] == "preflight", out
    assert error["message"].startswith("rank 1 on node n2 does not see the run folder")


def test_a_node_that_computes_wrong_is_named(
    slurm: Cluster, kernels: SimpleNamespace, tmp_path: Path, source: Path
) -> None:
    package = tmp_path / "altered" / "mpi_kernels"
    shutil.copytree(Path(mpi_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for module, old in (("compiled.py", "        self.native.flush()\n"), ("fused.py", "        return over_frames(")):
        text = (package / module).read_text(encoding="utf-8")
        assert text.count(old) == 1
        wrong = "        if self._max is not None:\n            self._max += 1\n"
        (package / module).write_text(text.replace(old, wrong + old), encoding="utf-8")
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=2)
    other = script(tmp_path / "start.sh", f"export PYTHONSAFEPATH=1 PYTHONPATH={package.parent}")
    out, _ = (started := srun(slurm, kernels, folder, other)).communicate(timeout=50)
    assert started.returncode != 0
    error = error_of(folder)
    assert (error["code"], error["retryable"]) == ("golden", False), out
    assert error["message"].startswith("node n2 computes known frames wrong (kernel ")
    assert "keep jobs off this node" in error["next_step"]


def test_usr1_to_the_step_leaves_a_partial_result(slurm: Cluster, kernels: SimpleNamespace, tmp_path: Path) -> None:
    """What ``--signal=USR1@60`` does: Slurm sends it to every rank of the step."""
    base = np.random.default_rng(3).poisson(5, (16, 128, 128)).astype("<u2")
    np.save(tmp_path / "base.npy", base)
    long = tmp_path / "long.cycling"
    long.write_text(json.dumps({"frames": 2_000_000, "of": str(tmp_path / "base.npy")}))
    folder = kernels.folder(tmp_path / "run", long, "cycling:Cycling", ranks=2, reductions=kernels.standard[:4])
    started = srun(slurm, kernels, folder)
    try:
        until = time.monotonic() + 30
        while not (folder / "heartbeat").exists() or not json.loads((folder / "heartbeat").read_text())["frames"]:
            assert started.poll() is None, started.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.02)
        slurm.run("scancel", "--signal=USR1", json.loads((folder / "claim").read_text())["scheduler_id"])
        started.communicate(timeout=50)
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(20)
    done = json.loads((folder / "partial-1.json").read_text())["frames"]
    error = error_of(folder)
    assert error["code"] == "time-limit"
    assert f"ended after {done} of 2000000 frames, which partial-1 holds" in error["message"]
    times = done // 16 + (np.arange(16) < done % 16)
    with h5py.File(folder / "partial-1.h5") as file:
        summed = np.tensordot(times.astype(np.uint64), base.astype(np.uint64), 1)
        np.testing.assert_array_equal(file["/pattern/sum/data"][()], summed)
