"""Norpix StreamPix sequences, .seq: frames with a time stamp and padding behind each."""

from __future__ import annotations

import os
import struct
from typing import ClassVar

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import check_caps, expect_size, member, read_at, read_exactly, size_of, starts_like
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

MAGIC = b"\xed\xfe\0\0"
HEADER_BYTES = 624
_SIZES = struct.Struct("<9Id")
_AT, _VERSION_AT, _COMPRESSION_AT = 548, 28, 620
FIRST_OLD, FIRST_NEW, NEW = 1024, 8192, 5
"""Byte of the first frame before version 5 of the format, and since."""

MAX_TAIL = 1 << 20
_UNCHECKED = "no real .seq file was compared yet"


class Seq:
    """StreamPix .seq of grey pixels.

    Layout, little-endian: a header of 1024 bytes, 8192 from version 5; at byte 548 width, height, bits of a pixel,
    used bits, bytes of an image, its format, frames, origin, and bytes from one frame to the next (uint32), then the
    frame rate (float64).  A frame is its pixels, a time stamp and padding.  Source: the header as PIMS' and LiberTEM's
    readers have it (read, not copied).

    Complete when the size is that of the header's frames; without such a number (0, while it is recorded) the size
    says how many there are, and a started frame must be finished.  It is a stack.  Dark and gain references beside
    the file (``.seq.dark.mrc``, ``.seq.gain.mrc``) are not applied, and a warning says so.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".seq",)

    def probe(self, path: str) -> Header:
        """Read the header and the file's size."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Layout]:
    size = size_of(path)
    starts_like(read_at(path, 0, len(MAGIC)), MAGIC, path, "StreamPix")
    head = read_exactly(path, 0, HEADER_BYTES, "its header")
    width, height, bits, used, image, _, announced, _, step, rate = _SIZES.unpack_from(head, _AT)
    (version,) = struct.unpack_from("<i", head, _VERSION_AT)
    (compression,) = struct.unpack_from("<I", head, _COMPRESSION_AT)
    payload = width * height * bits // 8
    if bits not in (8, 16, 32) or compression or image != payload or not payload <= step <= payload + MAX_TAIL:
        raise FormatError(
            f"{width} x {height} pixels of {bits} bits in {image} of {step} bytes, compression {compression}",
            path=path,
            next_step="grey pixels of 8, 16 or 32 bits without compression are read",
        )
    first = FIRST_NEW if version >= NEW else FIRST_OLD
    if size < first:
        raise Incomplete(f"{size} of {first} bytes of its header are there", path=path, frame=0, next_step="wait")
    frames = announced or max(1, -(-(size - first) // step))
    check_caps(path, frames, payload)
    expect_size(path, size, first, step, frames)
    facts: dict[str, Scalar] = {"bits_used": used, "streampix_version": version}
    header = Header(
        format="seq",
        kind="stack",
        scan_shape=(frames,),
        det_shape=(height, width),
        dtype=f"uint{bits}",
        members=(member(path, ".seq"),),
        rule="exact" if announced else "stability",
        metadata=facts | ({"frames_per_second": rate} if 0 < rate < 1e9 else {}),
        warnings=(_UNCHECKED, *_references(path)),
    )
    dtype = "|u1" if bits == 8 else f"<u{bits // 8}"
    return header, Layout(files=(path,), dtype=dtype, payload=payload, first=first, tail=step - payload)


def _references(path: str) -> tuple[str, ...]:
    found = [s for s in (".dark.mrc", ".gain.mrc") if os.path.isfile(path + s)]  # noqa: PTH113
    return (f"references beside it are not applied: {', '.join(found)}",) if found else ()
