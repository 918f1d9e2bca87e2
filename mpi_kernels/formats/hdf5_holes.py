"""Chunks of an HDF5 dataset that were never written: HDF5 would deliver them as zeros."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpi_kernels.formats.hdf5_index import chunk_rows

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
    rows = chunk_rows(dataset, dataset.id.get_num_chunks())
    return set(map(tuple, rows[:, : len(dataset.shape)].tolist()))


def _written(dataset: Any, at: tuple[int, ...]) -> bool:
    info = dataset.id.get_chunk_info_by_coord(at)
    return info.byte_offset is not None and info.size > 0


def expected_chunks(dataset: Any) -> int:
    """Chunks that a complete dataset has."""
    return math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
