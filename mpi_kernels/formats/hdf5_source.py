"""Frames of an HDF5 dataset in chunks, read through the library; a chunk that is not there is never read as zeros."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, MissingData
from mpi_kernels.formats.hdf5_open import library_errors
from mpi_kernels.formats.plan import check_request
from mpi_kernels.layout import Layout

CACHE_BYTES = 64 << 20
"""Chunk cache of a source: what two blocks share is decompressed once.  Bounds a rank's memory."""

MAX_CHUNK_BYTES = 1 << 30


def activate_filters() -> None:
    """Register the compression filters of hdf5plugin (blosc, bitshuffle, zstd, lz4) where it is installed."""
    try:
        import hdf5plugin  # noqa: F401 - registers its filters when imported
    except ImportError:
        return


def kept_axes(shape: Sequence[int], scan_axes: int) -> list[int]:
    """Which leading axes of the dataset are the scan's; the others have length 1."""
    lead = list(range(len(shape) - 2))
    while len(lead) > scan_axes:
        ones = [i for i in lead if shape[i] == 1]
        lead.remove(ones[-1])
    return lead


def chunk_frames(shape: Sequence[int], chunks: Sequence[int], lead: Sequence[int]) -> int:
    """Frames after which a bound cuts no chunk: the ``align`` of a source."""
    if not lead:
        return 1
    inner, size = chunks[lead[-1]], shape[lead[-1]]
    if len(lead) == 1:
        return int(min(inner, size))
    rows = min(chunks[lead[0]], shape[lead[0]])
    return int(inner if rows == 1 and size % inner == 0 else rows * size)


FEW_FRAMES = 64
"""Up to here chunks are looked up one by one; more are found in one pass over the index."""


def first_missing(dataset: Any, lead: Sequence[int], start: int, stop: int) -> int | None:
    """The first frame of ``start:stop`` that lies in a chunk which was never written; None if all are there."""
    chunks, shape = dataset.chunks, dataset.shape
    inner = [range(0, shape[i], chunks[i]) for i in range(len(shape)) if i not in lead]
    scan = [shape[i] for i in lead]
    written = _written_chunks(dataset) if stop - start > FEW_FRAMES else None
    known: dict[tuple[int, ...], bool] = {}
    for frame in range(start, stop):
        index = np.unravel_index(frame, scan) if scan else ()
        at = tuple(int(n) // chunks[i] * chunks[i] for n, i in zip(index, lead, strict=True))
        if at not in known:
            asked = _chunks_at(lead, at, inner, len(shape))
            known[at] = all(_written(dataset, c) if written is None else c in written for c in asked)
        if not known[at]:
            return frame
    return None


def _chunks_at(lead: Sequence[int], at: Sequence[int], inner: Sequence[range], rank: int) -> Iterator[tuple[int, ...]]:
    for index in np.ndindex(*(len(r) for r in inner)):
        rest = iter(r[i] for r, i in zip(inner, index, strict=True))
        yield tuple(at[lead.index(axis)] if axis in lead else next(rest) for axis in range(rank))


def _written_chunks(dataset: Any) -> set[tuple[int, ...]]:
    """Offsets of all chunks that are in the file, in one pass over its index; each single look-up is another pass."""
    found: set[tuple[int, ...]] = set()

    def note(chunk: Any) -> None:
        if chunk.byte_offset is not None and chunk.size > 0:
            found.add(tuple(int(n) for n in chunk.chunk_offset))

    dataset.id.chunk_iter(note)
    return found


def _written(dataset: Any, at: tuple[int, ...]) -> bool:
    info = dataset.id.get_chunk_info_by_coord(at)
    return info.byte_offset is not None and info.size > 0


def expected_chunks(dataset: Any) -> int:
    """Chunks that a complete dataset has."""
    return math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))


