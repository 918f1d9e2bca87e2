"""Makers' formats: what each alone has to get right."""

from __future__ import annotations

import os
import re
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_raw
from emflow.synthetic_vendor import (
    write_blo,
    write_de,
    write_dm,
    write_mrc,
    write_ndata,
    write_nordif,
    write_ripple,
    write_seq,
    write_ser,
    write_tvips,
    write_velox,
)
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.blockfile import Blockfile
from mpi_kernels.formats.choose import choose
from mpi_kernels.formats.dm import Dm
from mpi_kernels.formats.mrc import Mrc
from mpi_kernels.formats.ndata import Ndata
from mpi_kernels.formats.nordif import Nordif
from mpi_kernels.formats.raw import Raw
from mpi_kernels.formats.rsciio import Rsciio
from mpi_kernels.formats.seq import Seq
from mpi_kernels.formats.ser import Ser
from mpi_kernels.formats.tvips import Tvips
from mpi_kernels.formats.velox import Velox
from mpi_kernels.protocols import Format

SCAN = ExactScan((2, 3), (4, 5), "uint16", seed=8)
STACK = ExactScan((6,), (4, 5), "uint16", seed=8)
SQUARE = ExactScan((2, 3), (6, 6), "uint8", seed=8)


def read(known: Format, path: Path) -> tuple[Header, np.ndarray]:
    source = known.open(os.fspath(path))
    out = np.full((source.header.frames, *source.header.det_shape), 77, source.header.dtype)
    source.frames(0, len(out), out)
    source.complete()
    source.close()
    return source.header, out


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode("latin-1")
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("latin-1"))


# --- block files


def test_blo_axes_and_a_frame_that_was_not_written(tmp_path: Path) -> None:
    path = write_blo(SQUARE, tmp_path / "a.blo")
    header, _ = read(Blockfile(), path)
    assert [(a.scale, a.unit) for a in header.scan_axes + header.det_axes] == [(2.5, "nm"), (2.0, "nm")] + [
        (2.0, "cm")
    ] * 2
    assert header.metadata["high_tension_v"] == 200_000
    with path.open("r+b") as file:
        file.seek(-2 * 42, os.SEEK_END)
        file.write(bytes(42))
    source = Blockfile().open(os.fspath(path))
    with pytest.raises(MissingData, match="not written") as caught:
        source.frames(0, 6, np.empty((6, 6, 6), np.uint8))
    assert caught.value.frame == 4
    source.close()


# --- TVIPS


def test_tvips_parts_in_order(tmp_path: Path) -> None:
    path = write_tvips(STACK, tmp_path / "a_000.tvips", parts=(1, 4))
    write_tvips(STACK, tmp_path / "ab_000.tvips", parts=(2,))  # another stream whose name begins alike
    header, frames = read(Tvips(), path)
    assert [m.suffix for m in header.members] == ["_000.tvips", "_001.tvips", "_002.tvips"]
    assert header.det_axes[0].unit == "1/nm"
    np.testing.assert_array_equal(frames, STACK.frames(0, 6))


def test_tvips_parts_that_are_missing_or_short(tmp_path: Path) -> None:
    path = write_tvips(STACK, tmp_path / "a_000.tvips", parts=(2, 4))
    with pytest.raises(FormatError, match="later part"):
        Tvips().probe(os.fspath(tmp_path / "a_001.tvips"))
    os.truncate(tmp_path / "a_001.tvips", 64 + 40)  # one whole frame of two, and more parts behind it
    with pytest.raises(Incomplete, match="begins with 4") as caught:
        Tvips().probe(os.fspath(path))
    assert caught.value.frame == 3
    (tmp_path / "a_001.tvips").unlink()
    with pytest.raises(Incomplete, match="part 1"):
        Tvips().probe(os.fspath(path))


@pytest.mark.parametrize(("at", "value", "words"), [(0, 255, "255 bytes"), (4, 3, "version 3"), (16, 12, "12 bits")])
def test_tvips_headers_that_are_refused(tmp_path: Path, at: int, value: int, words: str) -> None:
    path = write_tvips(STACK, tmp_path / "a_000.tvips")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, at, value)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        Tvips().probe(os.fspath(path))


# --- MRC and Direct Electron


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_mrc_modes(tmp_path: Path, dtype: str, order: str) -> None:
    scan = ExactScan((6,), (4, 5), dtype)
    header, frames = read(Mrc(), write_mrc(scan, tmp_path / "a.mrc", order=order))  # type: ignore[arg-type]
    assert header.dtype == dtype
    assert [a.scale for a in header.det_axes] == [1.0, 2.0]
    assert bool(header.warnings) == (dtype == "int8")
    np.testing.assert_array_equal(frames, scan.frames(0, 6))


