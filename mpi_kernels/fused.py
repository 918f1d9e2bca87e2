"""All terms of a recipe in one visit of each frame.

A few frames at a time are turned into float64 and multiplied by all weights at once (BLAS).  For integer data that is
exact as long as no sum can reach 2**53, which is proven for the frames in hand from their largest value; where it
can't be proven, integer arithmetic does the same.  Either way integers are equal to the bit for every block size and
number of ranks.  Floats accumulate in float64: a weighted sum over P pixels is within ``P * 2**-52 * sum|w x|`` of the
exact one, a sum over N frames within ``N * 2**-52 * sum|x|``, whatever the blocks and ranks are.
Source of both bounds: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import RecipeError
from mpi_kernels.merging import over_frames
from mpi_kernels.protocols import Labels, Max, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.regions import Regions
from mpi_kernels.terms import Key, unique
from mpi_kernels.weights import EXACT, Weights, largest, sum_dtype

STRIP_PIXELS = 1 << 18
"""Pixels that are turned into float64 at a time (2 MiB), to stay in a core's second-level cache."""

STRIP_FRAMES = 16
"""Frames at a time at least, so that the weights of a tile of pixels are fetched from memory once for all of them."""


@dataclass(slots=True)
class Quality:
    """What the frames were like, counted while they were reduced."""

    pixels: int = 0
    not_finite: int = 0
    saturated: int = 0
    empty_frames: int = 0

    def add(self, other: Mapping[str, int]) -> None:
        """Add another rank's counts."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + other[name])


class Fused:
    """Accumulators of one rank, in numpy.

    Parameters
    ----------
    wanted : iterable of Term
        Equal ones are computed once.
    header : Header
        Oriented.
    rows : int
        Frames in this rank's share.
    """

    in_file_order: ClassVar[bool] = False
    kernel = "numpy"
    group = 1

    def __init__(self, wanted: Iterable[Term], header: Header, rows: int) -> None:
        self.dtype = np.dtype(header.dtype)
        self.terms = unique(wanted)
        self.quality = Quality()
        self._integer = self.dtype.kind in "iu"
        self._full = np.iinfo(self.dtype).max if self._integer else None
        whole = sum_dtype(self.dtype)
        self._weights = Weights.of(self.terms, header)
        self._rows = self._weights.rows(rows)
        self._regions = {k: Regions(t, whole, rows) for k, t in self.terms.items() if isinstance(t, Labels)}
        kinds = {type(t) for t in self.terms.values()}
        shape = header.det_shape
        self._sum = np.zeros(shape, whole) if Sum in kinds else None
        self._bound = 0  # of any pixel of _sum, in Python's integers
        self._squares = {
            k: _Squares(shape, t.shift, integer=self._integer) for k, t in self.terms.items() if isinstance(t, SumSq)
        }
        lowest = np.iinfo(self.dtype).min if self._integer else -np.inf
        self._max = np.full(shape, lowest, self.dtype) if Max in kinds else None
        pixels = int(np.prod(shape))
        self._step = max(STRIP_FRAMES, STRIP_PIXELS // pixels)  # frames at a time
        tile = min(pixels, STRIP_PIXELS // self._step)
        self._tiles = [slice(p, min(p + tile, pixels)) for p in range(0, pixels, tile)]
        self._strip = np.empty(self._step * tile)

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add (n, det_y, det_x) oriented frames; the first one is row ``row`` of this rank's share."""
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity in the data are counted, not announced
            self._add_strips(frames, row)

    def _add_strips(self, frames: np.ndarray, row: int) -> None:
        for start in range(0, len(frames), self._step):
            self._add(np.ascontiguousarray(frames[start : start + self._step]), row + start)

    def _add(self, frames: np.ndarray, row: int) -> None:
        flat = frames.reshape(len(frames), -1)
        top = largest(frames) if self._integer else None
        if top is not None and self._sum is not None:
            self._bound += top * len(frames)
            _check_bound(self._bound, self._sum.dtype)
        sums = sum(self._add_tile(flat[:, tile], tile, top) for tile in self._tiles)
        assert isinstance(sums, np.ndarray)
        self._weights.store(sums, flat, top, self._rows[:, row : row + len(frames)])
        self._look(frames, sums[:, 0], top)
        for regions in self._regions.values():
            regions.add(flat, row, top)
        if self._max is not None:
            np.maximum(self._max, frames.max(axis=0), out=self._max)

    def _add_tile(self, pixels: np.ndarray, tile: slice, top: int | None) -> np.ndarray:
        """Add some pixels of a few frames to the sums over frames; return their weighted sums (n, k)."""
        strip = self._strip[: pixels.size].reshape(pixels.shape)
        strip[...] = pixels
        sums = self._weights.sums(strip, tile, finite=self._integer)
        if self._sum is not None:
            part = self._sum.reshape(-1)[tile]
            if top is None or top * len(pixels) < EXACT:
                part += strip.sum(axis=0).astype(part.dtype)
            else:
                part += pixels.sum(axis=0, dtype=part.dtype)
        for number, squares in enumerate(self._squares.values(), 1):  # last: they overwrite the strip
            squares.add(pixels, strip if number == len(self._squares) else strip.copy(), tile, top)
        return sums

    def _look(self, frames: np.ndarray, totals: np.ndarray, top: int | None) -> None:
        self.quality.pixels += frames.size
        if top is None and not np.isfinite(totals).all():
            self.quality.not_finite += int(frames.size - np.count_nonzero(np.isfinite(frames)))
        if top is not None and top >= (self._full or 0):
            self.quality.saturated += int(np.count_nonzero(frames == self._full))
        for frame in frames[totals == 0]:
            self.quality.empty_frames += not frame.any()

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Arrays per pixel by term on rank 0, None elsewhere; more frames may be added afterwards."""
        bounds = ranks.gather_json(self._bound)
        if bounds is not None and self._sum is not None and self._integer:
            _check_bound(sum(bounds), self._sum.dtype)
        return over_frames(ranks, self.terms, self._array)

    def _array(self, key: Key) -> np.ndarray | None:
        if key in self._squares:
            return self._squares[key].sum
        return self._sum if isinstance(self.terms[key], Sum) else self._max

    def rows(self, used: int) -> dict[Key, np.ndarray]:
        """Sums of this rank's first ``used`` frames, by term."""
        found = {k: regions.rows[:used] for k, regions in self._regions.items()}
        columns = self._rows[:, :used]
        return found | {k: self._weights.take(columns, k) for k in self._weights.terms}


