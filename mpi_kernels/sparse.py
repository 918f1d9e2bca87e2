"""All terms of a recipe from lists of events: counted data are reduced without ever making frames of them.

Integers are equal to the bit to what `fused.Fused` finds on the dense frames.  Sums with float weights add the events
of a frame in order of their pixels in float64, so they are within ``n * 2**-52 * sum|w x|`` of the exact ones for n
events, whatever the blocks and ranks are (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from mpi_kernels.contract import Header, Orientation
from mpi_kernels.errors import RecipeError
from mpi_kernels.fused import Quality
from mpi_kernels.merging import over_frames
from mpi_kernels.protocols import Max, Source, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.sparse_lists import Events, Rows, Sorted, binned, check_sum, in_order, most_of
from mpi_kernels.terms import Key, unique

EVENTS_AT_ONCE = 1 << 17
"""Events that are added in one go: each temporary array is then 1 MiB and stays in a core's cache."""

WORD = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)


@runtime_checkable
class SparseSource(Source, Protocol):
    """A source that knows the events of its frames."""

    def events(self, start: int, stop: int) -> Events:
        """Events of frames ``start:stop``; `MissingData` names the frame that is not there."""


def oriented(events: Events, det_shape: tuple[int, int], orientation: Orientation) -> Events:
    """Events as `plan.oriented` turns frames of ``det_shape`` pixels: transposed first, then flipped."""
    if orientation == Orientation():
        return events
    y, x = np.divmod(events.indices, det_shape[1])
    height, width = det_shape
    if orientation.transpose:
        y, x, height, width = x, y, width, height
    y = height - 1 - y if orientation.flip_y else y
    x = width - 1 - x if orientation.flip_x else x
    return events._replace(indices=y * width + x)


def densify(events: Events, out: np.ndarray) -> None:
    """Write events as frames (n, det_y, det_x), zeros where nothing was counted.

    Raises
    ------
    RecipeError
        A count does not fit the frames' type.
    """
    out[...] = 0
    pixels = int(np.prod(out.shape[1:]))
    found = in_order(events, pixels)
    most_of(found, out.dtype)
    out.reshape(len(out), pixels)[found.frame, found.pixel] = 1 if found.count is None else found.count


