"""A source over a frame plan: where each frame lies in one file, read by ``preadv`` into the caller's buffer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import MissingData
from mpi_kernels.formats.access import os_errors

Decode = Callable[[np.ndarray, np.ndarray], None]
"""``decode(stored, out)``: (n, stored bytes) uint8 into (n, det_y, det_x); a module-level function, so that a plan
can be sent to other ranks."""

RUN_FRAMES = 500
"""Frames in one preadv: two buffers each, and Linux takes 1024 (IOV_MAX, limits.h)."""

NUMBER_BYTES, NUMBERS = 32, 10**6
"""Where a record's number is looked for, and after how many it may begin anew."""

SCRATCH_BYTES = 4 << 20
"""Stored bytes that are decoded at a time; bounds the memory of a source."""


@dataclass(frozen=True, slots=True, eq=False)
class FramePlan:
    """Where frames lie: each is a record of ``lead + payload + tail`` bytes, of which the payload holds the pixels.

    Attributes
    ----------
    first : int
        Byte at which the first record starts, when records follow one another.
    offsets : (frames,) ndarray of int64, optional
        Byte at which each record starts, when they do not.
    payload : int
        Bytes of pixels in a record.
    lead, tail : int
        Bytes before and after the pixels (a frame header, metadata rows).
    dtype : str
        Pixel type in the file, such as ``">u2"``.
    magic : bytes
        What every record must start with; checked at each read.
    numbered : int, optional
        Number of the first record, where each record carries its number as the second of comma-separated fields of
        its lead (Merlin's); they must follow one another, or a frame is missing or doubled.
    decode : callable, optional
        For pixels that are not plain numbers in C order.
    """

    first: int
    payload: int
    dtype: str
    lead: int = 0
    tail: int = 0
    magic: bytes = b""
    offsets: np.ndarray | None = None
    numbered: int | None = None
    decode: Decode | None = None

    @property
    def record(self) -> int:
        """Bytes from one record to the next."""
        return self.lead + self.payload + self.tail

    def offset(self, frame: int) -> int:
        """Byte at which a frame's record starts."""
        return self.first + frame * self.record if self.offsets is None else int(self.offsets[frame])

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Split frames ``start:stop`` where the file's order breaks, and into what one call can read."""
        if self.offsets is None:
            cuts = [start, stop]
        else:
            gaps = np.flatnonzero(np.diff(self.offsets[start:stop]) != self.record) + start + 1
            cuts = [start, *gaps.tolist(), stop]
        for a, b in itertools.pairwise(cuts):
            for c in range(a, b, RUN_FRAMES):
                yield c, min(c + RUN_FRAMES, b)


