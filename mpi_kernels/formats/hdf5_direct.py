"""Boxes of a chunked HDF5 dataset, read by offset and decompressed in threads, without the library and its lock.

Each chunk is read and decompressed once as long as the chunks that later boxes need again fit the cache.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpi_kernels.errors import MissingData
from mpi_kernels.formats.hdf5_filters import BadChunk, Filter, undo
from mpi_kernels.formats.hdf5_index import ChunkIndex
from mpi_kernels.formats.hdf5_layout import largest_stored

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

CACHE_BYTES = 64 << 20
"""Decompressed chunks that are kept for the next box; bounds a rank's memory."""

TASK_BYTES = 1 << 20
"""Chunks are handed to threads in groups of about this much, so that small ones do not cost more in handing over."""

Box = tuple[slice, ...]


class Span(NamedTuple):
    """What a box wants of the chunks at one place along one axis."""

    number: int
    """What this place adds to the number of a chunk."""
    start: int
    """First element that is wanted, in the dataset."""
    last: int
    """Last element that the chunks have."""
    inside: slice
    target: slice


class Piece(NamedTuple):
    """Part of a chunk that a box wants: the chunk's number, its first wanted frame, its last frame, where it goes."""

    number: int
    first: int
    last: int
    inside: Box
    target: Box


class DirectChunks:
    """Reads boxes of one dataset.

    Parameters
    ----------
    fd : int
        The file, open for reading; stays the caller's.
    path : str
        Its name, for errors.
    shape, chunks : sequence of int
        Of the dataset.
    stored : dtype
        Of its pixels.
    filters : sequence of Filter
        Its pipeline, for which `hdf5_filters.undoable` holds.
    index : ChunkIndex
        Where its chunks are.
    lead : sequence of int
        Axes of the dataset that are the scan's.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        shape: Sequence[int],
        chunks: Sequence[int],
        stored: np.dtype,
        filters: Sequence[Filter],
        index: ChunkIndex,
        lead: Sequence[int],
    ) -> None:
        self._fd, self._path = fd, path
        self._shape, self._chunks, self._lead = tuple(shape), tuple(chunks), tuple(lead)
        self._stored, self._filters, self._index = stored, tuple(filters), index
        self._bytes = math.prod(self._chunks) * stored.itemsize
        self._strides = [math.prod(index.grid[axis + 1 :]) for axis in range(len(index.grid))]
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1

    def read(self, box: Box, out: np.ndarray, threads: int = 1) -> None:
        """Fill ``out``, shaped like the box, in its own dtype; `MissingData` names the first frame not there."""
        end = self._frame([s.stop - 1 for s in box])
        pieces = list(self._pieces(box))
        size = max(1, TASK_BYTES // self._bytes)
        groups = [pieces[i : i + size] for i in range(0, len(pieces), size)]
        if threads < 2 or len(groups) < 2:
            for group in groups:
                self._fill(group, end, out)
            return
        from concurrent.futures import wait  # brings logging along: only for who has threads

        futures = [self._threads_of(threads).submit(self._fill, group, end, out) for group in groups]
        wait(futures)  # also after an error: nobody may write into the caller's buffer later
        for future in futures:  # the first error in scan order is the one that is raised
            future.result()

    def close(self) -> None:
        """End the threads and forget the chunks."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._kept.clear()

    def _threads_of(self, threads: int) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor

        if self._pool is None or self._threads != threads:
            self.close()
            self._pool, self._threads = ThreadPoolExecutor(threads, "chunks"), threads
        return self._pool

    def _pieces(self, box: Box) -> Iterator[Piece]:
        spans = [list(self._spans(axis, part)) for axis, part in enumerate(box)]
        for found in itertools.product(*spans):
            numbers, starts, lasts, inside, target = zip(*found, strict=True)
            yield Piece(sum(numbers), self._frame(starts), self._frame(lasts), inside, target)

    def _spans(self, axis: int, part: slice) -> Iterator[Span]:
        step = self._chunks[axis]
        for place in range(part.start // step, -(-part.stop // step)):
            corner = place * step
            low, high = max(corner, part.start), min(corner + step, part.stop)
            yield Span(
                place * self._strides[axis],
                low,
                min(corner + step, self._shape[axis]) - 1,
                slice(low - corner, high - corner),
                slice(low - part.start, high - part.start),
            )

    def _frame(self, at: Sequence[int]) -> int:
        """The frame of an element of the dataset."""
        frame = 0
        for axis in self._lead:
            frame = frame * self._shape[axis] + at[axis]
        return frame

    def _fill(self, pieces: Sequence[Piece], end: int, out: np.ndarray) -> None:
        for piece in pieces:
            chunk = None
            if self._kept:
                with self._lock:
                    chunk = self._kept.pop(piece.number, None)
            if chunk is None:
                chunk = self._chunk(piece)
            out[piece.target] = chunk[piece.inside]
            if piece.last > end:  # frames come in order: what ends with this box is not asked for again
                self._keep(piece.number, chunk)

    def _keep(self, number: int, chunk: np.ndarray) -> None:
        room = CACHE_BYTES // self._bytes
        with self._lock:
            self._kept[number] = chunk
            while len(self._kept) > room:
                self._kept.popitem(last=False)

    def _chunk(self, piece: Piece) -> np.ndarray:
        size, address = int(self._index.sizes[piece.number]), int(self._index.addresses[piece.number])
        if address < 0:
            raise self._missing(piece, "its chunk was never written")
        if size > largest_stored(self._bytes):
            raise self._missing(piece, f"its chunk of {self._bytes} bytes claims to take {size} in the file")
        try:
            stored = _read_fully(self._fd, size, address)
        except OSError as error:
            raise self._missing(piece, f"its chunk can't be read: {error.strerror}") from error
        if len(stored) < size:
            raise self._missing(piece, f"its chunk is cut off: {len(stored)} of {size} bytes are there")
        try:
            data = undo(stored, self._filters, int(self._index.masks[piece.number]), self._bytes)
        except BadChunk as error:
            raise self._missing(piece, f"its chunk is damaged: {error}") from error
        return np.frombuffer(data, self._stored).reshape(self._chunks)

    def _missing(self, piece: Piece, why: str) -> MissingData:
        return MissingData(why, path=self._path, frame=piece.first, next_step="copy the file again from the microscope")


def _read_fully(fd: int, count: int, offset: int) -> bytes:
    """At most ``count`` bytes; fewer only at the end of the file."""
    data = os.pread(fd, count, offset)
    while len(data) < count and (more := os.pread(fd, count - len(data), offset + len(data))):
        data += more
    return data
