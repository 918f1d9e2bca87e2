"""Merlin acquisitions in several files, and rows with a frame of the flyback."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_merlin
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, MissingData
from mpi_kernels.formats.merlin import Merlin

SCAN = ExactScan((3, 4), (10, 6), "uint16")
RECORD = 384 + 120


def read(path: Path, step: int = 0) -> tuple[Header, np.ndarray]:
    source = Merlin().open(os.fspath(path))
    header, step = source.header, step or source.header.frames
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    for start in range(0, header.frames, step):
        source.frames(start, min(start + step, header.frames), out[start : start + step])
    source.complete()
    source.close()
    return header, out


def split(folder: Path, counts: tuple[int, ...] = (5, 4, 3), name: str = "scan{}.mib") -> Path:
    """The frames of `SCAN` in several files, and one .hdr; the first file."""
    whole = write_merlin(SCAN, folder / "scan.mib")
    data, at = whole.read_bytes(), 0
    whole.unlink()
    for i, count in enumerate(counts, 1):
        (folder / name.format(i)).write_bytes(data[at : at + count * RECORD])
        at += count * RECORD
    return folder / name.format(1)


@pytest.mark.parametrize("name", ["scan{}.mib", "scan_{}.mib", "scan_{:03d}.mib"])
def test_parts_are_one_acquisition(tmp_path: Path, name: str) -> None:
    path = split(tmp_path, name=name)
    for step in (1, 5, 12):
        header, frames = read(path, step)
        assert (header.scan_shape, header.rule) == ((3, 4), "exact")
        np.testing.assert_array_equal(frames, SCAN.frames(0, 12))
    assert [m.path for m in header.members] == [
        *(os.fspath(tmp_path / name.format(i)) for i in (1, 2, 3)),
        os.fspath(tmp_path / "scan.hdr"),
    ]


def test_more_parts_than_one_digit_counts(tmp_path: Path) -> None:
    path = split(tmp_path, (1,) * 12)
    np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 12))


def test_parts_staged_under_an_id_read_the_same(tmp_path: Path) -> None:
    header = Merlin().probe(os.fspath(split(tmp_path)))
    staged = tmp_path / "staged"
    staged.mkdir()
    for member in header.members:
        shutil.copyfile(member.path, staged / f"0123456789abcdef{member.suffix}")
    again, frames = read(staged / f"0123456789abcdef{header.members[0].suffix}")
    assert again.scan_shape == (3, 4)
    np.testing.assert_array_equal(frames, SCAN.frames(0, 12))


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    split(tmp_path)
    with pytest.raises(FormatError, match=r"later part of scan1\.mib"):
        Merlin().probe(os.fspath(tmp_path / "scan2.mib"))


def test_missing_and_cut_parts(tmp_path: Path) -> None:
    path = split(tmp_path)
    (tmp_path / "scan2.mib").rename(tmp_path / "elsewhere")
    with pytest.raises(Incomplete, match="part 2"):
        Merlin().probe(os.fspath(path))
    (tmp_path / "elsewhere").rename(tmp_path / "scan2.mib")
    third = (tmp_path / "scan3.mib").read_bytes()
    os.truncate(tmp_path / "scan3.mib", 2 * RECORD)
    with pytest.raises(Incomplete, match="11 of 12") as caught:
        Merlin().probe(os.fspath(path))
    assert caught.value.frame == 11
    os.truncate(tmp_path / "scan3.mib", 2 * RECORD - 1)
    with pytest.raises(Incomplete, match="within a frame") as caught:
        Merlin().probe(os.fspath(path))
    assert caught.value.frame == 10
    (tmp_path / "scan3.mib").write_bytes(third + third[:RECORD])
    with pytest.raises(FormatError, match="13 frames, 12 were announced"):
        Merlin().probe(os.fspath(path))


def test_frames_that_changed_places_between_parts_are_named(tmp_path: Path) -> None:
    path = split(tmp_path, (4, 4, 4))
    second, third = tmp_path / "scan2.mib", tmp_path / "scan3.mib"
    data = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(data)
    with pytest.raises(MissingData, match="missing or doubled") as caught:
        read(path)
    assert caught.value.frame == 4


def test_what_is_not_a_series(tmp_path: Path) -> None:
    """A raw twin, a numbered file with its own .hdr, and one beside the .mib that owns the .hdr."""
    write_merlin(SCAN, tmp_path / "scan.mib")
    write_merlin(SCAN, tmp_path / "scanRAW.mib", hdr=False)
    write_merlin(SCAN, tmp_path / "scan1.mib", hdr=False)
    write_merlin(SCAN, tmp_path / "other1.mib")
    write_merlin(SCAN, tmp_path / "other2.mib")
    for name, members in {
        "scan.mib": ["scan.mib", "scan.hdr"],
        "scanRAW.mib": ["scanRAW.mib"],
        "scan1.mib": ["scan1.mib"],
        "other1.mib": ["other1.mib", "other1.hdr"],
    }.items():
        header = Merlin().probe(os.fspath(tmp_path / name))
        assert [Path(m.path).name for m in header.members] == members
        assert header.members[0].suffix == ".mib"


def line_skipped(path: Path) -> Path:
    """Three rows of five frames, of a scan with four columns."""
    write_merlin(ExactScan((3, 5), (10, 6), "uint16"), path)
    hdr = path.with_suffix(".hdr")
    hdr.write_text(re.sub(r"ScanX:\t5", "ScanX:\t4", hdr.read_text()), newline="")
    return path


def test_the_flyback_frame_of_each_row_is_left_out(tmp_path: Path) -> None:
    kept = ExactScan((3, 5), (10, 6), "uint16").frames(0, 15).reshape(3, 5, 10, 6)[:, :4].reshape(12, 10, 6)
    for step in (1, 3, 12):
        header, frames = read(line_skipped(tmp_path / "a.mib"), step)
        assert (header.scan_shape, header.kind) == ((3, 4), "4d")
        assert any("flyback" in w for w in header.warnings)
        np.testing.assert_array_equal(frames, kept)


def test_numbers_are_checked_across_frames_that_are_left_out(tmp_path: Path) -> None:
    path = line_skipped(tmp_path / "a.mib")
    data = bytearray(path.read_bytes())
    at = 6 * RECORD  # row 1, column 1: frame 5 of those that are kept
    data[at : at + RECORD] = data[at - RECORD : at]
    path.write_bytes(data)
    with pytest.raises(MissingData, match="missing or doubled") as caught:
        read(path)
    assert caught.value.frame == 5
