"""NORDIF's Pattern.dat: frames of bytes without a header, described by Setting.txt."""

from __future__ import annotations

import math
import os
import re
from typing import ClassVar

from mpi_kernels.contract import Axis, Header, Scalar
from mpi_kernels.errors import FormatError, NotThisFormat
from mpi_kernels.formats.access import check_caps, expect_size, member, read_sidecar, sibling, size_of
from mpi_kernels.formats.pixels import SCAN_AXES
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

SETTING = "Setting.txt"
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_NAMES = {"high_tension_kv": "Accelerating voltage", "magnification": "Magnification", "tilt_deg": "Tilt angle"}


class Nordif:
    """NORDIF EBSD patterns.

    Layout: uint8 frames one after the other.  ``Setting.txt`` in the same folder (or ``<stem>.txt``) has lines
    ``name<tab>value<tab>unit`` in sections: ``Resolution`` of "Acquisition settings" is the frame as WIDTHxHEIGHT,
    ``Number of samples`` of "Area" the scan, ``Step size`` its pixel.  Source: kikuchipy's ``nordif`` reader (read,
    not copied) and real files.

    Complete when the size is exactly that of the scan's frames.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".dat",)

    def probe(self, path: str) -> Header:
        """Read the settings and the file's size."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Layout]:
    if not path.lower().endswith(".dat"):
        raise NotThisFormat("NORDIF patterns end in .dat", path=path)
    size = size_of(path)
    beside = _beside(path)
    if beside is None:
        raise NotThisFormat(f"no {SETTING} of NORDIF is beside it", path=path)
    sections = _sections(beside)
    width, height = _pair(sections, "Acquisition settings", "Resolution", beside)
    columns, rows = _pair(sections, "Area", "Number of samples", beside)
    check_caps(beside, rows * columns, width * height)
    expect_size(path, size, 0, width * height, rows * columns)
    header = Header(
        format="nordif",
        kind="4d",
        scan_shape=(rows, columns),
        det_shape=(height, width),
        dtype="uint8",
        members=(member(path, ".dat"), member(beside, ".txt")),
        rule="exact",
        scan_axes=_scan_axes(sections),
        metadata=_facts(sections),
    )
    return header, Layout(files=(path,), dtype="|u1", payload=width * height)


def _beside(path: str) -> str | None:
    """The settings: of the same stem, else the folder's; another program's text is none."""
    for candidate in (sibling(path, ".txt"), os.path.join(os.path.dirname(path), SETTING)):  # noqa: PTH118, PTH120
        if candidate and os.path.isfile(candidate) and read_sidecar(candidate).startswith(b"[NORDIF]"):  # noqa: PTH113
            return candidate
    return None


def _sections(path: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(section, name): (value, unit)."""
    found, section = {}, ""
    for line in read_sidecar(path).decode("latin-1").splitlines():
        name, value, unit, *_ = [*line.split("\t"), "", ""]
        if name.startswith("["):
            section = name.strip().strip("[]")
        elif value:
            found[section, name.strip()] = (value.strip(), unit.strip())
    return found


def _pair(sections: dict[tuple[str, str], tuple[str, str]], section: str, name: str, path: str) -> tuple[int, int]:
    text = sections.get((section, name), ("", ""))[0]
    match = _SIZE.fullmatch(text)
    if match is None:
        raise FormatError(
            f"{name!r} of {section!r} is {text!r:.80}, not two numbers",
            path=path,
            next_step="copy it again from the microscope",
        )
    return int(match[1]), int(match[2])


def _scan_axes(sections: dict[tuple[str, str], tuple[str, str]]) -> tuple[Axis, ...]:
    text, unit = sections.get(("Area", "Step size"), ("", ""))
    step = _number(text)
    if step is None or step <= 0:
        return ()
    unit = "um" if unit.endswith("m") and len(unit) == 2 and ord(unit[0]) > 127 else unit
    return tuple(Axis(name=n, scale=step, unit=unit or "px") for n in SCAN_AXES)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _facts(sections: dict[tuple[str, str], tuple[str, str]]) -> dict[str, Scalar]:
    named = {ours: sections.get(("Microscope", theirs), ("", ""))[0] for ours, theirs in _NAMES.items()}
    return {ours: value for ours, text in named.items() if (value := _number(text)) is not None}
