"""FEI/Thermo Fisher TIA series, .ser: a table of offsets to images that are stored from the bottom row up."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header, Member
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import (
    check_caps,
    check_table,
    member,
    read_at,
    read_exactly,
    size_of,
    starts_like,
)
from mpi_kernels.formats.pixels import axes, kind_of
from mpi_kernels.formats.plan import LayoutSource, evenly
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

MAGIC = b"II\x97\x01"
IMAGES = 0x4122
"""DataTypeID of two-dimensional elements; 0x4120 are spectra."""

WIDE = 0x0220
"""SeriesVersion from which offsets have eight bytes."""

_TYPES = {1: "|u1", 2: "<u2", 3: "<u4", 4: "|i1", 5: "<i2", 6: "<i4", 7: "<f4", 8: "<f8"}
_ELEMENT = struct.Struct("<ddiddihii")
_NAME = re.compile(r"(?P<stem>.*)(?P<end>_\d+\.ser)", re.IGNORECASE | re.DOTALL)
_TAG_BYTES = {0x4152: 8, 0x4142: 24}
"""Bytes of what stands behind each element: type and time, for 0x4142 and the position."""

TEXT_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class _Series:
    offsets: np.ndarray
    end: int
    """Byte behind the last element's tag."""
    scan_shape: tuple[int, ...]
    calibrations: tuple[tuple[float, float, str], ...]
    """Of the scan's axes."""


class Ser:
    """TIA's .ser series of images, each with a header of 50 bytes.

    Layout, little-endian: byte order, 0x0197, version, type of the elements, type of their tags, elements asked for
    and elements valid (uint32), offset of the table of offsets (4 bytes, 8 from version 0x0220), dimensions.  An
    element is its two calibrations, pixel type, width and height, then its pixels.  Source: C. B. Boothroyd's
    description of the TIA files; rosettasciio's ``tia`` reader (read, not copied) and real files.

    Images are stored from the bottom row up.  Like every reader of this format, emflow turns them: row 0 is the top,
    and the metadata say so.  ``<name>_1.ser`` has a ``<name>.emi`` beside it, which belongs to the acquisition and
    is not needed.

    Complete when as many elements are valid as were asked for, and all lie within the file.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".ser",)

    def probe(self, path: str) -> Header:
        """Read the header, the table of offsets and one element's header."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))


def turn(stored: np.ndarray, out: np.ndarray) -> None:
    """Deliver little-endian frames that are stored from the bottom up: (n, bytes) uint8 into (n, det_y, det_x)."""
    out[...] = stored.view(out.dtype.newbyteorder("<")).reshape(out.shape)[:, ::-1]


def _probe(path: str) -> tuple[Header, Layout]:
    size = size_of(path)
    series = _series(path, size)
    det_shape, dtype, calibrations = _element(path, int(series.offsets[0]))
    payload = np.dtype(dtype).itemsize * det_shape[0] * det_shape[1]
    frames = len(series.offsets)
    check_caps(path, frames, payload)
    late = np.flatnonzero(series.offsets + (_ELEMENT.size + payload) > size)
    if late.size:
        raise Incomplete(
            f"{late[0]} of {frames} frames are there ({size} bytes)", path=path, frame=int(late[0]), next_step="wait"
        )
    if series.end > size:
        raise Incomplete("the last frame's tag is not whole", path=path, frame=frames - 1, next_step="wait")
    layout = Layout(
        files=(path,),
        dtype=dtype,
        payload=payload,
        lead=_ELEMENT.size,
        offsets=series.offsets,
        decode="mpi_kernels.formats.ser:turn",
    )
    scan_axes, det_axes = _axes(series, calibrations)
    header = Header(
        format="ser",
        kind=kind_of(series.scan_shape),
        scan_shape=series.scan_shape,
        det_shape=det_shape,
        dtype=np.dtype(dtype).newbyteorder("=").name,
        members=_members(path),
        rule="exact",
        scan_axes=scan_axes,
        det_axes=det_axes,
        metadata={"orientation": "turned: the file begins with the bottom row"},
    )
    return header, evenly(layout)


def _members(path: str) -> tuple[Member, ...]:
    found = _NAME.fullmatch(path)
    if found is None:
        return (member(path, ".ser"),)
    emi = next((p for e in (".emi", ".EMI") if os.path.isfile(p := found["stem"] + e)), None)  # noqa: PTH113
    return (member(path, found["end"].lower()), *([member(emi, ".emi")] if emi else []))


