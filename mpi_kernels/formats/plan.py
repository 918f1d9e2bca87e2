"""A source over a layout: where each frame lies in its file, read by ``preadv`` into the caller's buffer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import printable
from mpi_kernels.formats.access import os_errors
from mpi_kernels.layout import Layout
from mpi_kernels.plugins import load
from mpi_kernels.whole import check, records_in, refuse

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
        apart = np.diff(layout.offsets[start:stop]) != layout.record
        if layout.file_of is not None:
            apart |= np.diff(layout.file_of[start:stop]) != 0
        cuts = [start, *(np.flatnonzero(apart) + start + 1).tolist(), stop]
    for a, b in itertools.pairwise(cuts):
        for c in range(a, b, RUN_FRAMES):
            yield c, min(c + RUN_FRAMES, b)


def evenly(layout: Layout) -> Layout:
    """The same layout without its table of offsets, where the records of one file follow one another evenly.

    What lies between them becomes their tail, unless it is so much that reading it would cost more than seeking.
    """
    offsets = layout.offsets
    if offsets is None or len(layout.files) > 1 or layout.codec or layout.tail:
        return layout
    steps = np.diff(offsets)
    step = int(steps[0]) if len(steps) else layout.record
    tail = step - layout.record
    if not 0 <= 8 * tail <= layout.payload or (steps != step).any():
        return layout
    return replace(layout, offsets=None, file_of=None, first=int(offsets[0]), tail=tail)


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
        if layout.record_frames != self.align:
            raise ValueError(f"records of {layout.record_frames} frames: they are read one by one here")
        self.header = header
        self.layout = layout
        self._path = layout.files[0]
        self._stored = np.dtype(layout.dtype)
        self._decode = None if layout.decode is None else partial(load(layout.decode), **layout.decode_with)
        self._gap = memoryview(bytearray(max(1, layout.lead + layout.tail)))
        with os_errors(self._path):
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

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
        self._turn_to(start)
        wanted = sum(len(b) for b in buffers)
        got = self._fill(buffers, offset(layout, start), start)
        if got < wanted:
            refuse(self.layout, start + records_in(layout, got), f"the file ends {wanted - got} bytes early")
        if layout.magic:
            marks = heads[:, : len(layout.magic)] == np.frombuffer(layout.magic, np.uint8)
            if not marks.all():
                bad = start + int(np.argmin(marks.all(axis=1)))
                refuse(self.layout, bad, f"its record does not start with {layout.magic!r}: the frame was not written")
        if layout.numbered is not None:
            self._check_numbers(start, heads, layout.numbered)

    def _check_numbers(self, start: int, heads: np.ndarray, first: int) -> None:
        layout = self.layout
        for i, head in enumerate(heads, start):
            at = i
            if layout.offsets is not None and layout.file_of is None:  # some records of the file are left out
                at = int(layout.offsets[i] - layout.offsets[0]) // layout.record
            number = head[:NUMBER_BYTES].tobytes().split(b",")[1:2]
            # six digits, so a long acquisition may count on from 0
            if not number or not number[0].isdigit() or (int(number[0]) - first - at) % NUMBERS:
                told = number[0].decode("ascii", "replace") if number else "missing"
                refuse(
                    layout, i, f"its record has number {told} instead of {first + at}: a frame is missing or doubled"
                )

    def _turn_to(self, record: int) -> None:
        """Have the record's file open; one at a time, since a series may have more files than a process may open."""
        path = self._path if self.layout.file_of is None else self.layout.files[int(self.layout.file_of[record])]
        if path == self._path:
            return
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            name = printable(os.path.basename(path))  # noqa: PTH119
            refuse(self.layout, record, f"its file {name} can't be opened: {error.strerror}")
        os.close(self._fd)
        self._fd, self._path = fd, path

    def _fill(self, buffers: list[memoryview], offset: int, frame: int) -> int:
        """Read into the buffers in turn until they are full or the file ends; a call may return less than asked."""
        done = 0
        while buffers:
            try:
                # two buffers a frame, three with a tail: never more than IOV_MAX in one call
                n = os.preadv(self._fd, buffers[:1000], offset + done)
            except OSError as error:
                refuse(self.layout, frame + records_in(self.layout, done), f"can't be read: {error.strerror}")
            if n == 0:
                break
            done += n
            while buffers and n >= len(buffers[0]):
                n -= len(buffers.pop(0))
            if n:
                buffers[0] = buffers[0][n:]
        return done

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose bytes are not in its file."""
        sizes = None
        if self.layout.file_of is None:  # of the file that is open, whatever has its name now
            with os_errors(self._path):
                sizes = [os.fstat(self._fd).st_size]
        check(self.layout, self.header.frames, self.header.frames, sizes)

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
