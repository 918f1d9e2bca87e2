"""TIFF: byte orders, strips, descriptions, series in folders, and pages that tifffile undoes."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.synthetic import ExactScan
from emflow.synthetic_vendor import write_tiff
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.choose import choose
from mpi_kernels.formats.tiff import Tiff

STACK = ExactScan((5,), (7, 6), "uint16", seed=3)


def read(path: Path, step: int = 0) -> tuple[Header, np.ndarray]:
    source = Tiff().open(os.fspath(path))
    header, step = source.header, step or source.header.frames
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    for start in range(0, header.frames, step):
        source.frames(start, min(start + step, header.frames), out[start : start + step])
    source.complete()
    source.close()
    return header, out


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    order=st.sampled_from(["<", ">"]),
    big=st.booleans(),
    strips=st.integers(1, 7),
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]),
    frames=st.integers(1, 4),
)
def test_every_kind_of_plain_page(
    tmp_path_factory: pytest.TempPathFactory, order: str, big: bool, strips: int, dtype: str, frames: int
) -> None:
    scan = ExactScan((frames,), (7, 6), dtype)
    path = tmp_path_factory.mktemp("t") / "a.tif"
    header, found = read(write_tiff(scan, path, order=order, big=big, strips=strips))  # type: ignore[arg-type]
    assert (header.dtype, header.scan_shape, header.rule) == (dtype, (frames,), "stability")
    np.testing.assert_array_equal(found, scan.frames(0, frames))


@pytest.mark.parametrize(("tag", "value", "error"), [(273, (1 << 63) + 5, Incomplete), (256, 1 << 60, FormatError)])
@pytest.mark.parametrize("description", ["", "ImageJ=1.54f\nimages=6\n"])
def test_numbers_that_no_file_can_have(
    tmp_path: Path, tag: int, value: int, error: type[KernelError], description: str
) -> None:
    values = {256: 4, 257: 4, 258: 16, 259: 1, 273: 256, 279: value * 8 if tag == 256 else 32} | {tag: value}
    entries = [struct.pack("<HHQQ", t, 16, 1, v) for t, v in values.items()]
    entries.append(struct.pack("<HHQQ", 270, 2, 1 + len(description), 512))
    head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(entries)) + b"".join(entries) + bytes(8)
    path = tmp_path / "a.tif"
    path.write_bytes(head.ljust(512, b"\0") + description.encode() + bytes(4096))
    with pytest.raises(error):
        Tiff().probe(os.fspath(path))


@pytest.mark.parametrize(
    ("description", "scan_shape", "rule"),
    [
        ("", (6,), "stability"),
        ("taken on a Monday", (6,), "stability"),
        ("ImageJ=1.54f\nimages=6\nslices=6\n", (6,), "exact"),
        ('{"shape": [6, 7, 6]}', (6,), "exact"),
        ('{"shape": [2, 3, 7, 6]}', (2, 3), "exact"),
        ('{"shape": [2, 1, 3, 7, 6]}', (2, 3), "exact"),
        ('{"shape": [2, 3, 8, 6]}', (6,), "stability"),
        ('{"shape": [2, 3', (6,), "stability"),
        ('{"shape": "six"}', (6,), "stability"),
    ],
)
def test_what_the_description_says(tmp_path: Path, description: str, scan_shape: tuple[int, ...], rule: str) -> None:
    scan = ExactScan((6,), (7, 6), "uint16")
    header, found = read(write_tiff(scan, tmp_path / "a.tif", description=description))
    assert (header.scan_shape, header.rule) == (scan_shape, rule)
    np.testing.assert_array_equal(found, scan.frames(0, 6))


@pytest.mark.parametrize("description", ["ImageJ=1.54f\nimages=9\n", '{"shape": [9, 7, 6]}'])
def test_fewer_pages_than_described(tmp_path: Path, description: str) -> None:
    path = write_tiff(STACK, tmp_path / "a.tif", description=description)
    with pytest.raises(Incomplete, match="5 of 9") as caught:
        Tiff().probe(os.fspath(path))
    assert caught.value.frame == 5


def test_one_directory_for_many_images(tmp_path: Path) -> None:
    """As ImageJ writes more than 4 GiB."""
    one = write_tiff(ExactScan((1,), (7, 6), "uint16"), tmp_path / "one.tif", description="ImageJ=1.5\nimages=5\n")
    data = bytearray(one.read_bytes())
    at = data.index(struct.pack("<HHII", 273, 4, 1, 8))
    struct.pack_into("<I", data, at + 8, len(data))
    (tmp_path / "a.tif").write_bytes(bytes(data) + STACK.frames(0, 5).tobytes())
    header, found = read(tmp_path / "a.tif")
    assert (header.scan_shape, header.rule) == ((5,), "exact")
    np.testing.assert_array_equal(found, STACK.frames(0, 5))
    os.truncate(tmp_path / "a.tif", len(data) + 3 * 84 + 1)
    with pytest.raises(Incomplete, match="3 of 5") as caught:
        read(tmp_path / "a.tif")
    assert caught.value.frame == 3


def test_pages_in_a_circle_and_unlike_pages(tmp_path: Path) -> None:
    path = write_tiff(STACK, tmp_path / "a.tif")
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    last = data.rindex(bytes(4))
    struct.pack_into("<I", data, len(data) - 4, first)
    assert last == len(data) - 4
    path.write_bytes(data)
    with pytest.raises(FormatError, match="no end"):
        Tiff().probe(os.fspath(path))
    data = bytearray(write_tiff(STACK, tmp_path / "b.tif").read_bytes())
    at = data.rindex(struct.pack("<HHII", 257, 4, 1, 7))
    struct.pack_into("<I", data, at + 8, 6)
    (tmp_path / "b.tif").write_bytes(data)
    with pytest.raises(FormatError, match="page 4") as caught:
        Tiff().probe(os.fspath(tmp_path / "b.tif"))
    assert caught.value.frame == 4


def series(folder: Path, count: int = 12, stem: str = "img_") -> ExactScan:
    scan = ExactScan((count,), (7, 6), "uint16")
    folder.mkdir()
    for i in range(count):
        one = write_tiff(ExactScan((1,), (7, 6), "uint16"), folder / f"{stem}{i + 1}.tif")
        data = one.read_bytes()
        one.write_bytes(data[:8] + scan.frames(i, i + 1).tobytes() + data[8 + 84 :])
    return scan


def test_a_folder_is_a_series_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    scan = series(tmp_path / "s")  # img_10 comes before img_2 in the alphabet
    name, header = choose(os.fspath(tmp_path / "s"), {"tiff": Tiff()})
    assert (name, header.scan_shape, len({m.suffix for m in header.members})) == ("tiff", (12,), 12)
    for step in (1, 5, 12):
        np.testing.assert_array_equal(read(tmp_path / "s", step)[1], scan.frames(0, 12))


def test_a_gap_in_a_series_and_a_file_that_goes_missing(tmp_path: Path) -> None:
    scan = series(tmp_path / "s")
    source = Tiff().open(os.fspath(tmp_path / "s"))
    (tmp_path / "s" / "img_7.tif").rename(tmp_path / "img_7.tif")
    with pytest.raises(Incomplete, match="part 7"):
        Tiff().probe(os.fspath(tmp_path / "s"))
    out = np.full((12, 7, 6), 77, np.uint16)
    with pytest.raises(MissingData, match=r"img_7\.tif") as caught:
        source.frames(0, 12, out)
    assert caught.value.frame == 6
    np.testing.assert_array_equal(out[:6], scan.frames(0, 6))
    with pytest.raises(MissingData):
        source.complete()
    source.close()
    (tmp_path / "img_7.tif").rename(tmp_path / "s" / "img_7.tif")
    os.truncate(tmp_path / "s" / "img_9.tif", 50)
    with pytest.raises(Incomplete):
        Tiff().probe(os.fspath(tmp_path / "s"))


def test_folders_that_are_no_series(tmp_path: Path) -> None:
    series(tmp_path / "s", 3)
    (tmp_path / "s" / "other.tif").write_bytes(b"II*\0")
    with pytest.raises(NotThisFormat):
        Tiff().probe(os.fspath(tmp_path / "s"))
    with pytest.raises(FormatError, match="folder"):
        choose(os.fspath(tmp_path / "s"), {"tiff": Tiff()})
    series(tmp_path / "t", 3)
    (tmp_path / "t" / "img_01.tif").write_bytes((tmp_path / "t" / "img_1.tif").read_bytes())
    with pytest.raises(FormatError, match="two parts"):
        Tiff().probe(os.fspath(tmp_path / "t"))


@pytest.mark.parametrize(
    "options", [{"compression": "zlib"}, {"tile": (16, 16)}, {"rowsperstrip": 2, "compression": 8}]
)
def test_compressed_and_tiled_pages(tmp_path: Path, options: dict[str, object]) -> None:
    tifffile = pytest.importorskip("tifffile")
    scan = ExactScan((4,), (20, 18), "uint16")
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for frame in scan.frames(0, 4):
            file.write(frame, metadata=None, contiguous=False, **options)
    header, found = read(path, 3)
    assert (header.scan_shape, header.dtype, header.rule) == ((4,), "uint16", "stability")
    np.testing.assert_array_equal(found, scan.frames(0, 4))
    data = path.read_bytes()
    for length in range(0, len(data), 1 + len(data) // 120):
        path.write_bytes(data[:length])
        try:
            header, found = read(path)
        except KernelError:
            continue
        np.testing.assert_array_equal(found, scan.frames(0, header.frames))
        assert header.frames < 4
    path.write_bytes(data)
    source = Tiff().open(os.fspath(path))
    os.truncate(path, len(data) // 2)
    with pytest.raises(MissingData):
        source.frames(0, 4, np.empty((4, 20, 18), np.uint16))


def test_a_strip_that_was_never_written_is_not_zeros(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((3, 16, 16), np.uint8), compression="zlib", metadata=None, photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        tag = file.pages[1].tags[279]
    with path.open("r+b") as raw:
        raw.seek(tag.valueoffset)
        raw.write(bytes(4))
    with pytest.raises(Incomplete) as caught:
        Tiff().probe(os.fspath(path))
    assert caught.value.frame == 1


def test_colours_are_refused_and_tifffile_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((2, 9, 8, 3), np.uint8), photometric="rgb")
    with pytest.raises(FormatError, match="colours"):
        Tiff().probe(os.fspath(path))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(FormatError, match="tifffile is not installed") as caught:
        Tiff().probe(os.fspath(path))
    assert "emflow[formats]" in caught.value.next_step