class ChunkedSource:
    """Frames of one dataset, read through HDF5 into the caller's buffer, in native byte order.

    Parameters
    ----------
    header : Header
        What the format found.
    path : str
        The file.
    name : str
        Path of the dataset inside the file.
    """

    layout: Layout | None = None

    def __init__(self, header: Header, path: str, name: str) -> None:
        import h5py

        activate_filters()
        self.header = header
        self._path = path
        with library_errors(path):
            self._file = h5py.File(os.fsencode(path), "r", locking="best-effort", rdcc_nbytes=CACHE_BYTES)
            self._size = self._file.id.get_filesize()
            self._dataset = self._file[name]
            shape, chunks = self._dataset.shape, self._dataset.chunks
            self._lead = kept_axes(shape, self._axes(shape))
            self.align = chunk_frames(shape, chunks, self._lead) if chunks else 1
            self._whole = not chunks or self._dataset.id.get_num_chunks() == expected_chunks(self._dataset)

    def _axes(self, shape: Sequence[int]) -> int:
        """Scan axes of the array itself: an h5ebsd stack is delivered as a scan."""
        return min(len(self.header.scan_shape), len(shape) - 2)

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        if not self._whole:
            self._refuse(first_missing(self._dataset, self._lead, start, stop))
        for a, b, rows in self._slabs(start, stop):
            part = out[a - start : b - start]
            try:
                self._read(rows, part)
            except (OSError, RuntimeError) as error:
                raise self._unreadable(f"HDF5 can't read it: {error!s:.200}", a) from error
            # HDF5 fills what lies behind the end of a file with zeros (H5FDsec2.c), so a file cut off meanwhile is
            # seen by its size alone
            if os.fstat(self._file.id.get_vfd_handle()).st_size < self._size:
                raise self._unreadable(f"the file was cut off: it had {self._size} bytes", a)

    def _unreadable(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._path, frame=frame, next_step="copy the file again from the microscope")

    def _slabs(self, start: int, stop: int) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """Split frames into boxes of the scan: the rest of a row, whole rows, the start of a row."""
        if not self._lead:
            yield start, stop, ()
            return
        if len(self._lead) == 1:
            yield start, stop, (slice(start, stop),)
            return
        width = self._dataset.shape[self._lead[-1]]
        while start < stop:
            row, column = divmod(start, width)
            if column == 0 and stop - start >= width:
                rows = (stop - start) // width
                end, box = start + rows * width, (slice(row, row + rows), slice(0, width))
            else:
                end = min(stop, (row + 1) * width)
                box = (slice(row, row + 1), slice(column, column + end - start))
            yield start, end, box
            start = end

    def _read(self, rows: tuple[slice, ...], out: np.ndarray) -> None:
        shape = self._dataset.shape
        box = [slice(0, 1)] * (len(shape) - 2) + [slice(0, n) for n in shape[-2:]]
        for axis, part in zip(self._lead, rows, strict=True):
            box[axis] = part
        if out.size == 0:
            return
        if self._dataset.dtype.kind == "b" or not out.flags.c_contiguous:
            out[...] = self._dataset[tuple(box)].reshape(out.shape)
            return
        self._dataset.read_direct(out.reshape([s.stop - s.start for s in box]), tuple(box))

    def _refuse(self, frame: int | None) -> None:
        if frame is not None:
            raise MissingData(
                "its chunk was never written",
                path=self._path,
                frame=frame,
                next_step="record it again, or reduce the rows before it; HDF5 would give zeros",
            )

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose chunk is not in the file."""
        if not self._whole:
            with library_errors(self._path):
                self._refuse(first_missing(self._dataset, self._lead, 0, self.header.frames))

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        self._file.close()


def check_chunks(dataset: Any, path: str) -> None:
    """Refuse chunks that would fill the memory, before one is read."""
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if size > MAX_CHUNK_BYTES:
        raise FormatError(
            f"its chunks have {size} bytes; at most {MAX_CHUNK_BYTES} are read at once",
            path=path,
            next_step="repack it: h5repack -l CHUNK=1x1x<det_y>x<det_x>",
        )


def check_filters(dataset: Any, path: str) -> None:
    """Refuse a compression that can't be undone here."""
    import h5py

    activate_filters()
    plist = dataset.id.get_create_plist()
    for i in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise FormatError(
                f"it is compressed with HDF5 filter {code} ({name.decode('latin-1'):.40}), which is not installed",
                path=path,
                next_step="pip install hdf5plugin",
            )
