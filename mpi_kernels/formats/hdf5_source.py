"""Frames of an HDF5 dataset in chunks; a chunk that is not there is never read as zeros."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import MissingData
from mpi_kernels.formats.hdf5_checks import activate_filters
from mpi_kernels.formats.hdf5_direct import CACHE_BYTES, DirectChunks
from mpi_kernels.formats.hdf5_filters import filters_of, undoable
from mpi_kernels.formats.hdf5_holes import expected_chunks, first_missing
from mpi_kernels.formats.hdf5_index import ChunkIndex, chunk_index, filters_partial_chunks
from mpi_kernels.formats.hdf5_layout import as_stored, layout_of
from mpi_kernels.formats.hdf5_open import library_errors
from mpi_kernels.formats.plan import LayoutSource, check_request
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

CACHE_SLOTS = 12421
"""Places of the library's own chunk cache; far more than chunks in it, so that they don't push each other out."""


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


class ChunkedSource:
    """Frames of one dataset into the caller's buffer, in native byte order.

    Compressions that `hdf5_filters` knows are undone in ``threads`` threads without the HDF5 library; all others go
    through it and its lock, one chunk after another.

    Parameters
    ----------
    header : Header
        What the format found.
    path : str
        The file.
    name : str
        Path of the dataset inside the file.

    Attributes
    ----------
    threads : int
        How many may decompress at a time; whoever reads sets it.
    dataset : h5py.Dataset
        Open until `close`.
    """

    def __init__(self, header: Header, path: str, name: str) -> None:
        import h5py

        activate_filters()
        self.header = header
        self.threads = 1
        self._path = path
        with library_errors(path):
            self._file = h5py.File(
                os.fsencode(path), "r", locking="best-effort", rdcc_nbytes=CACHE_BYTES, rdcc_nslots=CACHE_SLOTS
            )
            self._size = self._file.id.get_filesize()
            self.dataset = self._file[name]
            shape, chunks = self.dataset.shape, self.dataset.chunks
            self._lead = kept_axes(shape, self._axes(shape))
            self.align = chunk_frames(shape, chunks, self._lead) if chunks else 1
            self._whole, self._index = self._listed()

    @functools.cached_property
    def layout(self) -> Layout | None:
        """Where the frames lie, if whole frames lie in the file in a way that can be read without HDF5."""
        dataset = self.dataset
        if self._index is None or not as_stored(dataset) or self.header.frames != self._frames():
            return None
        return layout_of(dataset, self._lead, dataset.dtype, self._path, self._index)

    def _listed(self) -> tuple[bool, ChunkIndex | None]:
        """Whether no chunk is missing, and the index of chunks that are all there, unless it contradicts itself."""
        if not self.dataset.chunks:
            return True, None
        index = chunk_index(self.dataset)
        if index is None:
            return bool(self.dataset.id.get_num_chunks() == expected_chunks(self.dataset)), None
        return index.whole, index if index.whole else None

    @functools.cached_property
    def _direct(self) -> DirectChunks | None:
        """The way without the library, where it can be gone."""
        dataset, filters = self.dataset, filters_of(self.dataset)
        # without a filter there is nothing that threads could share: the library is quicker on small chunks
        if not dataset.chunks or not filters or not as_stored(dataset) or not undoable(filters):
            return None
        uneven = any(n % c for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        if (uneven and not filters_partial_chunks(dataset)) or self._index is None:
            return None
        return DirectChunks(
            self._file.id.get_vfd_handle(),
            self._path,
            dataset.shape,
            dataset.chunks,
            dataset.dtype,
            filters,
            self._index,
            self._lead,
        )

    def _frames(self) -> int:
        return math.prod(self.dataset.shape[i] for i in self._lead)

    def _axes(self, shape: Sequence[int]) -> int:
        """Scan axes of the array itself: an h5ebsd stack is delivered as a scan."""
        return min(len(self.header.scan_shape), len(shape) - 2)

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        if not self._whole:
            self._refuse(first_missing(self.dataset, self._lead, start, stop))
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
        width = self.dataset.shape[self._lead[-1]]
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
        shape = self.dataset.shape
        box = [slice(0, 1)] * (len(shape) - 2) + [slice(0, n) for n in shape[-2:]]
        for axis, part in zip(self._lead, rows, strict=True):
            box[axis] = part
        if out.size == 0:
            return
        if self._direct is not None:
            whole = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
            self._direct.read(tuple(box), whole.reshape([s.stop - s.start for s in box]), self.threads)
            if whole is not out:
                out[...] = whole
            return
        if self.dataset.dtype.kind == "b" or not out.flags.c_contiguous:
            out[...] = self.dataset[tuple(box)].reshape(out.shape)
            return
        self.dataset.read_direct(out.reshape([s.stop - s.start for s in box]), tuple(box))

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
                self._refuse(first_missing(self.dataset, self._lead, 0, self.header.frames))

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        direct = self.__dict__.pop("_direct", None)  # only if it was ever needed
        if direct is not None:
            direct.close()
        self._file.close()


def repeated(dataset: Any, lead: Sequence[int]) -> tuple[str, ...]:
    """A warning where the chunks that frames share don't fit the cache, so that they are decompressed repeatedly."""
    if not dataset.chunks or not filters_of(dataset):
        return ()
    frame = dataset.dtype.itemsize * dataset.shape[-2] * dataset.shape[-1]
    shared = chunk_frames(dataset.shape, dataset.chunks, lead) * frame
    if shared <= CACHE_BYTES or math.prod(dataset.chunks[i] for i in lead) == 1:
        return ()
    return (
        f"its chunks {dataset.chunks} are shared by {shared >> 20} MiB of frames, more than the "
        f"{CACHE_BYTES >> 20} MiB that are kept, so they are decompressed several times; "
        "h5repack -l CHUNK= with whole frames makes it quick",
    )


def chunked(header: Header, path: str, name: str) -> Source:
    """The source of a chunked dataset: by offset where its chunks hold plain whole frames, else chunk by chunk."""
    source = ChunkedSource(header, path, name)
    if not filters_of(source.dataset) and (layout := source.layout) is not None:
        source.close()
        return LayoutSource(header, layout)
    return source
