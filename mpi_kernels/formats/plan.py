"""A source over a layout: where each frame lies in one file, read by ``preadv`` into the caller's buffer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.formats.access import os_errors
from mpi_kernels.layout import Layout
from mpi_kernels.plugins import load
from mpi_kernels.whole import check, refuse

RUN_FRAMES = 500
"""Frames in one preadv: two buffers each, and Linux takes 1024 (IOV_MAX, limits.h)."""

NUMBER_BYTES, NUMBERS = 32, 10**6
"""Where a record's number is looked for, and after how many it may begin anew."""

SCRATCH_BYTES = 4 << 20
"""Stored bytes that are decoded at a time; bounds the memory of a source."""


def offset(layout: Layout, record: int) -> int:
    """Byte at which a record starts in its file."""
    return layout.first + record * layout.record if layout.offsets is None else int(layout.offsets[record])


def runs(layout: Layout, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Split frames ``start:stop`` where the file's order breaks, and into what one call can read."""
    if layout.offsets is None:
        cuts = [start, stop]
    else:
        gaps = np.flatnonzero(np.diff(layout.offsets[start:stop]) != layout.record) + start + 1
        cuts = [start, *gaps.tolist(), stop]
    for a, b in itertools.pairwise(cuts):
        for c in range(a, b, RUN_FRAMES):
            yield c, min(c + RUN_FRAMES, b)


class LayoutSource:
    """Frames read as a `Layout` says; bounded memory, no frame is ever made up.

    Parameters
    ----------
    header : Header
        What the format found.
    layout : Layout
        Where the frames are.
    """

    align = 1

    def __init__(self, header: Header, layout: Layout) -> None:
        self.header = header
        self.layout = layout
        self._path = path = layout.files[0]
        self._stored = np.dtype(layout.dtype)
        self._decode = None if layout.decode is None else partial(load(layout.decode), **layout.decode_with)
        self._gap = memoryview(bytearray(max(1, layout.lead + layout.tail)))
        with os_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        plain = self._decode is None and self._stored.newbyteorder("=") == out.dtype and out.flags.c_contiguous
        for a, b in runs(self.layout, start, stop):
            if plain:
                self._read(a, b, _rows(out[a - start : b - start]))
            else:
                self._decoded(a, b, out[a - start : b - start])
        if plain and not self._stored.isnative:
            out.byteswap(inplace=True)

    def _decoded(self, start: int, stop: int, out: np.ndarray) -> None:
        step = max(1, SCRATCH_BYTES // self.layout.payload)
        scratch = np.empty((min(step, stop - start), self.layout.payload), np.uint8)
        for a in range(start, stop, step):
            n = min(step, stop - a)
            self._read(a, a + n, scratch[:n])
            part = out[a - start : a - start + n]
            if self._decode is not None:
                self._decode(scratch[:n], part)
            else:
                part[...] = scratch[:n].view(self._stored).reshape(part.shape)

    def _read(self, start: int, stop: int, rows: np.ndarray) -> None:
        """Read records ``start:stop``, consecutive in the file; their payloads go to ``rows``, (n, payload) uint8."""
        layout, n = self.layout, stop - start
        heads = np.zeros((n, max(1, layout.lead)), np.uint8)
        if layout.lead == 0 and layout.tail == 0:
            buffers = [rows.data.cast("B")]
        else:
            tail = self._gap[: layout.tail]
            buffers = [b for i in range(n) for b in (heads[i].data[: layout.lead], rows[i].data, tail)]
            # the last record's tail may be cut off without harm to its pixels, and empty pieces only cost time
            buffers = [b for b in (buffers[:-1] if layout.tail else buffers) if len(b)]
        wanted = sum(len(b) for b in buffers)
        got = self._fill(buffers, offset(layout, start), start)
        if got < wanted:
            refuse(
                self.layout, start + (got + layout.tail) // layout.record, f"the file ends {wanted - got} bytes early"
            )
        if layout.magic:
            marks = heads[:, : len(layout.magic)] == np.frombuffer(layout.magic, np.uint8)
            if not marks.all():
                bad = start + int(np.argmin(marks.all(axis=1)))
                refuse(self.layout, bad, f"its record does not start with {layout.magic!r}: the frame was not written")
        if layout.numbered is not None:
            self._check_numbers(start, heads, layout.numbered)

    def _check_numbers(self, start: int, heads: np.ndarray, first: int) -> None:
        for i, head in enumerate(heads, start):
            number = head[:NUMBER_BYTES].tobytes().split(b",")[1:2]
            # six digits, so a long acquisition may count on from 0
            if not number or not number[0].isdigit() or (int(number[0]) - first - i) % NUMBERS:
                told = number[0].decode("ascii", "replace") if number else "missing"
                refuse(
                    self.layout,
                    i,
                    f"its record has number {told} instead of {first + i}: a frame is missing or doubled",
                )

    def _fill(self, buffers: list[memoryview], offset: int, frame: int) -> int:
        """Read into the buffers in turn until they are full or the file ends; a call may return less than asked."""
        done = 0
        while buffers:
            try:
                # two buffers a frame, three with a tail: never more than IOV_MAX in one call
                n = os.preadv(self._fd, buffers[:1000], offset + done)
            except OSError as error:
                refuse(
                    self.layout,
                    frame + (done + self.layout.tail) // self.layout.record,
                    f"can't be read: {error.strerror}",
                )
            if n == 0:
                break
            done += n
            while buffers and n >= len(buffers[0]):
                n -= len(buffers.pop(0))
            if n:
                buffers[0] = buffers[0][n:]
        return done

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose bytes are not in the file."""
        with os_errors(self._path):
            size = os.fstat(self._fd).st_size
        check(self.layout, self.header.frames, self.header.frames, [size])

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check_request(header: Header, start: int, stop: int, out: np.ndarray) -> None:
    """Refuse a buffer or bounds that do not fit: a mistake of the caller."""
    wanted = (stop - start, *header.det_shape)
    if not 0 <= start <= stop <= header.frames:
        raise ValueError(f"frames {start}:{stop} are not within 0:{header.frames}")
    if out.shape != wanted or out.dtype != np.dtype(header.dtype):
        raise ValueError(f"expected a buffer {wanted} of {header.dtype}, got {out.shape} of {out.dtype}")


def _rows(out: np.ndarray) -> np.ndarray:
    """The same memory as (n, bytes of a frame) uint8."""
    return out.reshape(len(out), -1).view(np.uint8)


def c_order(header: Header, path: str, start: int, dtype: np.dtype) -> LayoutSource:
    """The source of a plain array in C order that begins at byte ``start``."""
    payload = dtype.itemsize * header.det_shape[0] * header.det_shape[1]
    # a bool is a byte: read as it is, delivered as uint8
    stored = "|u1" if dtype.kind == "b" else dtype.str
    return LayoutSource(header, Layout(files=(path,), first=start, payload=payload, dtype=stored))
