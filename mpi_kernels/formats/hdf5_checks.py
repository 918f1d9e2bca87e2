"""Whether an HDF5 dataset may be read, and whether it is all there, before a frame of it is touched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import size_of
from mpi_kernels.formats.hdf5_holes import expected_chunks, first_missing
from mpi_kernels.formats.hdf5_layout import as_stored
from mpi_kernels.formats.hdf5_open import MAX_RANK
from mpi_kernels.formats.pixels import stored_dtype

MAX_CHUNK_BYTES = 1 << 30

WAIT = "wait for the writer, or record it again"


def activate_filters() -> None:
    """Register the compression filters of hdf5plugin (blosc, bitshuffle, zstd, lz4) where it is installed."""
    try:
        import hdf5plugin  # noqa: F401 - registers its filters when imported
    except ImportError:
        return


def checked(dataset: Any, name: str, path: str) -> np.dtype:
    """The stored pixel type, after everything that must not be read has been refused."""
    checked_layout(dataset, name, path)
    return stored_dtype(dataset.dtype.str, path)


def checked_layout(dataset: Any, name: str, path: str) -> None:
    """Refuse what lies in other files, is empty, has chunks that fill the memory or filters that are not here."""
    plist = dataset.id.get_create_plist()
    if dataset.is_virtual or plist.get_external_count() > 0:
        kind = "a virtual dataset" if dataset.is_virtual else "stored outside the file"
        raise FormatError(
            f"{name} is {kind}: its frames lie in other files, which are not followed",
            path=path,
            next_step="name the file that holds the frames, or copy them into one with h5repack",
        )
    if dataset.ndim > MAX_RANK or 0 in dataset.shape:
        raise Incomplete(f"{name} has shape {dataset.shape}: nothing is in it yet", path=path, next_step=WAIT)
    if dataset.chunks:
        _check_chunks(dataset, path)
        _check_filters(dataset, path)


def offset_of(dataset: Any, lead: list[int], scan_shape: tuple[int, ...], stored: np.dtype, path: str) -> int | None:
    """Byte of a contiguous array; None for what the library must read.  `Incomplete` names the first missing frame."""
    import h5py

    if dataset.chunks:
        there, expected = dataset.id.get_num_chunks(), expected_chunks(dataset)
        if there != expected:
            frame = first_missing(dataset, lead, 0, math.prod(scan_shape))
            raise Incomplete(f"{there} of {expected} chunks are written", path=path, frame=frame, next_step=WAIT)
        return None
    if dataset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT:
        return None
    wanted = dataset.size * stored.itemsize
    if dataset.id.get_storage_size() < wanted:
        raise Incomplete("its array was never written", path=path, frame=0, next_step=WAIT)
    offset = dataset.id.get_offset()
    if offset is None or offset + wanted > size_of(path):
        raise Incomplete("its array is not whole", path=path, frame=0, next_step=WAIT)
    # a type that numpy has no equal of (odd precision, bit fields) is converted by the library
    return int(offset) if as_stored(dataset) else None


def _check_chunks(dataset: Any, path: str) -> None:
    """Refuse chunks that would fill the memory, before one is read."""
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if size > MAX_CHUNK_BYTES:
        raise FormatError(
            f"its chunks have {size} bytes; at most {MAX_CHUNK_BYTES} are read at once",
            path=path,
            next_step="repack it: h5repack -l CHUNK=1x1x<det_y>x<det_x>",
        )


def _check_filters(dataset: Any, path: str) -> None:
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
