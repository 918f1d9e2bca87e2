"""EMPAD: 128 x 128 float32 frames with two rows of metadata each, described by an XML file."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import ClassVar

from mpi_kernels.contract import Axis, Header, Kind, Scalar
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats.access import (
    check_caps,
    expect_size,
    member,
    os_errors,
    read_sidecar,
    sibling,
    size_of,
)
from mpi_kernels.formats.pixels import IMAGE_AXES, kind_of
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

SIDE = 128
PAYLOAD = SIDE * SIDE * 4
TAIL = 2 * SIDE * 4
"""Rows 128 and 129 hold the detector's own data."""

XML_LIMIT = 1000
"""XML files of a folder that are looked through for one that names the raw file."""

_NAME = re.compile(r"_x(\d+)_y(\d+)\.raw$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Described:
    path: str
    scan_shape: tuple[int, ...]
    det_axes: tuple[Axis, ...]
    metadata: dict[str, Scalar]


class Empad:
    """The Electron Microscope Pixel Array Detector's .raw.

    Layout: frames of 130 x 128 little-endian float32, rows 128 and 129 metadata that are dropped.  The XML beside it
    holds ``pix_x``, ``pix_y`` (older versions), or ``scan_parameters/series_count`` for a stack; version 1.2 gives
    the scan in the file's name only, ``scan_x<X>_y<Y>.raw``.  The XML is the one of the same stem, else the one of
    the folder whose ``raw_file`` names the file.  Source: Tate et al. 2016, doi:10.1017/S1431927615015664 (detector);
    keys as in rosettasciio's ``empad`` reader (read, not copied) and real files.

    ``calibrated_diffraction_angle`` (rad per pixel) calibrates the detector, its middle pixel 64 at 0.  The XML's
    fields of view leave open whether ``scan_size`` is part of them, so the scan stays in pixels and they are metadata.

    Complete when the XML is there and the size is exactly frames x 66,560 bytes.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".raw",)

    def probe(self, path: str) -> Header:
        """Read the XML and the file's size."""
        return _probe(path)

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return _open(path, _probe(path))

    def probe_growing(self, path: str) -> Header:
        """Read the XML; the size may still be less."""
        return _probe(path, growing=True)

    def open_growing(self, path: str) -> Source:
        """Open it while it is written, frame after frame."""
        return _open(path, _probe(path, growing=True))


def _open(path: str, header: Header) -> Source:
    return LayoutSource(header, Layout(files=(path,), payload=PAYLOAD, tail=TAIL, dtype="<f4"))


def _probe(path: str, *, growing: bool = False) -> Header:
    if not path.lower().endswith(".raw"):
        raise NotThisFormat("EMPAD data end in .raw", path=path)
    size = size_of(path)
    found = _find(path)
    if found is None:
        if size % (PAYLOAD + TAIL) == 0:
            raise Incomplete(
                "no XML beside it describes it, if it is EMPAD data",
                path=path,
                next_step="wait for its .xml, or write a sidecar <stem>.json for plain raw data",
            )
        raise NotThisFormat("no XML describes it, and its size is not that of EMPAD frames", path=path)
    frames = math.prod(found.scan_shape)
    check_caps(found.path, frames, PAYLOAD + TAIL)
    expect_size(path, size, 0, PAYLOAD + TAIL, frames, growing=growing)
    kind: Kind = kind_of(found.scan_shape)
    return Header(
        format="empad",
        kind=kind,
        scan_shape=found.scan_shape,
        det_shape=(SIDE, SIDE),
        dtype="float32",
        members=(member(path, ".raw"), member(found.path, ".xml")),
        rule="exact",
        det_axes=found.det_axes,
        metadata=found.metadata,
    )


def _find(path: str) -> _Described | None:
    beside = sibling(path, ".xml")
    if beside is not None:
        root = _parse(beside)
        # any other program's XML may have the same stem
        return _describe(beside, root) if root.find("raw_file") is not None else None
    folder, name = os.path.split(path)  # str keeps names that are not UTF-8
    for candidate in _xml_files(folder or "."):
        try:
            root = _parse(candidate)
        except (FormatError, Incomplete):
            continue  # another acquisition's XML is that one's affair
        raw_file = root.find("raw_file")
        if raw_file is not None and _base(raw_file.get("filename", "")) == name:
            return _describe(candidate, root)
    return None


def _xml_files(folder: str) -> list[str]:
    with os_errors(folder):
        names = sorted(n for n in os.listdir(folder) if n.lower().endswith(".xml"))  # noqa: PTH208
    return [os.path.join(folder, n) for n in names[:XML_LIMIT]]  # noqa: PTH118


def _base(filename: str) -> str:
    """The name without its folder, whichever separator the microscope PC used."""
    return filename.replace("\\", "/").rsplit("/", 1)[-1].strip()


class _NoDoctype(ET.TreeBuilder):
    """Refuses DTDs, and with them entities: the XML of a detector has none, and a hostile one can fill the memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Called by the parser before any entity could be used."""
        raise _HasDoctypeError(f"it has a DTD ({name!r:.40}, {pubid!r:.40}, {system!r:.40})")


class _HasDoctypeError(Exception):
    pass


def _parse(path: str) -> ET.Element:
    data = read_sidecar(path)
    parser = ET.XMLParser(target=_NoDoctype())  # noqa: S314 - _NoDoctype refuses what makes XML dangerous
    try:
        parser.feed(data)
        root = parser.close()
    except _HasDoctypeError as error:
        raise FormatError(str(error), path=path, next_step="remove the DTD; EMPAD writes none") from error
    except (ET.ParseError, ValueError, LookupError) as error:
        if not data.rstrip().endswith(b">") or "no element found" in str(error):
            raise Incomplete(f"not whole yet: {error}", path=path, next_step="wait until it is written") from error
        raise FormatError(f"not XML: {error}", path=path, next_step="copy it again") from error
    if not isinstance(root, ET.Element):
        raise FormatError("not XML", path=path, next_step="copy it again")
    return root


def _describe(path: str, root: ET.Element) -> _Described:
    series = next((e for p in root.iter("scan_parameters") if (e := p.find("series_count")) is not None), None)
    raw_file = root.find("raw_file")
    named = _NAME.search(raw_file.get("filename", "") if raw_file is not None else "")
    if series is not None:
        scan_shape: tuple[int, ...] = (_count(path, "series_count", series.text),)
    elif root.find("pix_x") is not None and root.find("pix_y") is not None:
        scan_shape = (
            _count(path, "pix_y", root.findtext("pix_y")),
            _count(path, "pix_x", root.findtext("pix_x")),
        )
    elif named:
        scan_shape = (_count(path, "y", named[2]), _count(path, "x", named[1]))
    else:
        raise FormatError(
            "it holds no pix_x and pix_y, no series_count, and no scan size in the name of its raw_file",
            path=path,
            next_step="add <pix_x> and <pix_y>",
        )
    return _Described(path, scan_shape, _det_axes(root), _facts(root))


def _count(path: str, name: str, text: str | None) -> int:
    text = (text or "").strip()
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise FormatError(f"{name} is {text!r:.80}, not a number of positions", path=path, next_step="correct it")
    return int(text)


def _det_axes(root: ET.Element) -> tuple[Axis, ...]:
    angle = _float(root.findtext("iom_measurements/calibrated_diffraction_angle"))
    if angle is None or not angle > 0:
        return ()
    return tuple(Axis(name=n, scale=angle, offset=-angle * SIDE / 2, unit="rad") for n in IMAGE_AXES)


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _facts(root: ET.Element) -> dict[str, Scalar]:
    facts: dict[str, Scalar] = {}
    measured = {
        "high_tension_v": "iom_measurements/source.get_voltage",
        "camera_length_m": "iom_measurements/optics.get_cameralength",
        "scan_rotation_rad": "iom_measurements/column.get_scanrotation",
        "exposure_ms": "exposure_time",
    }
    for ours, theirs in measured.items():
        value = _float(root.findtext(theirs))
        if value is not None:
            facts[ours] = value
    stamp = root.find("timestamp")
    texts = {
        "date": stamp.get("isoformat") if stamp is not None else None,
        "empad_software": root.findtext("software_version"),
        "full_scan_field_of_view_m": root.findtext("iom_measurements/optics.get_full_scan_field_of_view"),
    }
    facts.update({name: text.strip()[:128] for name, text in texts.items() if text})
    return facts
