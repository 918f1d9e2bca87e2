"""An acquisition that is reduced while it is written: partial results on the way, and the same bits at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from emflow.runs import RunFolders
from mpi_kernels.contract import ReductionSpec

pytestmark = pytest.mark.needs_mpi
NPY = "mpi_kernels.formats.npy:Npy"
SCAN, DET = (12, 10), (96, 98)
"""Frames of which float sums are grouped by 64: only whole groups are reduced before the end."""
FRAMES = 120


class Writer:
    """Appends frames to an .npy whose header promises all of them, and says what is ready."""

    def __init__(self, folder: Path, data: np.ndarray) -> None:
        folder.mkdir(parents=True)
        self.path, self.folder = folder / "scan.npy", folder
        self._frames = data.reshape(-1, *DET)
        self._runs = RunFolders(folder)
        self.written = 0
        with self.path.open("wb") as file:
            np.lib.format.write_array_header_2_0(
                file, {"descr": data.dtype.str, "fortran_order": False, "shape": data.shape}
            )

    def write(self, stop: int, *, complete: bool = False) -> None:
        with self.path.open("ab") as file:
            file.write(self._frames[self.written : stop].tobytes())
        self.written = stop
        self.say(stop, complete=complete)

    def say(self, frames: int, *, complete: bool = False) -> None:
        self._runs.publish_ready(self.folder, frames=frames, complete=complete, digest="d" * 32 if complete else None)


def scan(dtype: str) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 900, (*SCAN, *DET)).astype(dtype)


def start(kernels: SimpleNamespace, mpiexec: str, ranks: int, folder: Path) -> subprocess.Popen[str]:
    prefix = [mpiexec, "-n", str(ranks)] if ranks > 1 else []
    command = [*prefix, sys.executable, "-m", "mpi_kernels", str(folder)]
    return subprocess.Popen(
        command, env=kernels.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait(process: subprocess.Popen[str]) -> int:
    out, _ = process.communicate(timeout=40)
    print(out)
    return process.returncode


def partials(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("partial-*.json"), key=lambda p: int(p.stem.partition("-")[2])):
        yield json.loads(path.read_text())


def until_partial(folder: Path, frames: int, process: subprocess.Popen[str]) -> dict[str, Any]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for manifest in partials(folder):
            if manifest["frames"] >= frames:
                return manifest
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"no partial result of {frames} frames: {sorted(p.name for p in folder.iterdir())}")


def until_beat(folder: Path, frames: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 30
    while (
        json.loads((folder / "heartbeat").read_text() if (folder / "heartbeat").exists() else "{}").get("frames")
        != frames
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def contents(path: Path, outputs: list[str]) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name]["data"][()] for name in outputs}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["<u2", ">u4", "<f4"])
def test_it_ends_with_the_bits_of_a_batch(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, ranks: int, dtype: str
) -> None:
    data = scan(dtype)
    reductions = [*kernels.standard, ReductionSpec(use="frame_max:FrameMax", name="peak")]
    writer = Writer(tmp_path / "growing", data)
    facts = {"ranks": ranks, "reductions": reductions}
    folder = kernels.folder(writer.folder / "01", writer.path, NPY, growing=True, **facts)
    process = start(kernels, mpiexec, ranks, folder)
    writer.write(7)
    writer.write(70)
    first = until_partial(folder, 1, process)
    writer.write(111)
    writer.write(FRAMES, complete=True)
    assert wait(process) == 0
    manifest = json.loads((folder / "result.json").read_text())
    assert (manifest["frames"], manifest["partial"], manifest["source_digest"]) == (FRAMES, False, "d" * 32)
    assert first["partial"]
    assert 0 < first["frames"] <= 111
    batch = kernels.folder(tmp_path / "batch" / "01", writer.path, NPY, **facts)
    assert wait(start(kernels, mpiexec, ranks, batch)) == 0
    found, wanted = (contents(f / "result.h5", manifest["outputs"]) for f in (folder, batch))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_partial_result_is_right_where_it_covers(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, ranks: int
) -> None:
    data = scan("<u2")
    writer = Writer(tmp_path / "growing", data)
    folder = kernels.folder(writer.folder / "01", writer.path, NPY, growing=True, ranks=ranks)
    process = start(kernels, mpiexec, ranks, folder)
    writer.write(37)
    manifest = until_partial(folder, 37, process)
    with h5py.File(folder / manifest["result"]) as file:
        covered = file["/entry/covered/data"][()].ravel()
        total, pattern = file["/com/total/data"][()].ravel(), file["/pattern/sum/data"][()]
        y = file["/com/y/data"][()].ravel()
    writer.write(FRAMES, complete=True)
    assert wait(process) == 0
    frames = data.reshape(FRAMES, *DET)
    assert covered.tolist() == [1] * 37 + [0] * (FRAMES - 37)
    assert manifest["coverage"] == 37 / FRAMES
    np.testing.assert_array_equal(total, frames.sum(axis=(1, 2)) * (covered > 0))
    np.testing.assert_array_equal(pattern, frames[:37].sum(axis=0))
    assert np.isnan(y).tolist() == [False] * 37 + [True] * (FRAMES - 37)
    assert manifest["quality"] == "OK"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("end", "code", "frame", "there"),
    [
        ("silence", "stalled", None, 40),
        ("complete too early", "missing-data", 40, 40),
        ("started again", "format", None, 40),
        ("more than promised", "format", None, 40),
    ],
)
def test_a_writer_that_does_not_finish_leaves_a_clear_state(
    kernels: SimpleNamespace,
    mpiexec: str,
    tmp_path: Path,
    ranks: int,
    end: str,
    code: str,
    frame: int | None,
    there: int,
) -> None:
    writer = Writer(tmp_path / "growing", scan("<u2"))
    folder = kernels.folder(writer.folder / "01", writer.path, NPY, growing=True, ranks=ranks, stall_s=1.0)
    process = start(kernels, mpiexec, ranks, folder)
    writer.write(there, complete=end == "complete too early")
    if end in ("started again", "more than promised"):
        until_partial(folder, there, process)
        writer.say(3 if end == "started again" else FRAMES + 1)
    assert wait(process) != 0
    error = json.loads((folder / "error.json").read_text())
    assert (error["code"], error["frame"]) == (code, frame)
    assert error["retryable"] is (code != "missing-data")
    assert not (folder / "result.json").exists()
    last = list(partials(folder))[-1]
    assert last["frames"] == there
    assert (
        contents(folder / last["result"], ["/pattern/sum"])["/pattern/sum"].sum() == last["scalars"]["pattern"]["total"]
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("all_there", [False, True])
def test_usr1_ends_it_with_what_is_there(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, ranks: int, all_there: bool
) -> None:
    writer = Writer(tmp_path / "growing", scan("<u2"))
    folder = kernels.folder(writer.folder / "01", writer.path, NPY, growing=True, ranks=ranks)
    process = start(kernels, mpiexec, ranks, folder)
    there = FRAMES if all_there else 40  # all, but nobody has said yet that it is complete
    writer.write(there)
    if all_there:
        until_beat(folder, there, process)
    else:
        until_partial(folder, there, process)
    os.kill(json.loads((folder / "claim").read_text())["pid"], signal.SIGUSR1)
    assert wait(process) == 1
    error = json.loads((folder / "error.json").read_text())
    assert (error["code"], error["retryable"]) == ("time-limit", True)
    assert f"ended after {there} of {FRAMES} frames" in error["message"]
    assert not (folder / "result.json").exists()
    assert list(partials(folder))[-1]["frames"] == there


def test_data_that_were_said_to_be_ready_and_are_not(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "growing", scan("<u2"))
    folder = kernels.folder(writer.folder / "01", writer.path, NPY, growing=True)
    process = start(kernels, mpiexec, 1, folder)
    writer.write(20)
    until_partial(folder, 20, process)
    writer.say(30)
    assert wait(process) != 0
    error = json.loads((folder / "error.json").read_text())
    assert (error["code"], error["frame"]) == ("missing-data", 20)


def test_a_format_that_can_not_grow_says_so(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["data"] = scan("<u2")
    folder = kernels.folder(tmp_path / "a" / "01", path, "mpi_kernels.formats.hdf5:Hdf5", growing=True)
    assert wait(start(kernels, mpiexec, 1, folder)) != 0
    error = json.loads((folder / "error.json").read_text())
    assert error["code"] == "format"
    assert "while it grows" in error["message"]