def _series(path: str, size: int) -> _Series:
    head = read_at(path, 0, 34)
    starts_like(head[:4], MAGIC, path, "TIA series")
    head = read_exactly(path, 0, 34, "its header")
    version, kind, tags, asked, valid = struct.unpack_from("<HIIII", head, 4)
    if kind != IMAGES:
        raise FormatError(
            f"its elements are of type {kind:#x}, not images", path=path, next_step="spectra are not read"
        )
    wide = version >= WIDE
    table, dimensions = struct.unpack_from("<QI" if wide else "<II", head, 22)
    check_caps(path, max(1, asked), 1)
    check_table(path, asked)
    if valid < asked or not asked:
        raise Incomplete(
            f"{valid} of {asked} frames are valid", path=path, frame=min(valid, asked), next_step="wait until TIA ends"
        )
    if valid > asked or dimensions > 8:
        raise FormatError(
            f"{valid} of {asked} frames are valid, in {dimensions} dimensions", path=path, next_step="copy it again"
        )
    width = 8 if wide else 4
    if table + 2 * width * asked > size:
        raise Incomplete(f"its table of offsets ends after byte {size}", path=path, frame=0, next_step="wait")
    tables = np.frombuffer(read_exactly(path, table, 2 * width * asked, "its offsets"), f"<u{width}")
    offsets = np.minimum(tables[:asked].astype(np.uint64), 1 << 62).astype(np.int64)
    end = int(tables[-1]) + _TAG_BYTES.get(tags, 0)
    if (offsets < 34).any():
        bad = int(np.argmax(offsets < 34))
        raise Incomplete(f"frame {bad} has no place in the file yet", path=path, frame=bad, next_step="wait")
    shape, calibrations = _dimensions(path, 34 if wide else 30, dimensions)
    if len(shape) == 2 and shape[0] * shape[1] == asked:
        return _Series(offsets, end, shape, calibrations)
    return _Series(offsets, end, (asked,), calibrations if shape == (asked,) else ())


def _dimensions(path: str, at: int, count: int) -> tuple[tuple[int, ...], tuple[tuple[float, float, str], ...]]:
    """Sizes and calibrations of the scan's axes that are longer than 1, slowest first; the file has x first."""
    sizes, calibrations = [], []
    for _ in range(count):
        n, origin, delta, element, text = struct.unpack("<IddII", read_exactly(path, at, 28, "its dimensions"))
        unit_at = at + 28 + min(text, TEXT_LIMIT)
        (length,) = struct.unpack("<I", read_exactly(path, unit_at, 4, "its dimensions"))
        unit = read_at(path, unit_at + 4, min(length, 64)).decode("latin-1")
        at = unit_at + 4 + min(length, TEXT_LIMIT)
        if n > 1 or count == 1:
            sizes.append(n)
            calibrations.append((delta, origin - element * delta, unit))
    return tuple(sizes[::-1]), tuple(calibrations[::-1])


def _element(path: str, at: int) -> tuple[tuple[int, int], str, tuple[tuple[float, float, str], ...]]:
    origin_x, delta_x, at_x, origin_y, delta_y, at_y, code, columns, rows = _ELEMENT.unpack(
        read_exactly(path, at, _ELEMENT.size, "the first frame's header")
    )
    if code not in _TYPES or min(rows, columns) < 1:
        raise FormatError(
            f"its frames are {rows} x {columns} pixels of type {code}",
            path=path,
            next_step="known are types 1 to 8; complex numbers are not read",
        )
    return (
        (rows, columns),
        _TYPES[code],
        ((delta_y, origin_y - at_y * delta_y, "m"), (delta_x, origin_x - at_x * delta_x, "m")),
    )


def _axes(
    series: _Series, calibrations: tuple[tuple[float, float, str], ...]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The scan's axes with the file's own words; the detector's stay in pixels, since m or 1/m is not said here."""
    scan = series.calibrations or ((1.0, 0.0, "px"),) * len(series.scan_shape)
    made, _ = axes(series.scan_shape, [*((d, o, _unit(u)) for d, o, u in scan), *calibrations])
    return (made if series.calibrations else ()), ()


def _unit(text: str) -> str:
    return {"meters": "m", "Number": "px"}.get(text.strip("\0 "), text.strip("\0 "))