@pytest.mark.parametrize(("flags", "dtype"), [(1, "int8"), (0, "uint8")])
def test_mode_0_as_imod_marks_it(tmp_path: Path, flags: int, dtype: str) -> None:
    path = write_mrc(ExactScan((6,), (4, 5), "int8"), tmp_path / "a.mrc")
    data = bytearray(path.read_bytes())
    struct.pack_into("<2i", data, 152, 1146047817, flags)
    path.write_bytes(data)
    header, _ = read(Mrc(), path)
    assert (header.dtype, header.warnings) == (dtype, ())


@pytest.mark.parametrize("mode", [3, 4, 101])
def test_mrc_modes_that_are_refused(tmp_path: Path, mode: int) -> None:
    path = write_mrc(STACK, tmp_path / "a.mrc")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 12, mode)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"mode {mode}"):
        Mrc().probe(os.fspath(path))


RASTER = [(y, x) for y in range(2) for x in range(3)]


@pytest.mark.parametrize(
    ("positions", "scan_shape", "distinct"),
    [(None, (2, 3), None), (RASTER, (2, 3), 6), (RASTER[::-1], (6,), 6), ([(0, 0)] * 5 + [(7, 1)], (6,), 2)],
)
def test_positions_of_a_scan(
    tmp_path: Path, positions: list[tuple[int, int]] | None, scan_shape: tuple[int, ...], distinct: int | None
) -> None:
    path = write_de(SCAN, tmp_path / "a_movie.mrc", positions=positions)
    header, frames = read(Mrc(), path)
    assert header.scan_shape == scan_shape
    assert header.metadata.get("scan_positions_distinct") == distinct
    assert bool(header.warnings) == (len(scan_shape) == 1)
    assert len(header.members) == (2 if positions is None else 3)
    np.testing.assert_array_equal(frames, SCAN.frames(0, 6))


@pytest.mark.parametrize(
    ("name", "value", "kind", "frame"),
    [
        ("Acquisition Status", "Acquiring", Incomplete, 6),
        ("Number of Frames Requested", "9", Incomplete, 6),
        ("Autosave Movie Frames Written", "5", Incomplete, 5),
        ("Autosave Movie Frames Written", "7", FormatError, None),
        ("Autosave Movie Frames Written", "six", FormatError, None),
    ],
)
def test_a_movie_that_is_not_finished(
    tmp_path: Path, name: str, value: str, kind: type[KernelError], frame: int | None
) -> None:
    path = write_de(SCAN, tmp_path / "a_movie.mrc")
    info = tmp_path / "a_info.txt"
    lines = info.read_text().splitlines()
    changed = [f"{name} = {value}" if line.startswith(name) else line for line in lines]
    assert changed != lines
    info.write_text("\n".join(changed))
    with pytest.raises(kind) as caught:
        Mrc().probe(os.fspath(path))
    assert caught.value.frame == frame


def test_a_movie_waits_for_what_belongs_to_it(tmp_path: Path) -> None:
    path = write_de(SCAN, tmp_path / "a_movie.mrc", positions=RASTER[::-1])
    csv = tmp_path / "a_scan_coordinates.csv"
    for text, kind in (
        ("2,1\n1,1\n", Incomplete),
        ("2,1\n" * 7, FormatError),
        ("a,b\n", FormatError),
        ("\n", Incomplete),
    ):
        csv.write_text(text)
        with pytest.raises(kind):
            Mrc().probe(os.fspath(path))
    csv.unlink()
    with pytest.raises(Incomplete, match="_scan_coordinates"):
        Mrc().probe(os.fspath(path))
    (tmp_path / "a_info.txt").unlink()
    with pytest.raises(Incomplete, match="_info"):
        Mrc().probe(os.fspath(path))


# --- StreamPix


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_seq_versions(tmp_path: Path, version: int, dtype: str) -> None:
    scan = ExactScan((6,), (4, 5), dtype)
    path = write_seq(scan, tmp_path / "a.seq", version=version)
    header, frames = read(Seq(), path)
    assert (header.dtype, header.rule, len(header.warnings)) == (dtype, "exact", 1)
    np.testing.assert_array_equal(frames, scan.frames(0, 6))
    (tmp_path / "a.seq.gain.mrc").write_bytes(b"x")
    assert "not applied: .gain.mrc" in Seq().probe(os.fspath(path)).warnings[1]


