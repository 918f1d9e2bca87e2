"""MRC stacks, .mrc and .mrcs; with the files of a Direct Electron camera beside them, scans."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats import direct_electron
from mpi_kernels.formats.access import check_caps, expect_size, member, read_at, size_of
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

HEADER_BYTES = 1024
EXTENDED_LIMIT = 1 << 30
_STAMPS = {b"DD": "<", b"DA": "<", b"\x11\x11": ">", b"\0\0": "<"}
_MODES = {1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_IMOD, _IMOD_SIGNED = 1146047817, 1
ANGSTROM_NM = 0.1


@dataclass(frozen=True, slots=True)
class _Header:
    start: int
    det_shape: tuple[int, int]
    frames: int
    stored: np.dtype
    pixel_nm: tuple[float, float]
    warnings: tuple[str, ...]


class Mrc:
    """MRC2014 image stacks.

    Layout: 1024 bytes, of which NX, NY, NZ, MODE (int32, either order by the machine stamp at byte 212), the cell
    and its sampling give size and scale, and NSYMBT (byte 92) the length of an extended header; then NZ sections of
    NY x NX pixels.  Mode 1 is int16, 2 float32, 6 uint16, 12 float16; mode 0 is int8 by MRC2014 and uint8 by Direct
    Electron and by IMOD where its stamp says so.  Complex and packed modes are refused.  Source: Cheng et al. 2015,
    doi:10.1016/j.jsb.2015.04.002; IMOD's stamp: its mrc_format page.

    ``<stem>_movie.mrc`` is a Direct Electron movie, whose ``<stem>_info.txt`` must be there (`direct_electron`).

    Complete when the size is exactly that of the header.  Frames are delivered as the file has them: by MRC's own
    convention row 0 is the bottom, which most readers ignore.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".mrc", ".mrcs")

    def probe(self, path: str) -> Header:
        """Read the header, the file's size, and what a Direct Electron camera writes beside it."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Layout]:
    size = size_of(path)
    movie = direct_electron.is_movie(path)
    found = _header(path, movie)
    payload = found.stored.itemsize * found.det_shape[0] * found.det_shape[1]
    check_caps(path, found.frames, payload)
    expect_size(path, size, found.start, payload, found.frames)
    scan_shape: tuple[int, ...] = (found.frames,)
    scan = direct_electron.scan(path, found.frames) if movie else None
    if scan is not None:
        scan_shape = scan.scan_shape
    suffix = direct_electron.MOVIE if movie else ".mrcs" if path.lower().endswith(".mrcs") else ".mrc"
    header = Header(
        format="mrc",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=found.det_shape,
        dtype=delivered_dtype(found.stored).name,
        members=(member(path, suffix), *(scan.members if scan else ())),
        rule="exact",
        scan_axes=scan.scan_axes if scan else (),
        det_axes=scan.det_axes if scan else _det_axes(scan_shape, found.pixel_nm),
        metadata={"orientation": "file order", **(scan.metadata if scan else {})},
        warnings=found.warnings + (scan.warnings if scan else ()),
    )
    return header, Layout(files=(path,), dtype=found.stored.str, payload=payload, first=found.start)


def _header(path: str, movie: bool) -> _Header:
    head = read_at(path, 0, HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        if not path.lower().endswith(Mrc.suffixes):
            raise NotThisFormat("it is too short for an MRC header", path=path)
        raise Incomplete(f"{len(head)} of {HEADER_BYTES} bytes of its header are there", path=path, next_step="wait")
    order = _STAMPS.get(head[212:214])
    if order is None or head[208:212] not in (b"MAP ", b"MAP\0", b"\0\0\0\0"):
        raise NotThisFormat("it has neither MRC's mark nor its machine stamp", path=path)
    columns, rows, sections, mode = struct.unpack_from(order + "4i", head)
    mx, my = struct.unpack_from(order + "2i", head, 28)
    cell_x, cell_y = struct.unpack_from(order + "2f", head, 40)
    (extended,) = struct.unpack_from(order + "i", head, 92)
    if min(columns, rows, sections) < 1 or not 0 <= extended <= EXTENDED_LIMIT or max(rows, columns) > 1 << 20:
        if head[208:211] != b"MAP":
            raise NotThisFormat(f"{sections} sections of {rows} x {columns}: no MRC file", path=path)
        raise FormatError(
            f"its header claims {sections} sections of {rows} x {columns} behind {extended} bytes",
            path=path,
            next_step="copy the file again from the microscope",
        )
    code, warnings = _pixels(path, head, order, mode, movie)
    pixel = tuple(c / m * ANGSTROM_NM if m > 0 and c > 0 else 0.0 for c, m in ((cell_y, my), (cell_x, mx)))
    return _Header(
        HEADER_BYTES + extended, (rows, columns), sections, np.dtype(order + code), (pixel[0], pixel[1]), warnings
    )


def _pixels(path: str, head: bytes, order: str, mode: int, movie: bool) -> tuple[str, tuple[str, ...]]:
    if mode in _MODES:
        return _MODES[mode], ()
    if mode != 0:
        raise FormatError(
            f"MRC mode {mode} is not read: complex and packed pixels are no counts",
            path=path,
            next_step="save it with mode 1 (int16), 2 (float32), 6 (uint16) or 12 (float16)",
        )
    if movie:
        return "u1", ()
    stamp, flags = struct.unpack_from(order + "2i", head, 152)
    if stamp == _IMOD:
        return ("i1" if flags & _IMOD_SIGNED else "u1"), ()
    return "i1", ("mode 0 is taken as int8, as MRC2014 says; some older programs mean uint8",)


def _det_axes(scan_shape: tuple[int, ...], pixel_nm: tuple[float, float]) -> tuple[Axis, ...]:
    if min(pixel_nm) <= 0:
        return ()
    return axes(scan_shape, [(1.0, 0.0, "px"), *((p, 0.0, "nm") for p in pixel_nm)])[1]
