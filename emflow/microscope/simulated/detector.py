"""The camera: which angle each pixel sees, what arrives there, and how it is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emflow.microscope.simulated.optics import Floats

PIXELS_AT_ONCE = 1 << 18
"""Pixels that are computed in one go: about 15 ms and 10 MB, so an abort is noticed soon and memory stays small."""


@dataclass(frozen=True, slots=True)
class Camera:
    """Where the pixels of a frame look.

    Attributes
    ----------
    shape : (int, int)
        ``(det_y, det_x)``.
    scale_rad : (float, float)
        Angle per pixel; pixel ``n // 2`` is at angle 0, as in files of Nion Swift.
    bright : (det_y * det_x,) ndarray of bool
        Pixels inside the disc, its edge included.
    ay, ax : (pixels in the disc,) ndarray of float64
        Their angles, rad.
    """

    shape: tuple[int, int]
    scale_rad: tuple[float, float]
    bright: NDArray[np.bool_]
    ay: Floats
    ax: Floats

    @classmethod
    def of(cls, shape: tuple[int, int], reach_mrad: float, semi_angle_mrad: float) -> Camera:
        """A camera that sees from ``-reach_mrad`` on, with the disc in its middle."""
        scale = (2e-3 * reach_mrad / shape[0], 2e-3 * reach_mrad / shape[1])
        axes = [(np.arange(n) - n // 2) * s for n, s in zip(shape, scale, strict=True)]
        ay, ax = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
        # a hair more than the radius: 25 x 1e-3 and 25e-3 differ in the last bit
        bright = np.hypot(ay, ax) <= semi_angle_mrad * 1e-3 * (1 + 1e-9)
        return cls(shape, scale, bright, ay[bright], ax[bright])

    def expected(self, transmission: NDArray[np.float32], electrons: float, background: float) -> NDArray[np.float64]:
        """Electrons expected in each pixel.

        Parameters
        ----------
        transmission : (n, pixels in the disc) ndarray of float32
            Of the specimen where each pixel's ray meets it.
        electrons : float
            That reach the specimen in one frame.
        background : float
            Part of them that lands outside the disc, evenly.

        Returns
        -------
        (n, det_y, det_x) ndarray of float64
        """
        inside = len(self.ay)
        outside = self.bright.size - inside
        frames = np.full((len(transmission), self.bright.size), electrons * background / max(1, outside))
        frames[:, self.bright] = transmission * (electrons * (1 - background) / inside)
        return frames.reshape(-1, *self.shape)


class Counting:
    """Turns expectations into stored counts.

    Parameters
    ----------
    dtype : str
        Of the counts; more than an integer type holds saturates.
    seed : sequence of int, or None
        Of the noise: the same seed and the same calls give the same counts.  None counts without noise.
    """

    def __init__(self, dtype: str, seed: tuple[int, ...] | None) -> None:
        self._dtype = np.dtype(dtype)
        self._most = np.iinfo(self._dtype).max if self._dtype.kind == "u" else None
        self._random = None if seed is None else np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))

    def count(self, expected: NDArray[np.float64]) -> NDArray[Any]:
        """Counts of the same shape, Poisson distributed."""
        counts: NDArray[Any] = expected if self._random is None else self._random.poisson(expected)
        if self._most is not None:
            counts = np.minimum(counts if self._random is not None else np.rint(counts), self._most)
        return counts.astype(self._dtype)