# --- TIA


@pytest.mark.parametrize("gap", [0, 8, 24, 500])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float64"])
def test_ser_is_turned(tmp_path: Path, gap: int, dtype: str) -> None:
    scan = ExactScan((2, 3), (4, 5), dtype)
    path = write_ser(scan, tmp_path / "a_1.ser", gap=max(gap, 24))
    header, frames = read(Ser(), path)
    assert (header.scan_shape, header.dtype) == ((2, 3), dtype)
    assert "turned" in str(header.metadata["orientation"])
    assert [a.unit for a in header.scan_axes] == ["m", "m"]
    np.testing.assert_array_equal(frames, scan.frames(0, 6))


def test_a_series_that_was_stopped_names_the_frame(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="4 of 6") as caught:
        Ser().probe(os.fspath(write_ser(STACK, tmp_path / "a.ser", valid=4)))
    assert caught.value.frame == 4
    with pytest.raises(FormatError, match="7 of 6"):
        Ser().probe(os.fspath(write_ser(STACK, tmp_path / "b.ser", valid=7)))


def test_the_emi_belongs_to_its_series(tmp_path: Path) -> None:
    path = write_ser(STACK, tmp_path / "a_1.ser")
    (tmp_path / "a.emi").write_bytes(b"JOX")
    (tmp_path / "a_2.emi").write_bytes(b"JOX")
    assert [Path(m.path).name for m in Ser().probe(os.fspath(path)).members] == ["a_1.ser", "a.emi"]


# --- DigitalMicrograph


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("swapped", [True, False, None])
def test_dm_orders(tmp_path: Path, version: int, order: str, swapped: bool | None) -> None:
    scan = ExactScan((2, 3), (4, 5), "float32")
    path = tmp_path / f"a.dm{version}"
    stored = False if swapped is None else swapped
    write_dm(scan, path, version=version, order=order, swapped=stored)  # type: ignore[arg-type]
    if swapped is None:
        edited(path, "Data Order Swapped", "Data Order Unknown")
    header, frames = read(Dm(), path)
    assert (header.kind, header.scan_shape, header.det_shape) == ("4d", (2, 3), (4, 5))
    assert len(header.warnings) == {True: 0, False: 1, None: 2}[swapped]
    assert [(a.scale, a.offset, a.unit) for a in header.scan_axes + header.det_axes] == [(4.0, -8.0, "nm")] * 4
    np.testing.assert_array_equal(frames, scan.frames(0, 6))


@pytest.mark.parametrize(("old", "new", "words"), [(10, 3, "complex"), (10, 23, "colour"), (10, 99, "unknown")])
def test_dm_pixels_that_are_refused(tmp_path: Path, old: int, new: int, words: str) -> None:
    path = write_dm(STACK, tmp_path / "a.dm3", version=3)
    data = path.read_bytes()
    mark = b"DataType%%%%" + struct.pack(">II", 1, 5)
    at = data.rindex(mark) + len(mark)
    assert struct.unpack_from("<I", data, at) == (old,)
    path.write_bytes(data[:at] + struct.pack("<I", new) + data[at + 4 :])
    with pytest.raises(FormatError, match=words):
        Dm().probe(os.fspath(path))


def test_dm_tags_without_end(tmp_path: Path) -> None:
    """Groups in groups: more than any real file has."""
    group = struct.pack(">BH", 20, 1) + b"a" + b"\0\0" + struct.pack(">I", 1)
    path = tmp_path / "a.dm3"
    path.write_bytes(struct.pack(">IIIHI", 3, 0, 1, 0, 1) + group * 100_000)
    with pytest.raises(FormatError, match="deep"):
        Dm().probe(os.fspath(path))


# --- Swift


def test_ndata_members(tmp_path: Path) -> None:
    for zip64 in (False, True):
        header, frames = read(Ndata(), write_ndata(SCAN, tmp_path / "a.ndata1", zip64=zip64))
        assert header.scan_axes
        np.testing.assert_array_equal(frames, SCAN.frames(0, 6))
    with pytest.raises(FormatError, match="compressed"):
        Ndata().probe(os.fspath(write_ndata(SCAN, tmp_path / "a.ndata1", compress=True)))


