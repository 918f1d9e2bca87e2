"""Electron events of all ranks, and how HDF5 holds them so that stempy and py4DSTEM open them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import KernelError
from mpi_kernels.merging import Range, joined
from mpi_kernels.protocols import Events
from mpi_kernels.ranks import Ranks

STEMPY_VERSION = 3
"""Attribute ``version`` of the file: frames are one flat dataset.  Source: stempy.io.SparseArray."""

GROUP = "electron_events"
"""Where stempy looks, from the file's root."""


def collected(
    parts: Sequence[Events], ranges: Sequence[Range], where: Sequence[Range] | None, ranks: Ranks, frames: int
) -> Events | None:
    """Events of the whole scan on rank 0 (None elsewhere); every rank calls it, with its blocks in any order.

    Parameters
    ----------
    parts : sequence of Events
        Of this rank's blocks.
    ranges : sequence of (int, int)
        Frames that this rank has seen, in scan order.
    where : sequence of (int, int) or None
        Those of all ranks, in rank order; on rank 0.
    frames : int
        Of the scan; those that nobody has seen have no events.

    Raises
    ------
    KernelError
        The blocks do not cover the ranges: a frame would be left without saying so.
    """
    ordered = sorted((p for p in parts if len(p.counts)), key=lambda p: p.start)
    if joined([(p.start, p.start + len(p.counts)) for p in ordered]) != joined(ranges):
        raise KernelError(f"events of other frames than {joined(ranges)}")
    for part in ordered:
        if part.pixels.dtype != np.uint32 or int(part.counts.sum()) != len(part.pixels):
            raise KernelError(f"events from frame {part.start} on: as many pixels as the counts say, in uint32")
    counts = np.concatenate([np.empty(0, np.int64), *(p.counts for p in ordered)]).astype(np.int64, copy=False)
    pixels = np.concatenate([np.empty(0, np.uint32), *(p.pixels for p in ordered)])
    all_counts, all_pixels = ranks.gather_rows(counts), ranks.gather_rows(pixels)
    if all_counts is None or all_pixels is None or where is None:
        return None
    return _in_scan_order(all_counts, all_pixels, where, frames)


def _in_scan_order(counts: np.ndarray, pixels: np.ndarray, where: Sequence[Range], frames: int) -> Events:
    """Events of ranges in rank order, sorted."""
    whole, pieces = np.zeros(frames, np.int64), {}
    row = at = 0
    for start, stop in where:
        some = counts[row : row + stop - start]
        whole[start:stop] = some
        pieces[start] = pixels[at : at + int(some.sum())]
        row, at = row + len(some), at + len(pieces[start])
    return Events(0, whole, np.concatenate([np.empty(0, np.uint32), *(pieces[s] for s in sorted(pieces))]))


def write(group: Any, found: Events, header: Header) -> None:
    """Write a group as stempy lays it out, and a group ``events`` beside it as EMD 1.0's list of points.

    Parameters
    ----------
    group : h5py.Group
        Gets ``electron_events/frames`` (one list of uint32 per frame), ``electron_events/scan_positions`` and
        ``electron_events/points``, scan-shaped lists of ``(qx, qy)`` to which ``events/data`` leads: py4DSTEM's x is
        the row.

    Notes
    -----
    stempy takes ``Nx, Ny`` of the scan as width and height, but of the frames as rows and columns: written so.
    Source: stempy.io.SparseArray.write_to_hdf5; emdfile.PointListArray.
    """
    lists = np.split(found.pixels, np.cumsum(found.counts)[:-1])
    import h5py

    height, width = (1, *header.scan_shape)[-2:]
    stempy = group.create_group(GROUP)
    frames = _vlen(stempy, "frames", (len(lists),), lists)
    positions = stempy.create_dataset("scan_positions", data=np.arange(len(lists), dtype=np.int64))
    for dataset, (x, y) in ((frames, header.det_shape), (positions, (width, height))):
        dataset.attrs["Nx"], dataset.attrs["Ny"] = np.int64(x), np.int64(y)
    small = np.dtype("uint16" if max(header.det_shape) <= 1 << 16 else "uint32")
    points = np.empty(len(found.pixels), [("qx", small), ("qy", small)])
    points["qx"], points["qy"] = np.divmod(found.pixels, np.uint32(header.det_shape[1]))
    shaped = _vlen(stempy, "points", (height, width), np.split(points, np.cumsum(found.counts)[:-1]))
    emd = group.create_group("events")
    emd.attrs["emd_group_type"], emd.attrs["python_class"] = "pointlistarray", "PointListArray"
    emd["data"] = h5py.SoftLink(shaped.name)  # HyperSpy takes every real dataset of this name for an image


def write_file(path: str, found: Events, header: Header) -> None:
    """A file of its own with the events, for stempy; it must not exist."""
    import h5py

    with h5py.File(path, "x") as file:
        file.attrs["version"] = np.int64(STEMPY_VERSION)
        write(file, found, header)


def _vlen(group: Any, name: str, shape: tuple[int, ...], lists: list[np.ndarray]) -> Any:
    """A dataset of lists, written by HDF5's own call: h5py's assignment makes a table of lists of one length."""
    import h5py

    dtype = h5py.vlen_dtype(lists[0].dtype)
    dataset = group.create_dataset(name, shape, dtype)
    values = np.empty(len(lists), dtype)
    for i, one in enumerate(lists):
        values[i] = one
    dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, values.reshape(shape))
    return dataset
