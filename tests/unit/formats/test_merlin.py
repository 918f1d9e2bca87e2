"""Merlin: header fields, counts, raw bits, and files that are not whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_merlin
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats import merlin_raw
from mpi_kernels.formats.merlin import Merlin

SCAN = ExactScan((4, 3), (10, 6), "uint16")


def read(path: Path) -> tuple[Header, np.ndarray]:
    source = Merlin().open(os.fspath(path))
    out = np.full((source.header.frames, *source.header.det_shape), 77, source.header.dtype)
    source.frames(0, source.header.frames, out)
    source.complete()
    source.close()
    return source.header, out


def edit(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_bytes().decode()
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    path.write_bytes(changed.encode())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize(("scan_shape", "det"), [((1,), (4, 7)), ((6,), (7, 4)), ((1, 5), (3, 8)), ((5, 2), (1, 1))])
def test_counts_of_every_width(tmp_path: Path, dtype: str, scan_shape: tuple[int, ...], det: tuple[int, int]) -> None:
    scan = ExactScan(scan_shape, det, dtype, empty_every=3)
    header, frames = read(write_merlin(scan, tmp_path / "a.mib"))
    assert (header.scan_shape, header.det_shape, header.dtype, header.rule) == (scan_shape, det, dtype, "exact")
    np.testing.assert_array_equal(frames, scan.frames(0, scan.count))


@pytest.mark.parametrize(("depth", "dtype"), [(1, "uint8"), (6, "uint8"), (12, "uint16"), (24, "uint32")])
@pytest.mark.parametrize(("chips", "shape"), [(1, (256, 256)), (1, (64, 256)), (4, (512, 512))])
def test_raw_bits_against_a_second_way(depth: int, dtype: str, chips: int, shape: tuple[int, int]) -> None:
    """Pixel by pixel, from the words: what the manual says, without any of the decoder's array tricks."""
    generator = np.random.default_rng(depth)
    rows = shape[0] if chips == 1 else 256
    layout = merlin_raw.layout(chips, rows, depth, "x.mib")
    assert (layout.det_shape, layout.dtype) == (shape, dtype)
    stored = generator.integers(0, 256, (1, layout.payload), np.uint8)
    if depth in (12, 24):
        stored[:, ::2] &= 0x0F  # 12 bits in 16
    out = np.zeros((1, *shape), dtype)
    merlin_raw.decode(stored, out, chips=chips, rows=rows, depth=depth)
    halves = 2 if depth == 24 else 1
    bits = {1: 1, 6: 8, 12: 16, 24: 16}[depth]
    row_bytes = chips * 256 * bits // 8
    for _ in range(300):
        y, x = int(generator.integers(rows)), int(generator.integers(chips * 256))
        value = 0
        for half in range(halves):
            start = half * rows * row_bytes + y * row_bytes + (x * bits // 64) * 8
            word = int.from_bytes(stored[0, start : start + 8].tobytes(), "big")
            value = (value << 12) + ((word >> (x * bits % 64)) & ((1 << bits) - 1))
        chip, column = divmod(x, 256)
        if chips == 1:
            at = (y, column)
        else:
            at = {
                0: (511 - y, 511 - column),
                1: (511 - y, 255 - column),
                2: (y, 256 + column),
                3: (y, column),
            }[chip]
        assert out[0][at] == value
    np.testing.assert_array_equal(merlin_raw.encode(out, chips, depth), stored)


def test_raw_files(tmp_path: Path) -> None:
    counts = {1: 1, 6: 63, 12: 4095}
    for depth, limit in counts.items():
        scan = ExactScan((3,), (256, 256), "uint8" if depth < 12 else "uint16")
        frames = scan.frames(0, 3)
        if frames.max() > limit:  # the generator's counts, thinned until they fit the counter
            scan = ExactScan((3,), (256, 256), "uint8")
            path = write_merlin(scan, tmp_path / f"{depth}.mib", raw_depth=12)
            data = bytearray(path.read_bytes())
            assert len(data) == 3 * (384 + 256 * 256 * 2)
            header, found = read(path)
            assert header.dtype == "uint16"
            np.testing.assert_array_equal(found, scan.frames(0, 3))
            continue
        path = write_merlin(scan, tmp_path / f"{depth}.mib", raw_depth=depth)
        np.testing.assert_array_equal(read(path)[1], frames)


def test_what_no_real_file_was_compared_with_says_so() -> None:
    assert merlin_raw.layout(4, 256, 24, "x").warnings
    assert not merlin_raw.layout(1, 256, 1, "x").warnings


@pytest.mark.parametrize(("chips", "rows", "depth"), [(2, 256, 6), (1, 256, 0), (1, 256, 8), (4, 128, 6)])
def test_raw_layouts_that_are_not_known(chips: int, rows: int, depth: int) -> None:
    with pytest.raises(FormatError, match="not known"):
        merlin_raw.layout(chips, rows, depth, "x.mib")


def test_the_missing_frames_are_named(tmp_path: Path) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    os.truncate(path, 5 * (384 + 120) + 200)
    with pytest.raises(Incomplete, match="5 of 12 frames") as caught:
        Merlin().probe(os.fspath(path))
    assert caught.value.frame == 5


def test_more_frames_than_announced_are_refused(tmp_path: Path) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    data = path.read_bytes()
    path.write_bytes(data + data[:504])
    with pytest.raises(FormatError, match="504 bytes more"):
        Merlin().probe(os.fspath(path))


@pytest.mark.parametrize("announced", ["0", None])
def test_an_endless_acquisition_counts_its_frames(tmp_path: Path, announced: str | None) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    hdr = path.with_suffix(".hdr")
    if announced is None:
        edit(hdr, r"Frames in Acquisition[^\n]*\n", "")
    else:
        edit(hdr, r"(Frames in Acquisition \(Number\):\t)\d+", rf"\g<1>{announced}")
    os.truncate(path, 9 * 504)
    header, frames = read(path)
    assert (header.rule, header.scan_shape) == ("stability", (3, 3))  # three frames a trigger still divide nine
    np.testing.assert_array_equal(frames, SCAN.frames(0, 9))
    os.truncate(path, 9 * 504 - 1)
    with pytest.raises(Incomplete, match="8 of 9"):
        Merlin().probe(os.fspath(path))


@pytest.mark.parametrize(
    ("pattern", "replacement", "scan_shape"),
    [
        (r"ScanX:\t3", "ScanX:\t5", (4, 3)),  # does not fit: rows by trigger
        (r"Frames per Trigger \(Number\):\t3", "Frames per Trigger (Number):\t1", (4, 3)),  # ScanX, ScanY
        (r"Frames per Trigger.*ScanY:\t4\r\n", "", (12,)),
        (r"Trigger \(Number\):\t3(.*)ScanX[^\n]*\n", r"Trigger (Number):\t5\1", (12,)),
        (r"Trigger \(Number\):\t3(.*)ScanX[^\n]*\n", r"Trigger (Number):\t12\1", (12,)),
    ],
)
def test_scan_shape_from_the_hdr(tmp_path: Path, pattern: str, replacement: str, scan_shape: tuple[int, ...]) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    edit(path.with_suffix(".hdr"), f"(?s){pattern}", replacement)
    header, frames = read(path)
    assert header.scan_shape == scan_shape
    np.testing.assert_array_equal(frames, SCAN.frames(0, 12))


@pytest.mark.parametrize(
    ("pattern", "replacement", "kind", "words"),
    [
        (r"End\t *", "", Incomplete, "End"),
        (r"^HDR", "XML", FormatError, "no Merlin header"),
        (r"Acquisition \(Number\):\t12", "Acquisition (Number):\tmany", FormatError, "many"),
        (r"Acquisition \(Number\):\t12", "Acquisition (Number):\t-1", FormatError, "-1"),
        (r"Acquisition \(Number\):\t12", "Acquisition (Number):\t999999999999", Incomplete, "12 of 999999999999"),
    ],
)
def test_hdr_files_that_are_refused(
    tmp_path: Path, pattern: str, replacement: str, kind: type[KernelError], words: str
) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    edit(path.with_suffix(".hdr"), pattern, replacement)
    with pytest.raises(kind, match=words) as caught:
        Merlin().probe(os.fspath(path))
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        (b"MQ1,", b"MQ2,", NotThisFormat, "MQ1"),
        (b"U16", b"F32", FormatError, "F32"),
        (b"U16", b"R64", FormatError, "raw frames"),
        (b",00384,", b",00020,", FormatError, "can't be"),
        (b",00384,", b",99999,", FormatError, "can't be"),
        (b",0006,0010,", b",0000,0010,", FormatError, "can't be"),
        (b",0006,0010,", b",wide,0010,", FormatError, "can't be read"),
        (b",0006,0010,", b",0007,0010,", Incomplete, "of 12 frames"),
        (b",0006,0010,", b",0005,0010,", FormatError, "more than"),
    ],
)
def test_frame_headers_that_are_refused(
    tmp_path: Path, old: bytes, new: bytes, kind: type[KernelError], words: str
) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    data = path.read_bytes()
    assert old in data[:100]
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(kind, match=words) as caught:
        Merlin().open(os.fspath(path))
    assert type(caught.value) is kind


