"""NanoMEGAS ASTAR block files, .blo: frames of bytes, each behind six bytes of its own."""

from __future__ import annotations

import math
import struct
from typing import ClassVar

from mpi_kernels.contract import Axis, Header, Scalar
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import check_caps, expect_size, member, read_at, size_of, starts_like
from mpi_kernels.formats.pixels import axes
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

MAGIC = b"IMGBLO\x02\x01"
FRAME_MAGIC = b"\xaa\x55"
LEAD = 6
"""Bytes before each frame: `FRAME_MAGIC` and the frame's number."""

_HEADER = struct.Struct("<8xIIIHHHHHddIHId")


class Blockfile:
    """The .blo of ASTAR and Topspin (precession diffraction).

    Layout, little-endian: ``IMGBLO``, 0x0102, offsets of a virtual image and of the frames (uint32), a word of flags,
    the side of the square frames (uint16), their rotation, NX and NY of the scan (uint16), its rotation, the scan's
    pixel in nm (two float64), voltage in V (uint32), 100 x detector pixels per cm (uint16), camera length in 0.1 mm
    (uint32), date.  Each frame is ``AA 55``, its number (uint32) and its uint8 pixels.  Source: rosettasciio's
    ``blockfile`` reader (read, not copied) and real files.

    Complete when the size is exactly that of NX x NY frames.  A frame whose mark is missing was never written.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".blo",)

    def probe(self, path: str) -> Header:
        """Read the header and the file's size."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Layout]:
    size = size_of(path)
    head = read_at(path, 0, _HEADER.size)
    starts_like(head[: len(MAGIC)], MAGIC, path, "block")
    if len(head) < _HEADER.size:
        raise Incomplete(f"only {len(head)} bytes of its header are there", path=path, next_step="wait")
    (_, first, _, side, _, columns, rows, rotation, step_x, step_y, volts, per_cm, length, _) = _HEADER.unpack(head)
    check_caps(path, rows * columns, side * side)
    if first < _HEADER.size:
        raise FormatError(f"its frames begin inside its header, at byte {first}", path=path, next_step="copy it again")
    layout = Layout(files=(path,), dtype="|u1", payload=side * side, first=first, lead=LEAD, magic=FRAME_MAGIC)
    expect_size(path, size, first, layout.record, rows * columns)
    scan_axes, det_axes = _axes((rows, columns), step_y, step_x, per_cm)
    header = Header(
        format="blo",
        kind="4d",
        scan_shape=(rows, columns),
        det_shape=(side, side),
        dtype="uint8",
        members=(member(path, ".blo"),),
        rule="exact",
        scan_axes=scan_axes,
        det_axes=det_axes,
        metadata=_facts(volts, length, rotation),
    )
    return header, layout


def _axes(
    scan_shape: tuple[int, int], step_y: float, step_x: float, per_cm: int
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    if not (math.isfinite(step_x) and math.isfinite(step_y) and step_x > 0 and step_y > 0 and per_cm > 0):
        return (), ()
    pixel_cm = 100 / per_cm
    return axes(scan_shape, [(step_y, 0.0, "nm"), (step_x, 0.0, "nm"), (pixel_cm, 0.0, "cm"), (pixel_cm, 0.0, "cm")])


def _facts(volts: int, length: int, rotation: int) -> dict[str, Scalar]:
    return {"high_tension_v": volts, "camera_length_m": length * 1e-4, "scan_rotation_deg": rotation / 100}
