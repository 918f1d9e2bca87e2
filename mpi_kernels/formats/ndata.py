"""Nion Swift's .ndata1: a ZIP file whose members are stored as they are, ``data.npy`` and ``metadata.json``."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats import nion
from mpi_kernels.formats.access import (
    SIDECAR_LIMIT,
    check_caps,
    member,
    read_at,
    read_exactly,
    size_of,
    starts_like,
)
from mpi_kernels.formats.fortran import WARNING, array_source
from mpi_kernels.formats.npy import Array, read_header
from mpi_kernels.formats.pixels import delivered_dtype, split_shape
from mpi_kernels.protocols import Source

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
MAX_MEMBERS = 16
UNKNOWN = 0xFFFFFFFF
"""A size that stands in the ZIP64 extra field instead."""

_LOCAL = struct.Struct("<4xHHHIIIIHH")
_END = struct.Struct("<4s4xHHIIH")


@dataclass(frozen=True, slots=True)
class _Member:
    start: int
    size: int


class Ndata:
    """Swift's .ndata1.

    Layout: ZIP members follow one another, each behind its own local header; ``data.npy`` is NumPy's format and
    ``metadata.json`` has Swift's properties.  Offsets come from the local headers, one after the other, and the
    directory at the end must agree: a member that only one of the two knows is a file that was changed half.
    Compressed or encrypted members are refused; ZIP64 is read.  Source: PKWARE APPNOTE 6.3.10; nionswift
    ``nion/swift/model/NDataHandler.py`` (read, not copied).

    Complete when ZIP's end record is the end of the file.  Swift sets the file's date to that of the data.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".ndata1", ".ndata")

    def probe(self, path: str) -> Header:
        """Read ZIP's headers, the array's header and the properties."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        header, array = _probe(path)
        return array_source(header, path, array.start, array.dtype, fortran=array.fortran)


def _probe(path: str) -> tuple[Header, Array]:
    size = size_of(path)
    starts_like(read_at(path, 0, 4), LOCAL, path, "ZIP")
    members = _members(path, size)
    data = members.get("data.npy")
    if data is None:
        raise FormatError("no data.npy is in it", path=path, next_step="name a data item that holds frames")
    array = read_header(path, data.start)
    kind, scan_shape, det_shape = split_shape(array.shape, path)
    frames, frame_bytes = math.prod(scan_shape), array.dtype.itemsize * math.prod(det_shape)
    check_caps(path, frames, frame_bytes)
    if array.start + frames * frame_bytes != data.start + data.size:
        raise FormatError(
            f"data.npy has {data.size} bytes, its header needs {array.start - data.start + frames * frame_bytes}",
            path=path,
            next_step="export the data item again",
        )
    described = nion.facts(_properties(path, members), array.shape, path)
    header = Header(
        format="ndata",
        kind=kind,
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(array.dtype).name,
        members=(member(path, ".ndata" if path.lower().endswith(".ndata") else ".ndata1"),),
        rule="exact",
        scan_axes=described.scan_axes,
        det_axes=described.det_axes,
        unit=described.unit,
        metadata=described.metadata,
        warnings=described.warnings + ((WARNING,) if array.fortran else ()),
    )
    return header, array


def _members(path: str, size: int) -> dict[str, _Member]:
    """Members by name, from their local headers; the directory behind them must be whole and agree."""
    found: dict[str, _Member] = {}
    at = 0
    while (mark := read_exactly(path, at, 4, "ZIP's headers")) == LOCAL:
        name, one = _local(path, at)
        if one.start + one.size > size:
            raise _cut(path, name, one, size)
        if name in found or len(found) >= MAX_MEMBERS:
            raise FormatError(f"{name!r:.80} is in it twice, or too much", path=path, next_step="export it again")
        found[name] = one
        at = one.start + one.size
    if mark not in (CENTRAL, END):
        raise FormatError(f"ZIP has {mark!r} at byte {at}", path=path, next_step="export the data item again")
    end = read_at(path, max(at, size - _END.size), _END.size)
    if len(end) < _END.size or not end.startswith(END):
        raise Incomplete("ZIP's end record is not at its end", path=path, next_step="wait for Swift")
    _, here, count, _, directory, comment = _END.unpack(end)
    narrow = directory != UNKNOWN
    if comment or here != count or count != len(found) or (narrow and directory != at):
        raise FormatError(
            f"ZIP's directory tells of {count} members before byte {directory}, there are {len(found)} before {at}",
            path=path,
            next_step="export the data item again",
        )
    return found


def _local(path: str, at: int) -> tuple[str, _Member]:
    head = read_exactly(path, at, _LOCAL.size, "ZIP's headers")
    _, flags, method, _, _, packed, size, name_bytes, extra_bytes = _LOCAL.unpack(head)
    text = read_exactly(path, at + _LOCAL.size, name_bytes + extra_bytes, "ZIP's headers")
    name, extra = text[:name_bytes].decode("utf-8", "replace"), text[name_bytes:]
    if method or flags & 0b1001:
        raise FormatError(
            f"member {name!r:.80} is compressed, encrypted or of unknown size (method {method}, flags {flags:#x})",
            path=path,
            next_step="export it from Swift, which stores members as they are",
        )
    if UNKNOWN in (packed, size):
        packed, size = _zip64(extra, packed, size, path)
    if packed != size:
        raise FormatError(
            f"member {name!r:.80} has two sizes, {packed} and {size}", path=path, next_step="copy it again"
        )
    return name, _Member(at + _LOCAL.size + name_bytes + extra_bytes, size)


def _zip64(extra: bytes, packed: int, size: int, path: str) -> tuple[int, int]:
    """The sizes that stand in the extra field 1, size before packed size, each only if it is needed."""
    while len(extra) >= 4:
        tag, count = struct.unpack_from("<HH", extra)
        values = extra[4 : 4 + count]
        needed = 8 * ((size == UNKNOWN) + (packed == UNKNOWN))
        if tag == 1 and len(values) >= needed:
            numbers = list(struct.unpack_from(f"<{needed // 8}Q", values))
            size = numbers.pop(0) if size == UNKNOWN else size
            return (numbers.pop(0) if packed == UNKNOWN else packed), size
        extra = extra[4 + count :]
    raise FormatError("a member's size is missing from its ZIP64 field", path=path, next_step="copy it again")


def _cut(path: str, name: str, one: _Member, size: int) -> Incomplete | FormatError:
    """The error for a member that ends behind the end of the file, with the frame where it can be told."""
    frame = None
    if name == "data.npy" and size > one.start:
        array = read_header(path, one.start)
        if not array.fortran:
            _, _, det_shape = split_shape(array.shape, path)
            frame = max(0, size - array.start) // (array.dtype.itemsize * math.prod(det_shape))
    told = f"{size} of {one.start + one.size} bytes are there"
    return Incomplete(told, path=path, frame=frame, next_step="wait for Swift, or copy the file again")


def _properties(path: str, members: dict[str, _Member]) -> dict[str, Any]:
    one = members.get("metadata.json")
    if one is None:
        return {}
    if one.size > SIDECAR_LIMIT:
        raise FormatError(f"its metadata.json has {one.size} bytes", path=path, next_step="export the data item again")
    try:
        value = json.loads(read_exactly(path, one.start, one.size, "metadata.json"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its metadata.json is no JSON: {error}", path=path, next_step="export it again") from error
    return value if isinstance(value, dict) else {}