class _Squares:
    """Sum of squares of every pixel; exact for integers as words ``high * 2**32 + low``."""

    def __init__(self, shape: tuple[int, int], shift: np.ndarray | None, *, integer: bool) -> None:
        self._integer = integer
        self._shift = None if shift is None else shift.reshape(-1)
        self.sum = np.zeros((2, *shape), np.uint64) if integer else np.zeros(shape)

    def add(self, pixels: np.ndarray, strip: np.ndarray, tile: slice, top: int | None) -> None:
        """Add pixels of a tile (n, p), given also as float64 in ``strip``, which is overwritten."""
        if self._shift is not None:
            strip -= self._shift[tile]
        if top is None or top * top * len(strip) < EXACT:
            added = np.multiply(strip, strip, out=strip).sum(axis=0)
            if self._integer:
                self._carry(added.astype(np.uint64), tile)
            else:
                self.sum.reshape(-1)[tile] += added
            return
        if top >= 1 << 32:
            raise RecipeError(
                f"a pixel value of {top} can't be squared exactly in 64 bits",
                next_step="leave the variance out of the recipe for these data",
            )
        for frame in pixels:
            magnitude = np.abs(frame.astype(np.int64)).astype(np.uint64)
            self._carry(magnitude * magnitude, tile)

    def _carry(self, added: np.ndarray, tile: slice) -> None:
        high, low = self.sum.reshape(2, -1)[:, tile]
        low += added & np.uint64(0xFFFFFFFF)
        high += (added >> np.uint64(32)) + (low >> np.uint64(32))
        low &= np.uint64(0xFFFFFFFF)


def _check_bound(bound: int, dtype: np.dtype) -> None:
    if bound > np.iinfo(dtype).max:
        raise RecipeError(
            f"the sum of all frames can reach {bound}, more than {dtype} holds",
            next_step="leave the sum out of the recipe for these data",
        )
