"""Whether every frame of a layout is in its file, from the files' sizes alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from mpi_kernels.errors import MissingData
from mpi_kernels.layout import Layout

NEVER_WRITTEN = "its chunk was never written"


def refuse(layout: Layout, frame: int, why: str) -> NoReturn:
    """Raise `MissingData` about a frame, with the file that should hold it."""
    step = "copy the file again from the microscope"
    if why == NEVER_WRITTEN:
        step = "record it again, or reduce the rows before it; HDF5 would give zeros"
    raise MissingData(why, path=layout.files[file_of(layout, frame)], frame=frame, next_step=step)


def file_of(layout: Layout, frame: int) -> int:
    """Index of the file that holds a frame."""
    return 0 if layout.file_of is None else int(layout.file_of[frame // layout.record_frames])


def check(layout: Layout, frames: int, stop: int, sizes: Sequence[int] | None = None) -> None:
    """Raise `MissingData` with the first frame before ``stop`` whose bytes are not in its file.

    Parameters
    ----------
    layout : Layout
        Where the frames are.
    frames, stop : int
        Frames of the scan; those that are asked about.
    sizes : sequence of int, optional
        Bytes of each file; -1: it can't be read.  None: they are looked up.
    """
    held = np.array([_size(f) for f in layout.files] if sizes is None else sizes, np.int64)
    frame = first_cut(layout, held, stop)
    if frame is None:
        return
    record, file = frame // layout.record_frames, file_of(layout, frame)
    if not _written(layout, slice(record, record + 1)).all():
        refuse(layout, frame, NEVER_WRITTEN)
    if held[file] < 0:
        refuse(layout, frame, f"can't be read: {_reason(layout.files[file])}")
    refuse(layout, frame, f"the file has {held[file]} bytes; {frame} of {frames} frames are there")


def first_cut(layout: Layout, sizes: np.ndarray, stop: int) -> int | None:
    """The first frame before ``stop`` whose bytes are not in files of these sizes."""
    if stop <= 0:
        return None
    size, records = layout.payload // layout.record_frames, -(-stop // layout.record_frames)
    # a record may lack its tail, and the last one the frames that nobody wants
    last = layout.lead + (stop - (records - 1) * layout.record_frames) * size
    if layout.offsets is None:
        held, start = int(sizes[0]), layout.first + (records - 1) * layout.record
        if start + last <= held:
            return None
        record = min(records - 1, max(0, records_in(layout, held - layout.first)))
        there = held - layout.first - record * layout.record
    else:
        offsets = layout.offsets[:records]
        of_each = np.broadcast_to(sizes[0], (records,)) if layout.file_of is None else sizes[layout.file_of[:records]]
        needed = offsets + (layout.lead + layout.payload if layout.sizes is None else layout.sizes[:records])
        if layout.sizes is None:
            needed[-1] = offsets[-1] + last
        late = np.flatnonzero((needed > of_each) | ~_written(layout, slice(0, records)))
        if not late.size:
            return None
        record = int(late[0])
        there = int(of_each[record] - offsets[record]) if offsets[record] >= 0 else 0
    inside = max(0, (there - layout.lead) // size) if layout.sizes is None else 0
    return record * layout.record_frames + inside


def records_in(layout: Layout, length: int) -> int:
    """Plain records that so many bytes hold, where they follow one another; a record may lack its tail."""
    return (length + layout.tail) // layout.record


def _written(layout: Layout, records: slice) -> np.ndarray:
    if layout.offsets is None:
        return np.ones(1, bool)
    return (layout.offsets[records] >= 0) & (True if layout.sizes is None else layout.sizes[records] > 0)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a str path keeps names that are not UTF-8 as they are
    except (OSError, ValueError):
        return -1


def _reason(path: str) -> str:
    try:
        os.stat(path)  # noqa: PTH116
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:
        return "its name holds a NUL byte"
    return "it has changed meanwhile"
