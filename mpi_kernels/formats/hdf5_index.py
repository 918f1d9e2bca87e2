"""Where the chunks of an HDF5 dataset lie: the whole index in one pass.

With a Python function for each chunk that costs 1.6 us a chunk; with a compiled one given straight to the HDF5 library
that h5py has loaded, 0.1 us.  Both give the same table.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_VERSION = (1, 14, 0)
"""From here on the callback has the type that the compiled one has (H5Dpublic.h; before, sizes had 32 bits)."""

DONT_FILTER_PARTIAL = 2
"""H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS of H5Dpublic.h: chunks that stick out over the array are stored plain."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkIndex:
    """Every chunk of a dataset, in C order of the grid of chunks.

    Attributes
    ----------
    grid : tuple of int
        Chunks along each axis.
    addresses : (chunks,) ndarray of int64
        Byte in the file at which each starts; -1 where it was never written.
    sizes : (chunks,) ndarray of int64
        Stored bytes.
    masks : (chunks,) ndarray of int64
        Bit i is set where filter i of the pipeline was skipped.
    """

    grid: tuple[int, ...]
    addresses: np.ndarray
    sizes: np.ndarray
    masks: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether no chunk is missing."""
        return bool(len(self.addresses)) and int(self.addresses.min()) >= 0


def chunk_grid(shape: Sequence[int], chunks: Sequence[int]) -> tuple[int, ...]:
    """Chunks along each axis, those that stick out included."""
    return tuple(-(-int(n) // int(c)) for n, c in zip(shape, chunks, strict=True))


def chunk_index(dataset: Any) -> ChunkIndex | None:
    """Read the index of a chunked dataset, whose shape the caller has found to be sane: it is room for all its chunks.

    Returns
    -------
    ChunkIndex or None
        None where the index contradicts itself (a chunk twice, outside of the array, without a place in the file), or
        the addresses are not bytes of the file.
    """
    grid = chunk_grid(dataset.shape, dataset.chunks)
    total, rank = math.prod(grid), len(grid)
    rows = chunk_rows(dataset, total)
    moved = _moved_by(dataset, rows, rank)
    if moved is None or len(rows) > total:
        return None
    where = np.zeros(len(rows), np.int64)
    for axis, step in enumerate(dataset.chunks):
        at, rest = (rows[:, axis], 0) if step == 1 else np.divmod(rows[:, axis], step)
        if np.any(rest) or np.any(at < 0) or np.any(at >= grid[axis]):
            return None
        where = where * grid[axis] + at
    if len(rows) == total and np.array_equal(where, np.arange(total)):  # as the library lists most files
        masks, addresses, sizes = np.ascontiguousarray(rows[:, rank:].T)
    else:
        masks, addresses, sizes = found = np.full((3, total), -1, np.int64)
        for column, array in enumerate(found):
            array[where] = rows[:, rank + column]
    if np.count_nonzero(addresses >= 0) != len(rows) or np.any(sizes[where] <= 0):
        return None
    if moved:
        addresses[where] += moved
    return ChunkIndex(grid, addresses, sizes, masks)


def chunk_rows(dataset: Any, capacity: int) -> np.ndarray:
    """Every chunk that is in the file, in the library's order: offsets along the axes, filter mask, address, size."""
    rows = _native_rows(dataset, len(dataset.shape), capacity)
    return _python_rows(dataset) if rows is None else rows


def _python_rows(dataset: Any) -> np.ndarray:
    rows: list[tuple[int, ...]] = []

    def note(chunk: Any) -> None:
        if chunk.byte_offset is not None:
            rows.append((*chunk.chunk_offset, chunk.filter_mask, chunk.byte_offset, chunk.size))

    dataset.id.chunk_iter(note)
    return np.array(rows, np.int64).reshape(len(rows), len(dataset.shape) + 3)


def _native_rows(dataset: Any, rank: int, capacity: int) -> np.ndarray | None:
    """The table by the compiled callback; None where there is none, or the library is not the one it was made for."""
    import h5py
    from h5py._objects import phil

    try:
        callback = importlib.import_module("mpi_kernels._native").chunk_callback()
    except (ImportError, AttributeError):
        return None
    library = loaded_library()
    if library is None or h5py.version.hdf5_version_tuple[:3] < MIN_VERSION:
        return None
    try:
        iterate = library.H5Dchunk_iter
    except AttributeError:
        return None
    iterate.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    iterate.restype = ctypes.c_int
    rows = np.empty((capacity, rank + 3), np.int64)
    table = np.array([rank, capacity, 0, rows.ctypes.data], np.int64)
    with phil:  # h5py's own lock: the library is not made for two threads
        status = iterate(dataset.id.id, 0, callback, table.ctypes.data)
    return rows[: int(table[2])] if status >= 0 else None


def loaded_library() -> ctypes.CDLL | None:
    """The HDF5 that h5py itself uses, whatever its file is called: symbols are looked up in what its module links."""
    import h5py

    try:
        return ctypes.CDLL(h5py.h5d.__file__)
    except (OSError, AttributeError):
        return None


def filters_partial_chunks(dataset: Any) -> bool:
    """Whether chunks that stick out over the array go through the filters like all others; False if that is unknown."""
    from h5py._objects import phil

    library = loaded_library()
    if library is None or not hasattr(library, "H5Pget_chunk_opts"):
        return False
    ask = library.H5Pget_chunk_opts
    ask.argtypes = (ctypes.c_int64, ctypes.POINTER(ctypes.c_uint))
    ask.restype = ctypes.c_int
    options = ctypes.c_uint(0)
    plist = dataset.id.get_create_plist()
    with phil:
        status = ask(plist.id, ctypes.byref(options))
    return status >= 0 and not options.value & DONT_FILTER_PARTIAL


def _moved_by(dataset: Any, rows: np.ndarray, rank: int) -> int | None:
    """Bytes to add to the addresses: whether they count from the file's start or from the end of a user block depends
    on the version of the library, so the bytes of a chunk are compared.
    """  # noqa: D205
    block = dataset.file.userblock_size
    if block == 0 or len(rows) == 0:
        return 0
    row = rows[0]
    _, wanted = dataset.id.read_direct_chunk(tuple(int(n) for n in row[:rank]))
    with open(dataset.file.id.name, "rb", buffering=0) as file:  # noqa: PTH123 - names need not be valid UTF-8
        for moved in (0, block):
            file.seek(int(row[rank + 1]) + moved)
            if file.read(len(wanted)) == wanted:
                return moved
    return None
