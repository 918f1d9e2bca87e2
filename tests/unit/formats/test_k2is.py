"""K2 in-situ recordings: sectors that begin apart, blocks that are lost, doubled or not yet written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from emflow.synthetic_streams import Inset, block_header, sector_blocks, write_k2is
from mpi_kernels.errors import FormatError, Incomplete, MissingData, NotThisFormat, PartOfAnother
from mpi_kernels.formats.k2is import NO_FRAME_BEFORE, K2is
from mpi_kernels.formats.k2is_blocks import BLOCK_BYTES, BLOCKS, SECTORS, Sectors, unpack
from mpi_kernels.formats.raw import Raw

SCAN = Inset((2, 2), (1860, 2048), "uint16", (40, 60), (910, 230), seed=2)
STACK = Inset((3,), (1860, 2048), "uint16", (40, 60), (910, 230), seed=2)
TOGETHER = [0] * SECTORS


def sector(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}{number}.bin")


def read(path: Path) -> np.ndarray:
    source = K2is().open(os.fspath(path))
    try:
        out = np.full((source.header.frames, *source.header.det_shape), 77, np.uint16)
        source.frames(0, source.header.frames, out)
        source.complete()
    finally:
        source.close()
    return out


def refused(path: Path) -> tuple[MissingData, MissingData]:
    """What reading and what checking raise, for an acquisition that can be opened."""
    source = K2is().open(os.fspath(path))
    try:
        with pytest.raises(MissingData) as reading:
            source.frames(0, source.header.frames, np.empty((source.header.frames, 1860, 2048), np.uint16))
        with pytest.raises(MissingData) as checking:
            source.complete()
    finally:
        source.close()
    return reading.value, checking.value


def test_twelve_bits_in_any_order_of_the_blocks() -> None:
    rng = np.random.default_rng(1)
    strip = rng.integers(0, 4096, (1860, 256), np.uint16)
    rows = sector_blocks(strip, 2**32 - 1, exposed=True)
    # the two pixels of the first three bytes, by hand: the uppermost block of the right edge comes first
    a, b = int(strip[0, 240]), int(strip[0, 241])
    assert rows[0, 40:43].tolist() == [a & 0xFF, a >> 8 | (b & 0xF) << 4, b >> 4]
    for order in (np.arange(BLOCKS), rng.permutation(BLOCKS)):
        out = np.zeros_like(strip)
        assert unpack(rows[order], 2**32 - 1, out) is None
        np.testing.assert_array_equal(out, strip)


@pytest.mark.parametrize("lags", [TOGETHER, [0, 32, 64, 1, 31, 33, 95, 7]])
@pytest.mark.parametrize("scan", [SCAN, STACK], ids=["scan", "stack"])
def test_sectors_that_begin_apart(tmp_path: Path, scan: Inset, lags: list[int]) -> None:
    path = write_k2is(scan, tmp_path / "a_.gtg", lags=lags, after=0, number=2**31)
    np.testing.assert_array_equal(read(path), scan.frames(0, scan.count))


def test_frames_after_the_scan_are_left_alone(tmp_path: Path) -> None:
    path = write_k2is(SCAN, tmp_path / "a_.gtg", after=2)
    os.truncate(sector(path, 4), sector(path, 4).stat().st_size - 100)
    np.testing.assert_array_equal(read(path), SCAN.frames(0, 4))
    facts = K2is().probe(os.fspath(path)).metadata
    assert facts["first_frame_number"] == 700 + 1 + 2


def test_a_lost_block_names_the_frame_and_spares_those_before(tmp_path: Path) -> None:
    path = write_k2is(SCAN, tmp_path / "a_.gtg", before=1, after=2, lags=TOGETHER)
    data, lost = sector(path, 5).read_bytes(), (1 + 2) * BLOCKS + 11
    sector(path, 5).write_bytes(data[: lost * BLOCK_BYTES] + data[(lost + 1) * BLOCK_BYTES :])
    reading, checking = refused(path)
    assert reading.frame == checking.frame == 2
    assert "a_5.bin" in str(reading)
    source = K2is().open(os.fspath(path))
    out = np.empty((2, 1860, 2048), np.uint16)
    source.frames(0, 2, out)
    source.close()
    np.testing.assert_array_equal(out, SCAN.frames(0, 2))


@pytest.mark.parametrize(
    ("source", "words"), [(None, "not written"), (4, "doubled or misplaced")], ids=["a hole", "a block twice"]
)
def test_blocks_that_are_no_part_of_the_frame(tmp_path: Path, source: int | None, words: str) -> None:
    path = write_k2is(SCAN, tmp_path / "a_.gtg", before=1, lags=TOGETHER)
    data, at = bytearray(sector(path, 2).read_bytes()), (1 + 1) * BLOCKS
    begin = (at + 9) * BLOCK_BYTES
    other = (at + source) * BLOCK_BYTES if source else 0
    data[begin : begin + BLOCK_BYTES] = data[other : other + BLOCK_BYTES] if source else bytes(BLOCK_BYTES)
    sector(path, 2).write_bytes(data)
    opened = K2is().open(os.fspath(path))
    with pytest.raises(MissingData, match=words) as caught:
        opened.frames(0, 4, np.empty((4, 1860, 2048), np.uint16))
    opened.close()
    assert caught.value.frame == 1


def test_a_file_cut_off_after_opening(tmp_path: Path) -> None:
    path = write_k2is(SCAN, tmp_path / "a_.gtg", before=1, after=0, lags=TOGETHER)
    opened = K2is().open(os.fspath(path))
    os.truncate(sector(path, 8), (1 + 3) * BLOCKS * BLOCK_BYTES - 1)
    with pytest.raises(MissingData, match="31 of the 32 blocks") as reading:
        opened.frames(0, 4, np.empty((4, 1860, 2048), np.uint16))
    with pytest.raises(MissingData) as checking:
        opened.complete()
    opened.close()
    assert reading.value.frame == checking.value.frame == 2


def test_what_is_not_there_yet(tmp_path: Path) -> None:
    path = write_k2is(SCAN, tmp_path / "a_.gtg", before=1, after=0, lags=TOGETHER)
    with sector(path, 3).open("r+b") as file:
        file.truncate((1 + 3) * BLOCKS * BLOCK_BYTES + 5)
    with pytest.raises(Incomplete, match="3 of 4 frames") as caught:
        K2is().probe(os.fspath(path))
    assert caught.value.frame == 3
    sector(path, 3).unlink()
    with pytest.raises(Incomplete, match=r"a_3\.bin is not there"):
        K2is().probe(os.fspath(path))
    sector(path, 3).write_bytes(bytes(2 * BLOCKS * BLOCK_BYTES))
    with pytest.raises(Incomplete, match="not written yet"):
        K2is().probe(os.fspath(path))


def test_files_that_begin_and_end_within_a_block(tmp_path: Path) -> None:
    """What looks like a block's mark in the piece before the first one is none, since no other follows it."""
    path = write_k2is(STACK, tmp_path / "a_.gtg", after=1)
    for n, piece in ((2, bytes(7)), (5, b"\xff\xff\0\x55" * 40), (8, np.random.default_rng(3).bytes(BLOCK_BYTES - 1))):
        data = sector(path, n).read_bytes()
        sector(path, n).write_bytes(piece + data[: -2 * BLOCK_BYTES - 100])
    np.testing.assert_array_equal(read(path), STACK.frames(0, 3))


