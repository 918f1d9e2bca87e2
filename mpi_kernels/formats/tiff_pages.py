"""The pages of a TIFF or BigTIFF file: a walk along its directories with limits, and what each says of its pixels."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats.access import os_errors

MAX_PAGES = 1 << 21
MAX_TAGS = 4096
MAX_STRIPS = 1 << 16
TEXT_LIMIT = 1 << 16
FARTHEST = 1 << 62
"""Behind the end of every file."""

WINDOW = 1 << 16
"""Bytes read at once: directories are small and often lie close together."""

_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
SUBFILE, WIDTH, LENGTH, BITS, COMPRESSION = 254, 256, 257, 258, 259
DESCRIPTION, STRIPS, SAMPLES, COUNTS, TILES, SAMPLE_FORMAT = 270, 273, 277, 279, 322, 339
_WANTED = (SUBFILE, WIDTH, LENGTH, BITS, COMPRESSION, DESCRIPTION, STRIPS, SAMPLES, COUNTS, TILES, SAMPLE_FORMAT)
_KINDS = {1: "u", 2: "i", 3: "f"}


@dataclass(frozen=True, slots=True)
class Page:
    """One image: (rows, columns) of pixels that lie in one piece at ``offset``; only the first is described."""

    shape: tuple[int, int]
    dtype: str
    offset: int
    description: str

    @property
    def size(self) -> int:
        """Bytes of the pixels."""
        return self.shape[0] * self.shape[1] * int(self.dtype[2:])


class PackedError(NotThisFormat):
    """A TIFF file whose pixels do not lie in one piece as they are."""


class _File:
    """Reads small pieces of one file through a window; a piece behind the end is `Incomplete`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.page = 0
        with os_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._start, self._data = 0, b""

    def at(self, offset: int, count: int) -> bytes:
        if not self._start <= offset <= offset + count <= self._start + len(self._data):
            with os_errors(self.path):
                self._data = os.pread(self._fd, max(count, WINDOW), min(offset, FARTHEST))
            self._start = offset
        piece = self._data[offset - self._start : offset - self._start + count]
        if len(piece) < count:
            raise Incomplete(
                f"the directory of page {self.page} lies behind its end, at byte {offset}",
                path=self.path,
                frame=self.page,
                next_step="wait for the writer, or copy the file again",
            )
        return piece

    def close(self) -> None:
        os.close(self._fd)


def pages(path: str) -> Iterator[Page]:
    """Every page that is not a smaller copy of another.

    Raises
    ------
    NotThisFormat
        No TIFF.
    PackedError
        Compressed, in tiles, several samples, odd bits, strips that do not follow one another.
    Incomplete
        A directory lies behind the end of the file; names the page.
    FormatError
        Directories in a circle, or more of them than there can be.
    """
    file = _File(path)
    try:
        order, big, at = _begin(file)
        seen: set[int] = set()
        while at:
            if at in seen or len(seen) >= MAX_PAGES:
                raise FormatError("its directories have no end", path=path, next_step="copy it again")
            seen.add(at)
            tags, at = _directory(file, order, big, at)
            if not int(tags.get(SUBFILE, (0,))[0]) & 1:
                yield _page(path, order, tags, described=file.page == 0)
                file.page += 1
    finally:
        file.close()


def _begin(file: _File) -> tuple[str, bool, int]:
    """Byte order, whether it is BigTIFF, and where the first directory is."""
    head = file.at(0, 4)
    orders = {b"II*\0": ("<", False), b"II+\0": ("<", True), b"MM\0*": (">", False), b"MM\0+": (">", True)}
    if head not in orders:
        raise NotThisFormat("not a TIFF file: it starts with neither II nor MM", path=file.path)
    order, big = orders[head]
    if not big:
        return order, False, struct.unpack(order + "I", file.at(4, 4))[0]
    size, zero, first = struct.unpack(order + "HHQ", file.at(4, 12))
    if (size, zero) != (8, 0):
        raise FormatError(f"a BigTIFF with offsets of {size} bytes", path=file.path, next_step="copy it again")
    return order, True, first


def _directory(file: _File, order: str, big: bool, at: int) -> tuple[dict[int, tuple[int | bytes, ...]], int]:
    """The tags that matter, and where the next directory is."""
    width, entry, head = (8, 20, "Q") if big else (4, 12, "H")
    head_bytes = struct.calcsize(order + head)
    (count,) = struct.unpack(order + head, file.at(at, head_bytes))
    if not 0 < count <= MAX_TAGS:
        raise FormatError(f"a directory of {count} entries", path=file.path, next_step="copy the file again")
    data = file.at(at + head_bytes, count * entry + width)
    tags: dict[int, tuple[int | bytes, ...]] = {}
    for i in range(count):
        tag, kind, n = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, i * entry)
        if tag not in _WANTED or kind not in _TYPES or not n or (kind == 2) != (tag == DESCRIPTION):
            continue
        if n > (TEXT_LIMIT if kind == 2 else MAX_STRIPS):
            raise FormatError(
                f"tag {tag} of page {file.page} has {n} values", path=file.path, next_step="copy it again"
            )
        code = f"{order}{n}{_TYPES[kind]}"
        size, place = struct.calcsize(code), i * entry + entry - width
        if size > width:
            (where,) = struct.unpack_from(order + ("Q" if big else "I"), data, place)
            tags[tag] = struct.unpack(code, file.at(where, size))
        else:
            tags[tag] = struct.unpack_from(code, data, place)
    return tags, struct.unpack_from(order + ("Q" if big else "I"), data, count * entry)[0]


def _page(path: str, order: str, tags: Mapping[int, Sequence[int | bytes]], *, described: bool) -> Page:
    def number(tag: int, default: int) -> int:
        values = tags.get(tag, (default,))
        return int(values[0]) if values else default

    bits, kind = number(BITS, 1), _KINDS.get(number(SAMPLE_FORMAT, 1))
    compression, samples = number(COMPRESSION, 1), number(SAMPLES, 1)
    if compression != 1 or samples != 1 or TILES in tags or bits not in (8, 16, 32, 64) or kind is None:
        raise PackedError(f"compression {compression}, {samples} samples of {bits} bits", path=path)
    if kind == "f" and bits == 8:
        raise FormatError("floats of 8 bits", path=path, next_step="copy the file again")
    shape = (number(LENGTH, 0), number(WIDTH, 0))
    offsets, counts = [[int(v) for v in tags.get(t, ())] for t in (STRIPS, COUNTS)]
    wanted = shape[0] * shape[1] * bits // 8
    if min(shape) < 1 or not offsets:
        raise FormatError(f"a page of {shape[0]} x {shape[1]} pixels, no strips", path=path, next_step="copy it again")
    if len(offsets) > 1 and any(a + c != b for a, c, b in zip(offsets, counts, offsets[1:], strict=False)):
        raise PackedError("the strips of a page do not follow one another", path=path)
    if sum(counts) < wanted and counts:
        raise FormatError(
            f"a page has {sum(counts)} bytes for {shape[0]} x {shape[1]} pixels", path=path, next_step="copy it again"
        )
    text = tags.get(DESCRIPTION, (b"",))[0]
    words = text.rstrip(b"\0").decode("utf-8", "replace") if described and isinstance(text, bytes) else ""
    offset = min(offsets[0], FARTHEST)  # of 64 bits in BigTIFF: what reads must be able to count beyond it
    return Page(shape, f"{order}{kind}{bits // 8}", offset, words)
