"""All terms of a recipe from lists of events: counted data are reduced without ever making frames of them.

Integers are equal to the bit to what `fused.Fused` finds on the dense frames.  Sums with float weights add the events
of a frame in order of their pixels in float64, so they are within ``n * 2**-52 * sum|w x|`` of the exact ones for n
events, whatever the blocks and ranks are (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mpi_kernels.contract import Header, Orientation
from mpi_kernels.errors import RecipeError
from mpi_kernels.fused import Quality
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Source, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key, unique
from mpi_kernels.weights import EXACT

EVENTS_AT_ONCE = 1 << 20
"""Events that are added in one go; bounds the temporaries to some 64 MiB."""

WORD = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)


class Events(NamedTuple):
    """The pixels of consecutive frames that counted anything.

    Attributes
    ----------
    indices : (m,) ndarray of int64
        Pixel of each event, counted through the frame in C order; frame after frame.
    counts : (m,) ndarray of uint32, optional
        What each counted; None: 1.  A pixel that is named twice in a frame counted both.
    bounds : (n + 1,) ndarray of int64
        Events of frame i are ``bounds[i]:bounds[i + 1]``.
    """

    indices: np.ndarray
    counts: np.ndarray | None
    bounds: np.ndarray


@runtime_checkable
class SparseSource(Source, Protocol):
    """A source that knows the events of its frames."""

    def events(self, start: int, stop: int) -> Events:
        """Events of frames ``start:stop``; `MissingData` names the frame that is not there."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sorted:
    """Events of n frames, each pixel of a frame once, in order: frame, pixel, and count (uint64)."""

    frame: np.ndarray
    pixel: np.ndarray
    count: np.ndarray
    n: int


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
    found = _sorted(events, pixels)
    if found.count.size and int(found.count.max()) > np.iinfo(out.dtype).max:
        raise RecipeError(f"a pixel counted {int(found.count.max())}, more than {out.dtype} holds")
    out.reshape(len(out), pixels)[found.frame, found.pixel] = found.count


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
            k: _Rows.of(t, header, rows) for k, t in self.terms.items() if not isinstance(t, Sum | SumSq | Max)
        }

    def add(self, events: Events, row: int) -> None:
        """Add the oriented events of n frames; the first one is row ``row`` of this rank's share."""
        self.quality.pixels += self._pixels * (len(events.bounds) - 1)
        for start, part in _parts(events):
            found = _sorted(part, self._pixels)
            self._add(found, row + start)

    def _add(self, found: _Sorted, row: int) -> None:
        most = int(found.count.max()) if found.count.size else 0
        if most > np.iinfo(self.dtype).max:
            raise RecipeError(f"a pixel counted {most}, more than {self.dtype} holds")
        total = int(found.count.sum())
        self.quality.saturated += int(np.count_nonzero(found.count == np.iinfo(self.dtype).max))
        self.quality.empty_frames += found.n - int(np.count_nonzero(_by_frame(found, found.count, total)))
        self._bound += total
        if self._sum is not None:
            _check(self._bound, np.dtype(np.uint64), "the sum of all frames")
            self._sum += _binned(found.pixel, found.count, self._pixels, total)
        if self._squares is not None:
            self._add_squares(found, most)
        if self._max is not None:
            np.maximum.at(self._max, found.pixel, found.count.astype(self.dtype))
        for rows in self._rows.values():
            rows.add(found, row, most)

    def _add_squares(self, found: _Sorted, most: int) -> None:
        assert self._squares is not None
        if most >= 1 << 32:
            raise RecipeError(f"a pixel value of {most} can't be squared exactly in 64 bits")
        squares = found.count * found.count
        high, low = self._squares
        if most * most * found.count.size < EXACT:
            added = _binned(found.pixel, squares, self._pixels, 0)
            high += added >> WORD
            low += added & LOW
        else:
            np.add.at(high, found.pixel, squares >> WORD)
            np.add.at(low, found.pixel, squares & LOW)
        high += low >> WORD
        low &= LOW

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Whole arrays by term on rank 0, rows of frames flat along their first axis; None elsewhere."""
        bounds = ranks.gather_json(self._bound)
        if bounds is not None and self._sum is not None:
            _check(sum(bounds), self._sum.dtype, "the sum of all frames")
        found: dict[Key, np.ndarray | None] = {}
        for key, term in self.terms.items():
            match term:
                case Sum():
                    assert self._sum is not None
                    found[key] = ranks.reduce(self._sum.reshape(self._shape), "sum")
                case SumSq():
                    found[key] = self._merged_squares(ranks)
                case Max():
                    assert self._max is not None
                    found[key] = ranks.reduce(self._max.reshape(self._shape), "max")
                case _:
                    found[key] = ranks.gather_rows(self._rows[key].sums)
        return None if ranks.rank else {k: v for k, v in found.items() if v is not None}

    def _merged_squares(self, ranks: Ranks) -> np.ndarray | None:
        assert self._squares is not None
        merged = ranks.reduce(self._squares.reshape(2, *self._shape), "sum")
        if merged is not None:
            merged[0] += merged[1] >> WORD
            merged[1] &= LOW
        return merged


@dataclass(slots=True)
class _Rows:
    """Weighted sums of each frame, or sums over its regions: (rows, k)."""

    sums: np.ndarray
    columns: list[np.ndarray]
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, term: Term, header: Header, rows: int) -> _Rows:
        if isinstance(term, Labels):
            return cls(np.zeros((rows, term.regions), np.uint64), [], term.labels.reshape(-1).astype(np.int64))
        if isinstance(term, Masks):
            columns = list(term.weights.reshape(len(term.weights), -1))
            kind = {"f": np.float64, "i": np.int64}.get(term.weights.dtype.kind, np.uint64)
        else:
            assert isinstance(term, Moments)
            columns, kind = _moments(term, header), np.uint64
        return cls(np.zeros((rows, len(columns)), kind), columns)

    def add(self, found: _Sorted, row: int, most: int) -> None:
        rows = self.sums[row : row + found.n]
        if self.labels is not None:
            self._add_regions(found, rows)
            return
        for column, weights in enumerate(self.columns):
            chosen = weights[found.pixel]
            if self.sums.dtype.kind == "f":
                products = chosen.astype(np.float64) * found.count.astype(np.float64)
                rows[:, column] = np.bincount(found.frame, products, found.n)
                continue
            wide = chosen.astype(np.int64 if chosen.dtype.kind == "i" else np.uint64)
            heaviest = max(int(wide.max()), -int(wide.min())) if wide.size else 0
            _check(heaviest * most, self.sums.dtype, "a weighted pixel")
            bound = heaviest * int(found.count.sum())
            rows[:, column] = _by_frame(found, wide * found.count.astype(wide.dtype), bound)

    def _add_regions(self, found: _Sorted, rows: np.ndarray) -> None:
        assert self.labels is not None
        region = self.labels[found.pixel]
        inside = region >= 0
        where = found.frame[inside] * rows.shape[1] + region[inside]
        counts = found.count[inside]
        rows[...] = _binned(where, counts, rows.size, int(counts.sum())).reshape(rows.shape)


def _moments(term: Moments, header: Header) -> list[np.ndarray]:
    """Weights of total, y and x, as `protocols.Moments` defines them."""
    height, width = header.det_shape
    mask = np.ones(header.det_shape, np.uint64) if term.mask is None else term.mask.astype(np.uint64)
    y, x = np.arange(height, dtype=np.uint64)[:, None], np.arange(width, dtype=np.uint64)[None, :]
    return [mask.reshape(-1), (y * mask).reshape(-1), (x * mask).reshape(-1)]


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


def _sorted(events: Events, pixels: int) -> _Sorted:
    """Each pixel of a frame once; a quick look tells that most lists are so already."""
    n = len(events.bounds) - 1
    frame = np.repeat(np.arange(n, dtype=np.int64), np.diff(events.bounds))
    counts = np.ones(len(frame), np.uint64) if events.counts is None else events.counts.astype(np.uint64)
    key = frame * pixels + events.indices
    if len(key) > 1 and not (key[1:] > key[:-1]).all():
        order = np.argsort(key, kind="stable")
        key, counts = key[order], counts[order]
        firsts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        key, counts = key[firsts], np.add.reduceat(counts, firsts)
    frame, pixel = np.divmod(key, pixels)
    return _Sorted(frame, pixel, counts, n)


def _binned(where: np.ndarray, values: np.ndarray, size: int, bound: int) -> np.ndarray:
    """Sums (size,) uint64 of values by bin, none of which can exceed ``bound``: by float64 where that is exact."""
    if bound < EXACT:
        return np.bincount(where, values, size).astype(np.uint64)
    sums = np.zeros(size, np.uint64)
    np.add.at(sums, where, values)
    return sums


def _by_frame(found: _Sorted, values: np.ndarray, bound: int) -> np.ndarray:
    """Sum of values over each frame, in their own type."""
    if bound < EXACT:
        return np.bincount(found.frame, values, found.n).astype(values.dtype)
    _check(bound, values.dtype, "a weighted sum of a frame")
    sums = np.zeros(found.n, values.dtype)
    np.add.at(sums, found.frame, values)
    return sums


def _check(bound: int, dtype: np.dtype, what: str) -> None:
    if bound > np.iinfo(dtype).max:
        raise RecipeError(
            f"{what} can reach {bound}, more than {dtype} holds",
            next_step="use float weights, or leave it out of the recipe for these data",
        )
