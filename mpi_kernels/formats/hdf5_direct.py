"""Boxes of a chunked HDF5 dataset, read by offset and decompressed in threads, without the library and its lock.

Each chunk is read and decompressed once as long as the chunks that later boxes need again fit the cache.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a chunk that a box wants: the chunk's number and corner, and where the part is in chunk and box."""

    number: int
    corner: tuple[int, ...]
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
        self._bytes = int(np.prod(self._chunks)) * stored.itemsize
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
        ranges = [range(s.start // c, -(-s.stop // c)) for s, c in zip(box, self._chunks, strict=True)]
        for at in itertools.product(*ranges):
            corner = tuple(i * c for i, c in zip(at, self._chunks, strict=True))
            low = [max(a, s.start) for a, s in zip(corner, box, strict=True)]
            high = [min(a + c, s.stop) for a, c, s in zip(corner, self._chunks, box, strict=True)]
            yield Piece(
                int(np.ravel_multi_index(at, self._index.grid)),
                corner,
                tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True)),
                tuple(slice(a - s.start, b - s.start) for a, b, s in zip(low, high, box, strict=True)),
            )

    def _frame(self, at: Sequence[int]) -> int:
        """The frame of an element of the dataset."""
        frame = 0
        for axis in self._lead:
            frame = frame * self._shape[axis] + min(at[axis], self._shape[axis] - 1)
        return frame

    def _fill(self, pieces: Sequence[Piece], end: int, out: np.ndarray) -> None:
        for piece in pieces:
            last = self._frame([a + c - 1 for a, c in zip(piece.corner, self._chunks, strict=True)])
            with self._lock:
                chunk = self._kept.pop(piece.number, None)
            if chunk is None:
                chunk = self._chunk(piece)
            out[piece.target] = chunk[piece.inside]
            if last > end:  # frames come in order: what ends with this box is not asked for again
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
        stored = bytearray(size)
        try:
            got = _read_fully(self._fd, stored, address)
        except OSError as error:
            raise self._missing(piece, f"its chunk can't be read: {error.strerror}") from error
        if got < size:
            raise self._missing(piece, f"its chunk is cut off: {got} of {size} bytes are there")
        try:
            data = undo(memoryview(stored), self._filters, int(self._index.masks[piece.number]), self._bytes)
        except BadChunk as error:
            raise self._missing(piece, f"its chunk is damaged: {error}") from error
        return np.frombuffer(data, self._stored).reshape(self._chunks)

    def _missing(self, piece: Piece, why: str) -> MissingData:
        at = [a + s.start for a, s in zip(piece.corner, piece.inside, strict=True)]
        return MissingData(
            why, path=self._path, frame=self._frame(at), next_step="copy the file again from the microscope"
        )


def _read_fully(fd: int, buffer: bytearray, offset: int) -> int:
    view, done = memoryview(buffer), 0
    while done < len(buffer) and (got := os.preadv(fd, [view[done:]], offset + done)):
        done += got
    return done
