"""What a rank may use: memory that does not grow with the file, and a disk that may be full."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

NPY = "mpi_kernels.formats.npy:Npy"
MEASURE = """
import json, re, sys
from pathlib import Path
def peak():  # not ru_maxrss: that one goes on from the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import h5py, numpy  # what every rank has loaded before it reads a frame
from mpi_kernels import job
from mpi_kernels.ranks import Ranks
before = peak()
job.run(Path(sys.argv[1]), Ranks())
print(json.dumps(peak() - before))
"""


def sparse(path: Path, frames: int, side: int) -> int:
    """A .npy file of zeros that takes no room on the disk; returns its size."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<u2", "fortran_order": False, "shape": (frames, side, side)}
        )
        size = file.tell() + frames * side * side * 2
        file.truncate(size)
    return size


def growth(kernels: SimpleNamespace, tmp_path: Path, frames: int, side: int) -> int:
    name = f"{frames}x{side}"
    sparse(tmp_path / f"{name}.npy", frames, side)
    folder = kernels.folder(tmp_path / name, tmp_path / f"{name}.npy", NPY)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=kernels.environment(),
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("frames", "side"),
    [
        pytest.param(4800, 256, id="many frames"),
        pytest.param(12, 4096, id="large frames", marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_rank_is_bounded(kernels: SimpleNamespace, tmp_path: Path, frames: int, side: int) -> None:
    outputs = (8 + 8 + 2 + 8 + 16) * side * side + frames * 8 * (6 + side)  # pattern with squares; maps and rings
    geometry = 40 * side * side  # masks, rings and distances of one frame's pixels
    used = growth(kernels, tmp_path, frames, side)
    assert used < (256 << 20) + outputs + geometry


@pytest.mark.slow
def test_memory_of_a_rank_does_not_grow_with_the_file(kernels: SimpleNamespace, tmp_path: Path) -> None:
    small, large = (growth(kernels, tmp_path, frames, 512) for frames in (400, 4096))
    assert large - small < 64 << 20  # the maps themselves: rings of 3,696 more frames


@pytest.fixture
def little(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 KiB."""
    folder = tmp_path / "little"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "emflow-test", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.needs_root
@pytest.mark.parametrize("free_kib", [100, 80, 60, 40, 24])
def test_a_full_disk_is_told_and_leaves_nothing(
    kernels: SimpleNamespace, tmp_path: Path, little: Path, free_kib: int
) -> None:
    np.save(tmp_path / "scan.npy", np.ones((5, 7, 24, 32), np.uint16))
    folder = kernels.folder(little / "run", tmp_path / "scan.npy", NPY)
    (little / "filler").write_bytes(bytes((320 - free_kib) << 10))
    done = kernels.launch(None, 1, "-m", "mpi_kernels", folder)
    assert done.returncode == 1, done.stderr
    error = json.loads((folder / "error.json").read_text())
    assert (error["code"], error["retryable"]) == ("no-space", True)
    left = {p.name for p in folder.iterdir() if not p.name.startswith("events-")}
    assert left <= {"job.json", "claim", "heartbeat", "error.json"}
    (little / "filler").unlink()
    (folder / "claim").unlink()
    assert kernels.launch(None, 1, "-m", "mpi_kernels", folder).returncode == 0
