"""NumPy's .npy: one array, C or Fortran order, either byte order; with a Nion-style .json beside it, calibrated."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats import nion
from mpi_kernels.formats.access import (
    check_caps,
    expect_size,
    json_object,
    member,
    read_at,
    sibling,
    size_of,
    starts_like,
)
from mpi_kernels.formats.fortran import WARNING, array_source, refuse_growing
from mpi_kernels.formats.pixels import delivered_dtype, split_shape, stored_dtype
from mpi_kernels.protocols import Source

MAGIC = b"\x93NUMPY"

HEADER_LIMIT = 1 << 16
"""NumPy itself refuses longer headers than 10,000 bytes unless told (``max_header_size``)."""


@dataclass(frozen=True, slots=True)
class Array:
    """What the header of an array says; ``start`` is the byte of its first number in the file."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


class Npy:
    r"""NumPy's array file.

    Layout: ``\x93NUMPY``, version (1.0, 2.0 or 3.0), header length (2 bytes little-endian, 4 from version 2.0),
    a Python dictionary ``descr, fortran_order, shape``, then the array.  Source: numpy.lib.format.

    Two axes are an image, three a stack, four a scan.  A sidecar ``<stem>.json`` with Swift's keys adds calibrations;
    its absence is no fault, so it must be there before the array is whole to be part of the acquisition.

    Complete when the size is exactly that of the header.  Fewer bytes are `Incomplete`; more are a `FormatError`
    (several arrays in one file, or a longer file overwritten by a shorter one: which frames are meant is unknown).
    Objects are refused and nothing is ever unpickled.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".npy",)

    def probe(self, path: str) -> Header:
        """Read the array's header and the sidecar; nothing else."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return _open(path, *_probe(path))

    def probe_growing(self, path: str) -> Header:
        """Read the array's header; the size may still be less."""
        return _probe(path, growing=True)[0]

    def open_growing(self, path: str) -> Source:
        """Open it while it is written, frame after frame."""
        return _open(path, *_probe(path, growing=True))


def _open(path: str, header: Header, array: Array) -> Source:
    return array_source(header, path, array.start, array.dtype, fortran=array.fortran)


def _probe(path: str, *, growing: bool = False) -> tuple[Header, Array]:
    size = size_of(path)
    array = read_header(path)
    if growing:
        refuse_growing(path, fortran=array.fortran)
    kind, scan_shape, det_shape = split_shape(array.shape, path)
    frames = int(np.prod(scan_shape, dtype=object)) if scan_shape else 1
    frame_bytes = array.dtype.itemsize * det_shape[0] * det_shape[1]
    check_caps(path, frames, frame_bytes)
    expect_size(path, size, array.start, frame_bytes, frames, growing=growing)
    members = [member(path, ".npy")]
    described = nion.Facts(metadata={})
    beside = sibling(path, ".json")
    if beside is not None:
        described = nion.facts(json_object(beside), array.shape, beside)
        members.append(member(beside, ".json"))
    header = Header(
        format="npy",
        kind=kind,
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(array.dtype).name,
        members=tuple(members),
        rule="exact",
        scan_axes=described.scan_axes,
        det_axes=described.det_axes,
        unit=described.unit,
        metadata=described.metadata,
        warnings=described.warnings + ((WARNING,) if array.fortran else ()),
    )
    return header, array


def read_header(path: str, at: int = 0) -> Array:
    """Read the header of the array that begins at byte ``at`` of a file; raises what ``probe`` raises."""
    head = read_at(path, at, 12)
    starts_like(head, MAGIC, path, "NumPy")
    if len(head) < 12:
        raise Incomplete(f"only {len(head)} bytes of its header are there", path=path, next_step="wait")
    if (head[6], head[7]) not in ((1, 0), (2, 0), (3, 0)):
        raise FormatError(
            f"NumPy format version {head[6]}.{head[7]} is not known", path=path, next_step="save it with numpy.save"
        )
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(head[8 : 8 + width], "little")
    if length > HEADER_LIMIT:
        raise FormatError(f"its header claims {length} bytes", path=path, next_step="save it with numpy.save")
    text = read_at(path, at + 8 + width, length)
    if len(text) < length:
        raise Incomplete(f"{len(text)} of {length} bytes of its header are there", path=path, next_step="wait")
    return _described(path, at + 8 + width + length, text.decode("utf-8" if head[6] == 3 else "latin-1", "replace"))


def _described(path: str, start: int, text: str) -> Array:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise FormatError("its header is no dictionary", path=path, next_step="save it with numpy.save") from error
    if not isinstance(value, dict) or set(value) != {"descr", "fortran_order", "shape"}:
        raise FormatError("its header lacks descr, fortran_order or shape", path=path, next_step="save it anew")
    shape, fortran = value["shape"], value["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape) or type(fortran) is not bool:
        raise FormatError(f"its header has shape {shape!r:.80}", path=path, next_step="save it with numpy.save")
    return Array(start, shape, stored_dtype(value["descr"], path), fortran)
