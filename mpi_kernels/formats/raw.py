"""Numbers without a header, described by a JSON sidecar."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat, PartOfAnother
from mpi_kernels.formats import nion
from mpi_kernels.formats.access import check_caps, expect_size, json_object, member, sibling, size_of
from mpi_kernels.formats.fortran import WARNING, array_source, refuse_growing
from mpi_kernels.formats.pixels import delivered_dtype, split_shape, stored_dtype
from mpi_kernels.protocols import Source

_KEYS = ("shape", "dtype", "order", "offset", "dimensional_calibrations", "intensity_calibration", "metadata")
_SECTOR = re.compile(r"[1-8]\.bin\Z", re.IGNORECASE)
"""End of the name of a K2 in-situ recording's strip; the .gtg has the rest of it."""


@dataclass(frozen=True, slots=True)
class _Layout:
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int
    suffix: str
    sidecar: str
    extra: dict[str, Any]


class Raw:
    """Raw numbers and a sidecar ``<stem>.json``.

    Layout: ``offset`` bytes that are skipped, then the array.  The sidecar is one JSON object with ``shape`` and
    ``dtype`` (numpy's notation, ``"<u2"``), and optionally ``order`` (``"C"`` or ``"F"``), ``offset`` in bytes,
    and Swift's ``dimensional_calibrations``, ``intensity_calibration`` and ``metadata``.  Source: own definition.

    Complete when the sidecar is there and the size is exactly ``offset`` plus the array's; until then `Incomplete`.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".raw", ".bin", ".dat")

    def probe(self, path: str) -> Header:
        """Read the sidecar and the file's size."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return _open(path, *_probe(path))

    def probe_growing(self, path: str) -> Header:
        """Read the sidecar; the size may still be less."""
        return _probe(path, growing=True)[0]

    def open_growing(self, path: str) -> Source:
        """Open it while it is written, frame after frame."""
        return _open(path, *_probe(path, growing=True))


def _open(path: str, header: Header, layout: _Layout) -> Source:
    return array_source(header, path, layout.offset, layout.dtype, fortran=layout.fortran)


def _probe(path: str, *, growing: bool = False) -> tuple[Header, _Layout]:
    suffix = next((s for s in Raw.suffixes if path.lower().endswith(s)), None)
    if suffix is None:
        raise NotThisFormat(f"raw data end in {', '.join(Raw.suffixes)}", path=path)
    size = size_of(path)
    layout = _layout(path, suffix)
    if growing:
        refuse_growing(path, fortran=layout.fortran)
    kind, scan_shape, det_shape = split_shape(layout.shape, layout.sidecar)
    frames, frame_bytes = math.prod(scan_shape), layout.dtype.itemsize * math.prod(det_shape)
    check_caps(layout.sidecar, frames, frame_bytes)
    expect_size(path, size, layout.offset, frame_bytes, frames, growing=growing)
    described = nion.facts(layout.extra, layout.shape, layout.sidecar)
    header = Header(
        format="raw",
        kind=kind,
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(layout.dtype).name,
        members=(member(path, suffix), member(layout.sidecar, ".json")),
        rule="exact",
        scan_axes=described.scan_axes,
        det_axes=described.det_axes,
        unit=described.unit,
        metadata=described.metadata,
        warnings=(WARNING,) if layout.fortran else (),
    )
    return header, layout


def _layout(path: str, suffix: str) -> _Layout:
    sidecar = sibling(path, ".json")
    if sidecar is None and sibling(path, ".rpl") is not None:
        raise PartOfAnother("it is the data of the .rpl beside it", path=path, next_step="name the .rpl")
    if sidecar is None and _SECTOR.search(path) and os.path.isfile(_SECTOR.sub(".gtg", path)):  # noqa: PTH113
        raise PartOfAnother("it is a sector of the .gtg beside it", path=path, next_step="name the .gtg")
    if sidecar is None:
        raise Incomplete(
            "raw data say nothing about themselves, and no sidecar <stem>.json is there yet",
            path=path,
            next_step='write the sidecar: {"shape": [scan_y, scan_x, det_y, det_x], "dtype": "<u2"}',
        )
    value = json_object(sidecar)
    for key in value:
        if key not in _KEYS:
            raise _wrong(sidecar, f"unknown key {key!r:.80}")
    shape, order, offset = value.get("shape"), value.get("order", "C"), value.get("offset", 0)
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise _wrong(sidecar, f"shape is {shape!r:.80}, not a list of integers")
    if order not in ("C", "F"):
        raise _wrong(sidecar, f'order is {order!r:.80}, neither "C" nor "F"')
    if type(offset) is not int or not 0 <= offset <= 1 << 40:
        raise _wrong(sidecar, f"offset is {offset!r:.80}, not a number of bytes")
    dtype = stored_dtype(value.get("dtype"), sidecar)
    extra = {k: value[k] for k in _KEYS[4:] if k in value}
    return _Layout(tuple(shape), dtype, order == "F", offset, suffix, sidecar, extra)


def _wrong(sidecar: str, message: str) -> FormatError:
    return FormatError(message, path=sidecar, next_step=f"known keys: {', '.join(_KEYS)}")
