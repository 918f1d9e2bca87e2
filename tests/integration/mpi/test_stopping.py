"""A job that is asked to stop publishes what it has, to the bit; and slices change nothing of a whole result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from mpi_kernels.contract import Method, ReductionSpec
from mpi_kernels.events import read_events

pytestmark = pytest.mark.needs_mpi

DISTINCT, DET = 16, (128, 128)
LONG = 2_000_000
"""Frames of 32 KiB: 64 GB, which no processor of today reduces before a test has asked for a stop."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("cycling") / "base.npy"
    frames = np.random.default_rng(3).poisson(5, (DISTINCT, *DET)).astype("<u2")
    np.save(path, frames)
    return path, frames


def job(kernels: SimpleNamespace, path: Path, base: Path, frames: int, **facts: Any) -> Path:
    source = path.with_suffix(".cycling")
    source.write_text(json.dumps({"frames": frames, "of": str(base)}))
    return kernels.folder(path, source, "cycling:Cycling", **{"reductions": kernels.standard[:4]} | facts)


@contextmanager
def started(kernels: SimpleNamespace, mpiexec: str, ranks: int, folder: Path, **env: str) -> Iterator[Any]:
    """A job that has reduced something, and is ended whatever happens."""
    prefix = [mpiexec, "-n", str(ranks)] if ranks > 1 else []
    command = [*prefix, sys.executable, "-m", "mpi_kernels", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=kernels.environment(**env), **pipes)
    try:
        until = time.monotonic() + 30
        while frames_done(folder) == 0:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(20)
        process.stdout.close()


def frames_done(folder: Path) -> int:
    beat = folder / "heartbeat"
    return int(json.loads(beat.read_text())["frames"]) if beat.exists() else 0


def names(folder: Path) -> list[str]:
    return [e.name for path in folder.glob("events-*.jsonl") for e in read_events(path)]


def check_partial(folder: Path, frames: np.ndarray) -> int:
    """The partial result is exactly the reduction of the frames that it says; gives their number."""
    manifest = json.loads((folder / "partial-1.json").read_text())
    done, of = manifest["frames"], LONG
    assert 0 < done < of
    assert (manifest["partial"], manifest["coverage"], manifest["source_digest"]) == (True, done / of, "0" * 32)
    times = done // DISTINCT + (np.arange(DISTINCT) < done % DISTINCT)
    with h5py.File(folder / "partial-1.h5") as file:
        covered = file["/entry/covered/data"][()]
        np.testing.assert_array_equal(covered, np.arange(of) < done)
        wanted = np.resize(frames.sum(axis=(1, 2), dtype=np.uint64), done)
        np.testing.assert_array_equal(file["/com/total/data"][:done], wanted)
        assert not file["/com/total/data"][done:].any()
        summed = np.tensordot(times.astype(np.uint64), frames.astype(np.uint64), 1)
        np.testing.assert_array_equal(file["/pattern/sum/data"][()], summed)
        np.testing.assert_array_equal(file["/pattern/mean/data"][()], summed / done)
    return int(done)


# numpy once, on ranks that run at once: it is the slow one
@pytest.mark.parametrize(("ranks", "kernel"), [(1, "auto"), (2, "auto"), (4, "auto"), (2, "numpy")])
def test_usr1_leaves_the_frames_that_are_done(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, base: tuple[Path, np.ndarray], ranks: int, kernel: str
) -> None:
    folder = job(kernels, tmp_path / "run", base[0], LONG, ranks=ranks, method=Method(kernel=kernel))
    with started(kernels, mpiexec, ranks, folder, EMFLOW_TIME_LIMIT_S="3600") as process:
        os.kill(json.loads((folder / "claim").read_text())["pid"], signal.SIGUSR1)
        out, _ = process.communicate(timeout=50)
    assert process.returncode == 1, out
    done = check_partial(folder, base[1])
    error = json.loads((folder / "error.json").read_text())
    assert (error["code"], error["retryable"], error["rank"]) == ("time-limit", True, 0)
    assert f"ended after {done} of {LONG} frames, which partial-1 holds" in error["message"]
    assert "raise time_limit_s in [scheduler]" in error["next_step"]
    assert not (folder / "result.json").exists()
    assert names(folder)[-2:] == ["partial", "failed"]


