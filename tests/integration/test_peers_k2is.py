"""LiberTEM and py4DSTEM read the K2 in-situ recordings that our own writer makes, and find the frames that we find."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emflow.synthetic_streams import Inset, block_header, write_k2is
from mpi_kernels.formats.k2is import K2is
from mpi_kernels.formats.k2is_blocks import BLOCK_BYTES, BLOCKS, SECTORS

pytestmark = pytest.mark.needs_peers
LIBERTEM = """
import sys
import numpy as np
from libertem.api import Context
from libertem.udf.raw import PickUDF
path, out = sys.argv[1:]
with Context.make_with("inline") as context:
    data = context.load("k2is", path=path)
    print(tuple(data.shape))
    found = context.run_udf(dataset=data, udf=PickUDF(), roi=np.ones(tuple(data.shape.nav), bool))
np.save(out, found["intensity"].data)
"""
PY4DSTEM = """
import sys
import numpy as np
from py4DSTEM.io.filereaders.read_K2 import K2DataArray
path, out = sys.argv[1:]
data = K2DataArray(path, hidden_stripe_noise_reduction=False)
np.save(out, np.stack([data._grab_frame(i) for i in range(3)]))
print(data.shape)
"""
SECOND = 400
"""Frames from which on LiberTEM looks at the shutter's flag again."""


def theirs(path: Path, folder: Path, script: str = LIBERTEM) -> tuple[str, np.ndarray]:
    command = [os.environ["EMFLOW_PEERS_PYTHON"], "-c", script, str(path), str(folder / "theirs.npy")]
    environment = os.environ | {"HOME": str(folder), "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1], np.load(folder / "theirs.npy")


def ours(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    source = K2is().open(os.fspath(path))
    out = np.empty((source.header.frames, *source.header.det_shape), np.uint16)
    source.frames(0, source.header.frames, out)
    source.complete()
    source.close()
    return source.header.scan_shape, out


@pytest.mark.timeout(120)
def test_a_series_from_the_first_frame_that_is_whole_everywhere(tmp_path: Path) -> None:
    scan = Inset((4,), (1860, 2048), "uint16", (40, 60), (910, 230), seed=2)
    path = write_k2is(scan, tmp_path / "a_.gtg", before=0, after=0, lags=[0] * 8)
    for sector, lost in enumerate((0, 5, 0, 31, 0, 0, 17, 1)):  # the files begin at different blocks of frame 0
        file = tmp_path / f"a_{sector + 1}.bin"
        file.write_bytes(file.read_bytes()[lost * BLOCK_BYTES :])
    shape, found = ours(path)
    said, wanted = theirs(path, tmp_path)
    assert shape == (3,)
    assert said.startswith("(3,")
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found, scan.frames(1, 4))


@pytest.mark.timeout(120)
def test_a_scan_begins_a_frame_before_the_shutters_flag(tmp_path: Path) -> None:
    """LiberTEM looks for the flag in a block of every 400th frame and halves, so there have to be that many.

    In files with holes only those blocks have headers, and the last frame, in which the files must agree.
    """
    before, scan = 3, Inset((2, 2), (1860, 2048), "uint16", (40, 60), (910, 230), seed=3)
    path = write_k2is(scan, tmp_path / "a_.gtg", before=before, after=0, lags=[0] * 8, number=10)
    flagged, last = BLOCKS * (before + 1), SECOND + before + 1
    looked = {BLOCKS * n for n in range(last)} | {BLOCKS * last + n for n in range(BLOCKS)}
    for begin in (0, BLOCKS * before):  # it looks once more from the scan's first frame on
        low, high = begin, begin + BLOCKS * SECOND
        while low < high:
            middle = (low + high) // 2
            looked.add(middle)
            low, high = (low, middle) if middle >= flagged else (middle + 1, high)
    looked = {block for block in looked if block >= BLOCKS * (before + scan.count)}
    for sector in range(SECTORS):
        with (tmp_path / f"a_{sector + 1}.bin").open("r+b") as file:
            for block in sorted(looked):
                file.seek(block * BLOCK_BYTES)
                file.write(block_header(10 + block // BLOCKS, block % BLOCKS, exposed=True))
            file.truncate((last + 1) * BLOCKS * BLOCK_BYTES)
    shape, found = ours(path)
    said, wanted = theirs(path, tmp_path)
    assert shape == (2, 2)
    assert said.startswith("(2, 2,")
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found, scan.frames(0, 4))


@pytest.mark.timeout(120)
def test_a_file_that_begins_within_a_block(tmp_path: Path) -> None:
    """Which py4DSTEM reads and LiberTEM does not; its scan begins with the flag, a frame after LiberTEM's and ours."""
    scan = Inset((2, 2), (1860, 2048), "uint16", (40, 60), (910, 230), seed=4)
    folder = tmp_path / "alone"
    folder.mkdir()
    path = write_k2is(scan, folder / "a_.gtg", before=2, after=1, lags=[0, 5, 0, 31, 0, 0, 17, 1])
    # the file itself must not be the shortest, or py4DSTEM maps more of it than there is
    file = folder / "a_3.bin"
    file.write_bytes(b"\xff\xff\0\x55" * 250 + file.read_bytes())
    _, found = ours(path)
    _, wanted = theirs(path, tmp_path, PY4DSTEM)
    np.testing.assert_array_equal(found[1:], wanted)
    np.testing.assert_array_equal(found, scan.frames(0, 4))