class PlanSource:
    """Frames read as a `FramePlan` says; bounded memory, no frame is ever made up.

    Parameters
    ----------
    header : Header
        What the format found.
    path : str
        File that the plan refers to.
    plan : FramePlan
        Where the frames are.
    """

    align = 1

    def __init__(self, header: Header, path: str, plan: FramePlan) -> None:
        self.header = header
        self.plan = plan
        self._path = path
        self._stored = np.dtype(plan.dtype)
        self._gap = memoryview(bytearray(max(1, plan.lead + plan.tail)))
        with os_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        plain = self.plan.decode is None and self._stored.newbyteorder("=") == out.dtype and out.flags.c_contiguous
        for a, b in self.plan.runs(start, stop):
            if plain:
                self._read(a, b, _rows(out[a - start : b - start]))
            else:
                self._decoded(a, b, out[a - start : b - start])
        if plain and not self._stored.isnative:
            out.byteswap(inplace=True)

    def _decoded(self, start: int, stop: int, out: np.ndarray) -> None:
        step = max(1, SCRATCH_BYTES // self.plan.payload)
        scratch = np.empty((min(step, stop - start), self.plan.payload), np.uint8)
        for a in range(start, stop, step):
            n = min(step, stop - a)
            self._read(a, a + n, scratch[:n])
            part = out[a - start : a - start + n]
            if self.plan.decode is not None:
                self.plan.decode(scratch[:n], part)
            else:
                part[...] = scratch[:n].view(self._stored).reshape(part.shape)

    def _read(self, start: int, stop: int, rows: np.ndarray) -> None:
        """Read records ``start:stop``, consecutive in the file; their payloads go to ``rows``, (n, payload) uint8."""
        plan, n = self.plan, stop - start
        heads = np.zeros((n, max(1, plan.lead)), np.uint8)
        if plan.lead == 0 and plan.tail == 0:
            buffers = [rows.data.cast("B")]
        else:
            tail = self._gap[: plan.tail]
            buffers = [b for i in range(n) for b in (heads[i].data[: plan.lead], rows[i].data, tail)]
            # the last record's tail may be cut off without harm to its pixels, and empty pieces only cost time
            buffers = [b for b in (buffers[:-1] if plan.tail else buffers) if len(b)]
        wanted = sum(len(b) for b in buffers)
        got = self._fill(buffers, plan.offset(start), start)
        if got < wanted:
            self._missing(start + (got + plan.tail) // plan.record, f"the file ends {wanted - got} bytes early")
        if plan.magic:
            marks = heads[:, : len(plan.magic)] == np.frombuffer(plan.magic, np.uint8)
            if not marks.all():
                bad = start + int(np.argmin(marks.all(axis=1)))
                self._missing(bad, f"its record does not start with {plan.magic!r}: the frame was not written")
        if plan.numbered is not None:
            self._check_numbers(start, heads, plan.numbered)

    def _check_numbers(self, start: int, heads: np.ndarray, first: int) -> None:
        for i, head in enumerate(heads, start):
            number = head[:NUMBER_BYTES].tobytes().split(b",")[1:2]
            # six digits, so a long acquisition may count on from 0
            if not number or not number[0].isdigit() or (int(number[0]) - first - i) % NUMBERS:
                told = number[0].decode("ascii", "replace") if number else "missing"
                self._missing(i, f"its record has number {told} instead of {first + i}: a frame is missing or doubled")

    def _fill(self, buffers: list[memoryview], offset: int, frame: int) -> int:
        """Read into the buffers in turn until they are full or the file ends; a call may return less than asked."""
        done = 0
        while buffers:
            try:
                # two buffers a frame, three with a tail: never more than IOV_MAX in one call
                n = os.preadv(self._fd, buffers[:1000], offset + done)
            except OSError as error:
                self._missing(frame + (done + self.plan.tail) // self.plan.record, f"can't be read: {error.strerror}")
            if n == 0:
                break
            done += n
            while buffers and n >= len(buffers[0]):
                n -= len(buffers.pop(0))
            if n:
                buffers[0] = buffers[0][n:]
        return done

    def _missing(self, frame: int, why: str) -> NoReturn:
        raise MissingData(why, path=self._path, frame=frame, next_step="copy the file again from the microscope")

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose bytes are not in the file."""
        with os_errors(self._path):
            size = os.fstat(self._fd).st_size
        plan, n = self.plan, self.header.frames
        ends = plan.lead + plan.payload
        if plan.offsets is None:
            whole = max(0, (size - plan.first + plan.tail) // plan.record)
        else:
            late = np.flatnonzero(plan.offsets + ends > size)
            whole = int(late[0]) if late.size else n
        if whole < n:
            self._missing(whole, f"the file has {size} bytes; {whole} of {n} frames are there")

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


def c_order(header: Header, path: str, start: int, dtype: np.dtype) -> PlanSource:
    """The source of a plain array in C order that begins at byte ``start``."""
    payload = dtype.itemsize * header.det_shape[0] * header.det_shape[1]
    # a bool is a byte: read as it is, delivered as uint8
    stored = "|u1" if dtype.kind == "b" else dtype.str
    return PlanSource(header, path, FramePlan(first=start, payload=payload, dtype=stored))
