"""Where the frames of an HDF5 dataset lie in the file, for those who read without the HDF5 library."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpi_kernels.formats.hdf5_filters import Filter, filters_of, native_codec
from mpi_kernels.formats.hdf5_index import ChunkIndex, chunk_index, filters_partial_chunks
from mpi_kernels.layout import Codec, Layout


def layout_of(
    dataset: Any, lead: Sequence[int], stored: np.dtype, path: str, index: ChunkIndex | None = None
) -> Layout | None:
    """Records of a chunked dataset that has all its chunks.

    Chunks that are not compressed give one record a frame, however they divide the scan; where they follow one another
    in the file, one run of frames.  Compressed chunks are records of several frames, which must be consecutive.

    Parameters
    ----------
    dataset : h5py.Dataset
    lead : sequence of int
        Axes of the dataset that are the scan's.
    stored : dtype
        Of its pixels, as `as_stored` found it.
    path : str
        The file.
    index : ChunkIndex, optional
        Of the dataset, if the caller has it.

    Returns
    -------
    Layout or None
        None where a frame is cut into chunks, the frames of a chunk are not consecutive, the filters are others than
        bitshuffle-LZ4 and LZ4, or a chunk was stored without them.
    """
    shape, chunks = dataset.shape, dataset.chunks
    filters = filters_of(dataset)
    codec = _codec(filters, stored)
    if codec is None or not whole_frames(shape, chunks, lead):
        return None
    per_chunk = consecutive(shape, chunks, lead)
    if filters and (per_chunk is None or (_sticks_out(shape, chunks) and not filters_partial_chunks(dataset))):
        return None
    index = index or chunk_index(dataset)
    if index is None or not index.whole or not _in_file(index, dataset):
        return None
    frame = stored.itemsize * shape[-2] * shape[-1]
    if not filters:
        return _plain(index, shape, chunks, lead, frame, stored, path)
    assert per_chunk is not None
    payload = per_chunk * frame
    if index.masks.any() or int(index.sizes.max()) > largest_stored(payload):
        return None
    return Layout(
        files=(path,),
        dtype=_counted(stored),
        payload=payload,
        record_frames=per_chunk,
        offsets=index.addresses,
        sizes=index.sizes,
        codec=codec[0],
        element=codec[1],
    )


def as_stored(dataset: Any) -> bool:
    """Whether the file's numbers are numpy's; odd precisions and bit fields are not, and HDF5 has to convert them."""
    import h5py

    return bool(h5py.h5t.py_create(dataset.dtype, logical=True).equal(dataset.id.get_type()))


def largest_stored(payload: int) -> int:
    """Bytes that a compressed chunk can have at most: compressors that don't succeed add a few per cent."""
    return 2 * payload + (1 << 16)


def whole_frames(shape: Sequence[int], chunks: Sequence[int], lead: Sequence[int]) -> bool:
    """Whether each chunk holds whole frames, one after another."""
    inner = [i for i in range(len(shape) - 2) if i not in lead]
    return tuple(chunks[-2:]) == tuple(shape[-2:]) and all(chunks[i] == 1 for i in inner)


def consecutive(shape: Sequence[int], chunks: Sequence[int], lead: Sequence[int]) -> int | None:
    """Frames of a chunk if they are consecutive in scan order, else None.  Only the last chunk may stick out."""
    if len(lead) < 2:
        return int(chunks[lead[0]]) if lead else 1
    rows, columns, width = chunks[lead[0]], chunks[lead[1]], shape[lead[1]]
    if columns == width or (rows == 1 and width % columns == 0):
        return int(rows * columns)
    return int(columns) if rows == 1 and shape[lead[0]] == 1 else None


def _codec(filters: Sequence[Filter], stored: np.dtype) -> tuple[Codec, int] | None:
    """How the chunks are compressed, and the bytes of the numbers that were shuffled; None for any other way."""
    if not filters:
        return "", 0
    found = native_codec(filters[0]) if len(filters) == 1 else None
    # LZ4 alone does not shuffle, so any element will do
    return (found[0], stored.itemsize) if found is not None and found[0] == "lz4" else found


def _in_file(index: ChunkIndex, dataset: Any) -> bool:
    """Whether every chunk ends before the file does; a damaged index may say anything."""
    size = os.fstat(dataset.file.id.get_vfd_handle()).st_size
    return int(index.sizes.max()) <= size and int((index.addresses + np.minimum(index.sizes, size)).max()) <= size


def _counted(stored: np.dtype) -> str:
    """A bool is a byte: read as it is, delivered as uint8."""
    return "|u1" if stored.kind == "b" else stored.str


def _sticks_out(shape: Sequence[int], chunks: Sequence[int]) -> bool:
    return any(n % c for n, c in zip(shape, chunks, strict=True))


def _plain(
    index: ChunkIndex,
    shape: Sequence[int],
    chunks: Sequence[int],
    lead: Sequence[int],
    frame: int,
    stored: np.dtype,
    path: str,
) -> Layout | None:
    """One record a frame, at the address of its chunk plus its place in it."""
    if (index.sizes != math.prod(chunks) * stored.itemsize).any():
        return None
    scan = [shape[i] for i in lead]
    per_chunk = [chunks[i] for i in lead]
    grid = index.addresses.reshape([index.grid[i] for i in lead])
    offsets = grid
    for axis, n in enumerate(per_chunk):
        offsets = np.repeat(offsets, n, axis=axis)[tuple([slice(None)] * axis + [slice(0, scan[axis])])]
    inside = np.zeros(scan, np.int64)
    for axis, n in enumerate(per_chunk):
        step = frame * math.prod(per_chunk[axis + 1 :])
        along = (np.arange(scan[axis], dtype=np.int64) % n) * step
        inside += along.reshape([-1 if i == axis else 1 for i in range(len(scan))])
    offsets = (offsets + inside).reshape(-1)
    payload, dtype = frame, _counted(stored)
    if len(offsets) == 1 or (np.diff(offsets) == frame).all():
        return Layout(files=(path,), dtype=dtype, payload=payload, first=int(offsets[0]))
    return Layout(files=(path,), dtype=dtype, payload=payload, offsets=offsets)