class SparseFused:
    """Accumulators of one rank; the same interface as `fused.Fused`, but for `add`.

    Parameters
    ----------
    wanted : iterable of Term
        Equal ones are computed once.
    header : Header
        Oriented; its pixels are unsigned integers.
    rows : int
        Frames in this rank's share.
    """

    in_file_order: ClassVar[bool] = False
    kernel = "events"
    group = 1

    def __init__(self, wanted: Iterable[Term], header: Header, rows: int) -> None:
        self.dtype = np.dtype(header.dtype)
        if self.dtype.kind != "u":
            raise RecipeError(f"events count, and {self.dtype} is no unsigned integer")
        self.terms = unique(wanted)
        self.quality = Quality()
        self._pixels = int(np.prod(header.det_shape))
        self._shape = header.det_shape
        kinds = {type(t) for t in self.terms.values()}
        self._sum = np.zeros(self._pixels, np.uint64) if Sum in kinds else None
        self._bound = 0  # all counts, in Python's integers: no pixel of _sum can hold more
        self._squares = np.zeros((2, self._pixels), np.uint64) if SumSq in kinds else None
        self._max = np.zeros(self._pixels, self.dtype) if Max in kinds else None
        self._rows = {
            k: Rows.of(t, header, rows) for k, t in self.terms.items() if not isinstance(t, Sum | SumSq | Max)
        }

    def add(self, events: Events, row: int) -> None:
        """Add the oriented events of n frames; the first one is row ``row`` of this rank's share."""
        self.quality.pixels += self._pixels * (len(events.bounds) - 1)
        for start, part in _parts(events):
            found = in_order(part, self._pixels)
            self._add(found, row + start)

    def _add(self, found: Sorted, row: int) -> None:
        most, top = most_of(found, self.dtype), np.iinfo(self.dtype).max
        total = len(found.pixel) if found.count is None else int(found.count.sum())
        full = np.diff(found.bounds) if found.count is None else found.by_frame(found.count, np.dtype(np.uint64))
        self.quality.empty_frames += found.n - int(np.count_nonzero(full))
        if most == top:
            self.quality.saturated += (
                len(found.pixel) if found.count is None else int(np.count_nonzero(found.count == top))
            )
        self._bound += total
        self._add_frames(found, most, total)
        for rows in self._rows.values():
            rows.add(found, row, most)

    def _add_frames(self, found: Sorted, most: int, total: int) -> None:
        """Add to the arrays over frames, which for counts of 1 are all made of how often each pixel is named."""
        if self._sum is None and self._squares is None and self._max is None:
            return
        if found.count is None:
            squares = sums = np.bincount(found.pixel, minlength=self._pixels).astype(np.uint64)
            largest = np.minimum(sums, np.uint64(1)).astype(self.dtype)
        else:
            sums = binned(found.pixel, found.count, self._pixels, total)
            largest = np.zeros(self._pixels, self.dtype)
            np.maximum.at(largest, found.pixel, found.count.astype(self.dtype))
        if self._sum is not None:
            check_sum(self._bound, np.dtype(np.uint64), "the sum of all frames")
            self._sum += sums
        if self._max is not None:
            np.maximum(self._max, largest, out=self._max)
        if self._squares is not None and found.count is None:
            self._carry(squares >> WORD, squares & LOW)
        elif self._squares is not None and found.count is not None:
            self._add_squares(found.pixel, found.count, most)

    def _add_squares(self, pixel: np.ndarray, count: np.ndarray, most: int) -> None:
        if most >= 1 << 32:
            raise RecipeError(f"a pixel value of {most} can't be squared exactly in 64 bits")
        squares = count * count
        high, low = binned(pixel, squares >> WORD, self._pixels, 0), binned(pixel, squares & LOW, self._pixels, 0)
        self._carry(high, low)  # below 2**32 * EVENTS_AT_ONCE each, so exact in float64

    def _carry(self, high: np.ndarray, low: np.ndarray) -> None:
        assert self._squares is not None
        self._squares[0] += high
        self._squares[1] += low
        self._squares[0] += self._squares[1] >> WORD
        self._squares[1] &= LOW

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Arrays per pixel by term on rank 0, None elsewhere; more frames may be added afterwards."""
        bounds = ranks.gather_json(self._bound)
        if bounds is not None and self._sum is not None:
            check_sum(sum(bounds), self._sum.dtype, "the sum of all frames")
        arrays = {Sum: self._sum, SumSq: self._squares, Max: self._max}
        found = over_frames(ranks, self.terms, lambda key: arrays[type(self.terms[key])])
        return None if found is None else {k: a.reshape(*a.shape[:-1], *self._shape) for k, a in found.items()}

    def rows(self, used: int) -> dict[Key, np.ndarray]:
        """Sums of this rank's first ``used`` frames, by term."""
        return {key: rows.sums[:used] for key, rows in self._rows.items()}


def _parts(events: Events) -> Iterator[tuple[int, Events]]:
    """Cut into runs of whole frames of about `EVENTS_AT_ONCE` events; gives the first frame of each."""
    bounds, start, n = events.bounds, 0, len(events.bounds) - 1
    while start < n:
        stop = int(np.searchsorted(bounds, bounds[start] + EVENTS_AT_ONCE, "right")) - 1
        stop = min(n, max(start + 1, stop))
        a, b = int(bounds[start]), int(bounds[stop])
        counts = None if events.counts is None else events.counts[a:b]
        yield start, Events(events.indices[a:b], counts, bounds[start : stop + 1] - a)
        start = stop


__all__ = ["Events", "SparseFused", "SparseSource", "densify", "oriented"]