@pytest.mark.parametrize("begin", [1, 399, 400, 401, 447])
def test_the_shutters_flag_is_found(tmp_path: Path, begin: int) -> None:
    """Of frames between only the first block's header is there, in files with holes."""
    paths = [tmp_path / f"{n}.bin" for n in range(SECTORS)]
    for path in paths:
        with path.open("wb") as file:
            for frame in range(449):
                for block in range(BLOCKS if frame == 0 else 1):
                    file.seek((frame * BLOCKS + block) * BLOCK_BYTES)
                    file.write(block_header(frame, block, exposed=frame >= begin))
            file.truncate(449 * BLOCKS * BLOCK_BYTES)
    sectors = Sectors([os.fspath(p) for p in paths])
    assert sectors.exposed() == begin
    sectors.close()


def test_no_exposure_and_no_frame_before_it(tmp_path: Path) -> None:
    path = write_k2is(STACK, tmp_path / "a_.gtg", before=2, after=0, lags=TOGETHER)
    for n in range(1, SECTORS + 1):
        os.truncate(sector(path, n), 2 * BLOCKS * BLOCK_BYTES)
    with pytest.raises(Incomplete, match="the shutter was open"):
        K2is().probe(os.fspath(path))
    path = write_k2is(STACK, tmp_path / "b_.gtg", before=0, after=0, lags=TOGETHER)
    write_k2is(SCAN, tmp_path / "c_.gtg", before=0, after=0, lags=TOGETHER).replace(path)  # tags of a scan
    for n in range(1, SECTORS + 1):
        data = sector(path, n).read_bytes()
        sector(path, n).write_bytes(data + sector(tmp_path / "c_.gtg", n).read_bytes()[: BLOCKS * BLOCK_BYTES])
    header = K2is().probe(os.fspath(path))
    assert header.scan_shape == (2, 2)
    assert NO_FRAME_BEFORE in header.warnings


def test_what_is_refused(tmp_path: Path) -> None:
    path = write_k2is(SCAN, tmp_path / "a_.gtg", lags=TOGETHER)
    with pytest.raises(PartOfAnother):
        Raw().probe(os.fspath(sector(path, 1)))
    with pytest.raises(NotThisFormat):
        K2is().probe(os.fspath(sector(path, 1)))
    tags = path.read_bytes()
    path.write_bytes(tags.replace(b"\x02\0\0\0", b"\0\0\0\0"))
    with pytest.raises(FormatError, match="a scan of 0 x 0"):
        K2is().probe(os.fspath(path))
    path.write_bytes(b"II*\0" + tags)
    with pytest.raises(NotThisFormat):
        K2is().probe(os.fspath(path))
    path.write_bytes(tags)
    data = sector(path, 7).read_bytes()
    sector(path, 7).write_bytes(b"\x01" * 3 * BLOCK_BYTES + data)
    with pytest.raises(FormatError, match="no block of a K2 sector"):
        K2is().probe(os.fspath(path))
    lost = BLOCK_BYTES * (BLOCKS + 5)  # of the first frame that the file seems to have all of
    sector(path, 7).write_bytes(data[BLOCK_BYTES * 30 : lost] + data[lost + BLOCK_BYTES :])
    with pytest.raises(FormatError, match="fewer than 32 blocks"):
        K2is().probe(os.fspath(path))
