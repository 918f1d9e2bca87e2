"""EMPAD: the XML finds its raw file, the size decides, hostile XML is harmless."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_empad
from mpi_kernels.errors import FormatError, Incomplete, KernelError, NotThisFormat
from mpi_kernels.formats.empad import Empad

SCAN = ExactScan((2, 3), (128, 128), "float32")


def frames_of(path: Path) -> np.ndarray:
    source = Empad().open(os.fspath(path))
    out = np.zeros((source.header.frames, 128, 128), np.float32)
    source.frames(0, source.header.frames, out)
    source.close()
    return out


@pytest.mark.parametrize("scan_shape", [(1, 1), (1, 3), (3, 1), (4,)])
def test_scans_and_series(tmp_path: Path, scan_shape: tuple[int, ...]) -> None:
    scan = ExactScan(scan_shape, (128, 128), "float32")
    path = write_empad(scan, tmp_path / "a.raw")
    header = Empad().probe(os.fspath(path))
    assert (header.scan_shape, header.rule, header.dtype) == (scan_shape, "exact", "float32")
    assert [(a.scale, a.offset, a.unit) for a in header.det_axes] == [(0.001, -0.064, "rad")] * 2
    np.testing.assert_array_equal(frames_of(path), scan.frames(0, scan.count))


def test_the_xml_that_names_the_file_among_others(tmp_path: Path) -> None:
    path = write_empad(SCAN, tmp_path / "scan_x3_y2.raw", xml="acquisition_9.xml")
    (tmp_path / "acquisition_1.xml").write_text(
        '<root><pix_x>9</pix_x><pix_y>9</pix_y><raw_file filename="x.raw"/></root>'
    )
    (tmp_path / "acquisition_2.xml").write_text("<root><half")
    (tmp_path / "acquisition_3.xml").write_text("<!DOCTYPE root><root/>")
    header = Empad().probe(os.fspath(path))
    assert Path(header.members[1].path).name == "acquisition_9.xml"
    np.testing.assert_array_equal(frames_of(path), SCAN.frames(0, 6))


@pytest.mark.parametrize("filename", ["C:\\data\\empad\\a.raw", "/home/empad/a.raw", " a.raw "])
def test_the_xml_may_name_the_folder_too(tmp_path: Path, filename: str) -> None:
    path = write_empad(SCAN, tmp_path / "a.raw", xml="other.xml")
    text = (tmp_path / "other.xml").read_text().replace('filename="a.raw"', f'filename="{filename}"')
    (tmp_path / "other.xml").write_text(text)
    assert Empad().probe(os.fspath(path)).scan_shape == (2, 3)


def test_version_1_2_has_the_scan_in_the_name_only(tmp_path: Path) -> None:
    path = write_empad(SCAN, tmp_path / "scan_x3_y2.raw")
    xml = path.with_suffix(".xml")
    xml.write_text('<root><raw_file filename="scan_x3_y2.raw"/></root>')
    assert Empad().probe(os.fspath(path)).scan_shape == (2, 3)


@pytest.mark.parametrize(
    ("xml", "kind", "words"),
    [
        (None, Incomplete, "no XML"),
        ("", Incomplete, "empty"),
        ("<root><pix_x>3</pix_x>", Incomplete, "not whole"),
        ("<root></roof>", FormatError, "not XML"),
        ('<root><raw_file filename="a.raw"/></root>', FormatError, "no pix_x"),
        ('<root><pix_x>3</pix_x><pix_y>0</pix_y><raw_file filename="a.raw"/></root>', FormatError, "pix_y is '0'"),
        ('<root><pix_x>3</pix_x><pix_y>9e9</pix_y><raw_file filename="a.raw"/></root>', FormatError, "9e9"),
        ('<root><pix_x>3</pix_x><pix_y>3</pix_y><raw_file filename="a.raw"/></root>', Incomplete, "6 of 9 frames"),
        ('<root><pix_x>3</pix_x><pix_y>1</pix_y><raw_file filename="a.raw"/></root>', FormatError, "bytes more"),
        ("<root><other/></root>", Incomplete, "no XML"),
        ('<!DOCTYPE r [<!ENTITY a "ha">]><root>&a;</root>', FormatError, "DTD"),
        ('<!DOCTYPE r SYSTEM "file:///etc/passwd"><root/>', FormatError, "DTD"),
    ],
)
def test_xml_files_that_are_refused(tmp_path: Path, xml: str | None, kind: type[KernelError], words: str) -> None:
    path = write_empad(SCAN, tmp_path / "a.raw")
    beside = path.with_suffix(".xml")
    if xml is None:
        beside.unlink()
    else:
        beside.write_text(xml)
    with pytest.raises(kind, match=words) as caught:
        Empad().probe(os.fspath(path))
    assert caught.value.next_step


def test_a_billion_laughs_cost_nothing(tmp_path: Path) -> None:
    path = write_empad(SCAN, tmp_path / "a.raw")
    nested = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY l0 "lol">{nested}]><root>&l9;</root>'
    for encoding in ("utf-8", "utf-16"):
        path.with_suffix(".xml").write_bytes(bomb.encode(encoding))
        with pytest.raises(FormatError, match="DTD"):
            Empad().probe(os.fspath(path))


def test_raw_data_of_another_size_are_not_empads(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1000))
    with pytest.raises(NotThisFormat):
        Empad().probe(os.fspath(path))