def test_ndata_with_a_directory_that_disagrees(tmp_path: Path) -> None:
    path = write_ndata(SCAN, tmp_path / "a.ndata1")
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    for changed in (
        data[: end + 8] + struct.pack("<HH", 1, 1) + data[end + 12 :],
        data[: end + 16] + struct.pack("<I", 12) + data[end + 20 :],
        data + b"more",
    ):
        path.write_bytes(changed)
        with pytest.raises((FormatError, Incomplete)):
            Ndata().probe(os.fspath(path))


# --- NORDIF


def test_nordif_and_raw_data_in_one_folder(tmp_path: Path) -> None:
    formats: dict[str, Format] = {"nordif": Nordif(), "raw": Raw()}
    path = write_nordif(SQUARE, tmp_path / "Pattern.dat")
    (tmp_path / "Pattern.txt").rename(tmp_path / "Setting.txt")
    assert choose(os.fspath(path), formats)[0] == "nordif"
    assert choose(os.fspath(write_raw(SCAN, tmp_path / "other.dat")), formats)[0] == "raw"
    edited(tmp_path / "Setting.txt", "Number of samples\t3x2", "Number of samples\tmany")
    with pytest.raises(FormatError, match="many"):
        Nordif().probe(os.fspath(path))
    (tmp_path / "Setting.txt").write_text("another program's")
    with pytest.raises(NotThisFormat):
        Nordif().probe(os.fspath(path))


# --- Velox


@pytest.mark.parametrize("chunk", [(4, 5, 1), (4, 5, 4), (2, 3, 2), (1, 1, 6)])
def test_velox_chunks(tmp_path: Path, chunk: tuple[int, int, int]) -> None:
    path = write_velox(STACK, tmp_path / "a.emd", chunk=chunk)
    header, frames = read(Velox(), path)
    assert [(a.scale, a.unit) for a in header.det_axes] == [(3.0, "m"), (2.0, "m")]
    np.testing.assert_array_equal(frames, STACK.frames(0, 6))
    source = Velox().open(os.fspath(path))
    assert source.align == chunk[2]
    for start in range(6):
        out = np.empty((1, 4, 5), np.uint16)
        source.frames(start, start + 1, out)
        np.testing.assert_array_equal(out, STACK.frames(start, start + 1))
    source.close()


def test_a_velox_chunk_that_was_never_written(tmp_path: Path) -> None:
    path = tmp_path / "a.emd"
    with h5py.File(path, "w") as file:
        data = file.create_dataset(f"Data/Image/{'0' * 32}/Data", (4, 5, 6), np.uint16, chunks=(4, 5, 2))
        data[..., :2] = 1
        data[..., 4:] = 1
    with pytest.raises(Incomplete, match="never written") as caught:
        Velox().probe(os.fspath(path))
    assert caught.value.frame == 2


# --- rosettasciio


def test_ripple_without_rosettasciio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ripple(STACK, tmp_path / "a.rpl")
    monkeypatch.setitem(sys.modules, "rsciio.ripple", None)
    with pytest.raises(FormatError, match="rosettasciio, which is not installed") as caught:
        Rsciio().probe(os.fspath(path))
    assert "emflow[formats]" in caught.value.next_step


def test_a_ripple_file_whose_numbers_are_short(tmp_path: Path) -> None:
    pytest.importorskip("rsciio")
    path = write_ripple(STACK, tmp_path / "a.rpl")
    os.truncate(path.with_suffix(".raw"), 3 * 40 + 1)
    with pytest.raises(Incomplete, match="3 of 6") as caught:
        Rsciio().probe(os.fspath(path))
    assert caught.value.frame == 3
    write_ripple(STACK, path)
    source = Rsciio().open(os.fspath(path))
    os.truncate(path.with_suffix(".raw"), 3 * 40)
    with pytest.raises(MissingData, match="cut off"):
        source.frames(0, 6, np.empty((6, 4, 5), np.uint16))
    source.close()
    edited(write_ripple(STACK, path), "record-by\timage", "record-by\tvector")
    with pytest.raises(FormatError, match="no stack"):
        Rsciio().probe(os.fspath(path))


def test_one_file_alone_imports_rosettasciio() -> None:
    """It is under the GPL: emflow works without it, and nothing else leans on it."""
    root = Path(__file__).resolve().parents[3]
    using = [
        path.relative_to(root).as_posix()
        for package in ("emflow", "mpi_kernels")
        for path in (root / package).rglob("*.py")
        if re.search(r"^\s*(?:from|import) rsciio\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert using == ["mpi_kernels/formats/rsciio.py"]