def test_a_hole_in_the_middle_names_the_frame(tmp_path: Path) -> None:
    path = write_merlin(SCAN, tmp_path / "a.mib")
    with path.open("r+b") as file:
        file.seek(7 * 504)
        file.write(bytes(504))
    source = Merlin().open(os.fspath(path))
    with pytest.raises(MissingData) as caught:
        source.frames(3, 12, np.empty((9, 10, 6), np.uint16))
    assert caught.value.frame == 7
    source.close()


def test_a_raw_twin_is_not_part_of_the_acquisition(tmp_path: Path) -> None:
    """The trap of a glob for <stem>*.mib."""
    write_merlin(SCAN, tmp_path / "a.mib")
    write_merlin(SCAN, tmp_path / "aRAW.mib", hdr=False)
    assert [Path(m.path).name for m in Merlin().probe(os.fspath(tmp_path / "a.mib")).members] == ["a.mib", "a.hdr"]
    assert [Path(m.path).name for m in Merlin().probe(os.fspath(tmp_path / "aRAW.mib")).members] == ["aRAW.mib"]


def test_upper_case_names_of_windows(tmp_path: Path) -> None:
    path = write_merlin(SCAN, tmp_path / "A.mib")
    path.rename(tmp_path / "A.MIB")
    (tmp_path / "A.hdr").rename(tmp_path / "A.HDR")
    header = Merlin().probe(os.fspath(tmp_path / "A.MIB"))
    assert [m.suffix for m in header.members] == [".mib", ".hdr"]
    assert header.rule == "exact"


@pytest.mark.parametrize("how", ["cut out", "doubled"])
def test_a_missing_or_doubled_frame_is_named(tmp_path: Path, how: str) -> None:
    scan = ExactScan((3, 5), (16, 24), "uint16")
    path = write_merlin(scan, tmp_path / "scan.mib", hdr=how == "doubled")
    data = path.read_bytes()
    record = len(data) // 15
    frames = [data[i * record : (i + 1) * record] for i in range(15)]
    frames[5:6] = [] if how == "cut out" else [frames[4]]
    path.write_bytes(b"".join(frames))
    source = Merlin().open(str(path))
    count = source.header.frames
    with pytest.raises(MissingData, match="missing or doubled") as caught:
        source.frames(0, count, np.empty((count, 16, 24), np.uint16))
    assert caught.value.frame == 5
    source.close()
