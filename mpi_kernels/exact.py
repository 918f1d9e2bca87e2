"""Scans whose every answer is known: an integer pattern, shifted by sixteenths of a pixel with integer weights.

A frame is ``gain x shift(base)``: bilinear weights of a shift by ``k/16`` pixel, times 256, are integers.  So each
total is exactly ``gain x 256 x sum(base)`` and each centre of mass exactly that of the base plus the shift, as long as
nothing leaves the frame, which the margins of the base ensure.  Every rank can make its own frames.
"""

from __future__ import annotations

import math

import numpy as np

MARGIN = 3
"""Largest shift, pixels, where the detector has room for it."""

_CACHE_BYTES = 64 << 20


class ExactScan:
    """A scan of known frames.

    Parameters
    ----------
    scan_shape : tuple of int
        ``()`` for an image, ``(n,)`` for a stack, ``(scan_y, scan_x)``.
    det_shape : (int, int)
        ``(det_y, det_x)``.
    dtype : str
        Pixels; 8-bit types are shifted by whole pixels only, since the weights need 8 bits themselves.
    seed : int
        Chooses the speckle of the base and where the shifts start.
    empty_every : int
        Each frame of this stride has no counts at all; 0 for none.

    Attributes
    ----------
    base : (det_y, det_x) ndarray of int64
        Disc, ring, speckle and a bright corner that breaks every symmetry.
    steps : int
        Shifts are multiples of ``1/steps`` pixel.
    """

    def __init__(
        self,
        scan_shape: tuple[int, ...],
        det_shape: tuple[int, int],
        dtype: str = "uint16",
        seed: int = 0,
        empty_every: int = 0,
    ) -> None:
        self.scan_shape, self.det_shape = tuple(scan_shape), (det_shape[0], det_shape[1])
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.seed, self.empty_every = seed, empty_every
        self.count = math.prod(self.scan_shape)
        self.steps = 1 if self.dtype.itemsize == 1 or self.dtype == np.float16 else 16
        self.margin = tuple(min(MARGIN, (n - 1) // 3) for n in self.det_shape)
        self._peak = 30 if self.dtype.kind == "i" and self.dtype.itemsize <= 2 else 60
        self.base = self._make_base()
        self._parts: dict[tuple[int, int], np.ndarray] = {}

    def _make_base(self) -> np.ndarray:
        base = np.zeros(self.det_shape, np.int64)
        my, mx = self.margin
        inner = base[my : self.det_shape[0] - my, mx : self.det_shape[1] - mx]
        y, x = np.indices(inner.shape)
        far = np.hypot(y - (inner.shape[0] - 1) / 2, x - (inner.shape[1] - 1) / 2)
        radius = max(1.0, min(inner.shape) / 4)
        speckle = np.random.default_rng(self.seed).integers(0, 4, inner.shape)
        inner[...] = speckle + np.where(far <= radius, self._peak // 2, 0)
        inner += np.where(np.abs(far - 1.6 * radius) <= 1, self._peak // 4, 0)
        inner[0, 0] = self._peak
        return base

    def shifts(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Shift of each frame: (n, 2) int64, ``(y, x)`` in units of ``1/steps`` pixel."""
        index, row = self._index(start, stop)
        reach = [m * self.steps for m in self.margin]
        ky = (7 * index + 3 * row + self.seed) % (2 * reach[0] + 1) - reach[0]
        kx = (5 * index + 11 * row + 2 * self.seed) % (2 * reach[1] + 1) - reach[1]
        return np.stack([ky, kx], axis=1)

    def gains(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Brightness of each frame: (n,) int64, 1 to 4, or 0 where it has no counts."""
        index, row = self._index(start, stop)
        gain: np.ndarray = 1 + (index + 2 * row) % 4
        if self.empty_every:
            gain[index % self.empty_every == self.empty_every - 1] = 0
        return gain

    def _index(self, start: int, stop: int | None) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(start, self.count if stop is None else stop, dtype=np.int64)
        return index, index // (self.scan_shape[-1] if len(self.scan_shape) == 2 else 1)

    def frame(self, i: int) -> np.ndarray:
        """One frame: (det_y, det_x) in ``dtype``."""
        return np.asarray(self.frames(i, i + 1)[0])

    def frames(self, start: int, stop: int) -> np.ndarray:
        """Frames ``start:stop``: (n, det_y, det_x) in ``dtype``."""
        out = np.zeros((stop - start, *self.det_shape), self.dtype)
        height, width = self.det_shape
        for frame, (ky, kx), gain in zip(out, self.shifts(start, stop), self.gains(start, stop), strict=True):
            (iy, a), (ix, b) = divmod(int(ky), self.steps), divmod(int(kx), self.steps)
            part = self._part(a, b)
            ty, tx = slice(max(0, iy), min(height, height + iy)), slice(max(0, ix), min(width, width + ix))
            fy, fx = slice(max(0, -iy), min(height, height - iy)), slice(max(0, -ix), min(width, width - ix))
            np.multiply(part[fy, fx], self.dtype.type(gain), out=frame[ty, tx])
        return out

    def _part(self, a: int, b: int) -> np.ndarray:
        """The base shifted by ``(a, b)`` steps, both less than a pixel, times ``steps`` squared, in ``dtype``."""
        part = self._parts.get((a, b))
        if part is None:
            s = self.steps
            right = (s - b) * self.base + b * np.roll(self.base, 1, axis=1)
            part = ((s - a) * right + a * np.roll(right, 1, axis=0)).astype(self.dtype)
            if (len(self._parts) + 1) * part.nbytes <= _CACHE_BYTES:
                self._parts[a, b] = part
        return part

    # What every reduction must give; none of it adds up frames.

    def totals(self) -> np.ndarray:
        """Sum of each frame: (frames,) int64."""
        return self.gains() * (self.steps**2 * int(self.base.sum()))

    def centre_of_mass(self) -> np.ndarray:
        """Centre of mass of each frame: (frames, 2) float64, ``(y, x)`` in pixels, NaN where no count fell."""
        y, x = np.indices(self.det_shape)
        total = int(self.base.sum())
        base = np.array([int((self.base * y).sum()) / total, int((self.base * x).sum()) / total])
        found = base + self.shifts() / self.steps
        found[self.gains() == 0] = np.nan
        return found

    def sum_frame(self) -> np.ndarray:
        """Sum of all frames: (det_y, det_x) int64; the base convolved with the histogram of the shifts."""
        (my, mx), total = self.margin, np.zeros(self.det_shape, np.int64)
        weights = np.zeros((2 * my + 2, 2 * mx + 2), np.int64)
        for (iy, ix), weight in self._corners(self.gains()):
            np.add.at(weights, (iy + my, ix + mx), weight)
        for dy, dx in np.argwhere(weights):
            total += weights[dy, dx] * np.roll(self.base, (dy - my, dx - mx), axis=(0, 1))
        return total

    def virtual(self, mask: np.ndarray) -> np.ndarray:
        """Counts of each frame under a mask: (frames,) int64; the mask is moved, not the frame.

        Parameters
        ----------
        mask : (det_y, det_x) ndarray of bool or int
            Weights.
        """
        (my, mx), weights = self.margin, np.asarray(mask, np.int64)
        overlap = np.zeros((2 * my + 2, 2 * mx + 2), np.int64)
        for dy, dx in np.ndindex(overlap.shape):
            overlap[dy, dx] = (self.base * np.roll(weights, (my - dy, mx - dx), axis=(0, 1))).sum()
        found = np.zeros(self.count, np.int64)
        for (iy, ix), weight in self._corners(self.gains()):
            found += weight * overlap[iy + my, ix + mx]
        return found

    def _corners(self, gains: np.ndarray) -> list[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
        """The four whole-pixel shifts that each frame is made of, and their weights."""
        whole, rest = np.divmod(self.shifts(), self.steps)
        (a, b), s = rest.T, self.steps
        return [
            ((whole[:, 0] + dy, whole[:, 1] + dx), gains * (a if dy else s - a) * (b if dx else s - b))
            for dy in (0, 1)
            for dx in (0, 1)
        ]


def disc(det_shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """Pixels within ``radius`` of ``centre`` (y, x), edge included: (det_y, det_x) bool."""
    y, x = np.indices(det_shape)
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
