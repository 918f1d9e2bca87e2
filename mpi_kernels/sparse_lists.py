"""Lists of events, brought into order, and what sums over them are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels, Masks, Moments, Term
from mpi_kernels.weights import EXACT


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


@dataclass(frozen=True, slots=True, eq=False)
class Sorted:
    """Events of n frames as in `Events`, each pixel of a frame once and in order; counts (uint64), None: all 1."""

    pixel: np.ndarray
    count: np.ndarray | None
    bounds: np.ndarray

    @property
    def n(self) -> int:
        """Frames."""
        return len(self.bounds) - 1

    @property
    def frame(self) -> np.ndarray:
        """The frame of each event."""
        return np.repeat(np.arange(self.n, dtype=np.int64), np.diff(self.bounds))

    def by_frame(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Sum of values over each frame, (n,) in a 64-bit type that holds it."""
        sums = np.zeros(self.n, dtype)
        full = self.bounds[1:] > self.bounds[:-1]  # an empty part would not give 0 but the value that follows
        sums[full] = np.add.reduceat(values, self.bounds[:-1][full], dtype=dtype) if full.any() else 0
        return sums


@dataclass(slots=True)
class Rows:
    """Weighted sums of each frame, or sums over its regions: (rows, k)."""

    sums: np.ndarray
    columns: list[np.ndarray]
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, term: Term, header: Header, rows: int) -> Rows:
        """Empty sums of a `Masks`, `Moments` or `Labels` term for a share of ``rows`` frames."""
        if isinstance(term, Labels):
            return cls(np.zeros((rows, term.regions), np.uint64), [], term.labels.reshape(-1).astype(np.int64))
        if isinstance(term, Masks):
            columns = [_table(w) for w in term.weights.reshape(len(term.weights), -1)]
            kind = {"f": np.float64, "i": np.int64}.get(term.weights.dtype.kind, np.uint64)
        else:
            assert isinstance(term, Moments)
            columns, kind = _moments(term, header), np.uint64
        return cls(np.zeros((rows, len(columns)), kind), columns)

    def add(self, found: Sorted, row: int, most: int) -> None:
        """Fill the rows from ``row`` on; ``most`` is the largest count."""
        rows = self.sums[row : row + found.n]
        if self.labels is not None:
            self._add_regions(found, rows)
            return
        for column, weights in enumerate(self.columns):
            chosen = weights[found.pixel]
            if self.sums.dtype.kind != "f" and chosen.size:
                heaviest = max(int(chosen.max()), -int(chosen.min()))
                check_sum(
                    heaviest * most * int(np.diff(found.bounds).max()), self.sums.dtype, "a weighted sum of a frame"
                )
            if found.count is not None:
                chosen = chosen.astype(self.sums.dtype) * found.count.astype(self.sums.dtype)
            rows[:, column] = found.by_frame(chosen, self.sums.dtype)

    def _add_regions(self, found: Sorted, rows: np.ndarray) -> None:
        assert self.labels is not None
        region = self.labels[found.pixel]
        inside = region >= 0
        where = (found.frame * rows.shape[1] + region)[inside]
        if found.count is None:
            rows[...] = np.bincount(where, minlength=rows.size).reshape(rows.shape)
            return
        counts = found.count[inside]
        rows[...] = binned(where, counts, rows.size, int(counts.sum())).reshape(rows.shape)


def _table(weights: np.ndarray) -> np.ndarray:
    """Weights to look up: narrow ones as they are, since more of a narrow table is in cache; a bool as a number."""
    return weights.view(np.uint8) if weights.dtype == np.bool_ else weights


def _moments(term: Moments, header: Header) -> list[np.ndarray]:
    """Weights of total, y and x, as `protocols.Moments` defines them."""
    height, width = header.det_shape
    mask = np.ones(header.det_shape, np.uint64) if term.mask is None else term.mask.astype(np.uint64)
    y, x = np.arange(height, dtype=np.uint64)[:, None], np.arange(width, dtype=np.uint64)[None, :]
    return [mask.reshape(-1), (y * mask).reshape(-1), (x * mask).reshape(-1)]


def in_order(events: Events, pixels: int) -> Sorted:
    """Each pixel of a frame once; a quick look tells that most lists are so already."""
    pixel, bounds = events.indices, events.bounds
    counts = None if events.counts is None else events.counts.astype(np.uint64)
    rising = pixel[1:] > pixel[:-1]
    inner = bounds[1:-1]
    rising[inner[(inner > 0) & (inner < len(pixel))] - 1] = True  # from frame to frame it may fall
    if rising.all():
        return Sorted(pixel, counts, bounds)
    n = len(bounds) - 1
    key = np.repeat(np.arange(n, dtype=np.int64), np.diff(bounds)) * pixels + pixel
    order = np.argsort(key, kind="stable")
    key = key[order]
    counts = np.ones(len(key), np.uint64) if counts is None else counts[order]
    firsts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    key, counts = key[firsts], np.add.reduceat(counts, firsts)
    frame, pixel = np.divmod(key, pixels)
    return Sorted(pixel, counts, np.searchsorted(frame, np.arange(n + 1)))


def most_of(found: Sorted, dtype: np.dtype) -> int:
    """The largest count, which has to fit the pixels' type."""
    if found.count is None:
        return min(1, len(found.pixel))
    most = int(found.count.max()) if found.count.size else 0
    if most > np.iinfo(dtype).max:
        raise RecipeError(
            f"a pixel counted {most}, more than {dtype} holds", next_step="leave these data out, or count them again"
        )
    return most


def binned(where: np.ndarray, values: np.ndarray, size: int, bound: int) -> np.ndarray:
    """Sums (size,) uint64 of values by bin, none of which can exceed ``bound``: by float64 where that is exact."""
    if bound < EXACT:
        return np.bincount(where, values, size).astype(np.uint64)
    sums = np.zeros(size, np.uint64)
    np.add.at(sums, where, values)
    return sums


def check_sum(bound: int, dtype: np.dtype, what: str) -> None:
    """Raise `RecipeError` where a sum that can reach ``bound`` could leave its type."""
    if bound > np.iinfo(dtype).max:
        raise RecipeError(
            f"{what} can reach {bound}, more than {dtype} holds",
            next_step="use float weights, or leave it out of the recipe for these data",
        )