def test_a_limit_of_the_job_script_is_seen_on_the_clock(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, base: tuple[Path, np.ndarray]
) -> None:
    folder = job(kernels, tmp_path / "run", base[0], LONG, ranks=2)
    code = "import sys; from mpi_kernels import stopping, __main__ as m; stopping.LEAD_S = 24; sys.exit(m.main())"
    (tmp_path / "near.py").write_text(code)
    done = kernels.launch(mpiexec, 2, tmp_path / "near.py", folder, env={"EMFLOW_TIME_LIMIT_S": "30"})
    assert done.returncode == 1
    error = json.loads((folder / "error.json").read_text())
    assert error["code"] == "time-limit"
    if "ended after 0 of" not in error["message"]:  # a machine that needs 6 s to start has nothing to keep
        check_partial(folder, base[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cancelled_job_ends_and_the_ranks_go_on(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, base: tuple[Path, np.ndarray], ranks: int
) -> None:
    long = job(kernels, tmp_path / "long", base[0], LONG, ranks=ranks)
    bad = job(kernels, tmp_path / "bad", base[0], 100, ranks=ranks)
    (tmp_path / "bad.cycling").write_text("{}")
    cut = job(kernels, tmp_path / "cut", base[0], 100, ranks=ranks)
    faulty = tmp_path / "cut.faulty"  # known when a rank reads it
    faulty.write_text(json.dumps({"frames": 30, "at": 29, "how": "raise"}))
    ends = kernels.folder(tmp_path / "ends", faulty, "faulty:Faulty", ranks=ranks)
    short = job(kernels, tmp_path / "short", base[0], 100, ranks=ranks)
    for number, other in enumerate((bad, cut, ends, short), 2):  # only the first one is cancelled
        text = (other / "job.json").read_text()
        (other / "job.json").write_text(text.replace("ef-01", f"ef-{number:02d}"))
    cut.joinpath("job.json").write_text(cut.joinpath("job.json").read_text().replace('"ranks":', '"ranks":1'))
    warm = kernels.here / "mpi" / "warm.py"
    done = kernels.launch(mpiexec if ranks > 1 else None, ranks, warm, long, bad, cut, ends, short)
    assert done.returncode == 0, done.stdout + done.stderr
    codes = [json.loads((f / "error.json").read_text())["code"] for f in (long, bad, cut, ends)]
    assert codes == ["stopped", "unexpected", "launch", "missing-data"]
    check_partial(long, base[1])
    assert "somebody thought better of it" in json.loads((long / "error.json").read_text())["message"]
    assert json.loads((short / "result.json").read_text())["frames"] == 100
    assert not (cut / "claim").exists()
    assert json.loads((ends / "error.json").read_text())["rank"] == ranks - 1


@pytest.mark.parametrize(
    ("ranks", "kernel", "dtype"),
    [
        (1, "auto", "<u2"),
        (2, "auto", "<f4"),
        (4, "auto", "<u2"),
        pytest.param(4, "auto", "<f4", marks=pytest.mark.slow),
        pytest.param(2, "numpy", "<u2", marks=pytest.mark.slow),
    ],
)
def test_slices_change_no_bit(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, ranks: int, kernel: str, dtype: str
) -> None:
    path, frames = tmp_path / "base.npy", 611 if kernel == "auto" else 300  # of 1 MiB each: two slices and more
    noise = np.random.default_rng(9)
    np.save(
        path,
        noise.normal(3, 1, (3, 512, 512)).astype("<f4")
        if dtype == "<f4"
        else noise.poisson(2, (3, 512, 1024)).astype(dtype),
    )
    reductions = [*kernels.standard[:4], ReductionSpec(use="frame_max:FrameMax", name="peak")][
        : 5 if kernel == "auto" else 4
    ]
    facts = {"ranks": ranks, "method": Method(kernel=kernel), "reductions": reductions}
    whole = job(kernels, tmp_path / "whole", path, frames, **facts)
    sliced = job(kernels, tmp_path / "sliced", path, frames, **facts)
    launcher = mpiexec if ranks > 1 else None
    assert kernels.launch(launcher, ranks, "-m", "mpi_kernels", whole).returncode == 0
    limit = {"EMFLOW_TIME_LIMIT_S": "600"}
    assert kernels.launch(launcher, ranks, "-m", "mpi_kernels", sliced, env=limit).returncode == 0
    outputs = json.loads((whole / "result.json").read_text())["outputs"]
    assert json.loads((sliced / "result.json").read_text())["frames"] == frames
    with h5py.File(whole / "result.h5") as one, h5py.File(sliced / "result.h5") as other:
        for name in outputs:
            np.testing.assert_array_equal(other[name]["data"][()], one[name]["data"][()], err_msg=name, strict=True)
