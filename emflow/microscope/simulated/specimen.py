"""The specimen: a periodic map of transmission, made from a seed and sampled anywhere."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emflow.microscope.simulated.optics import Aberrations, Floats, rays

SIDE = 1024
PIXEL_NM = 0.25
"""The map of a grown specimen has a period of 256 nm; a scan that is larger sees it repeat."""

THINNEST = 0.4
"""Least transmission."""

COVER = 0.35
"""Area of all particles as part of the map's."""

EDGE_NM = 0.35
TEXTURE_NM = 0.7
TEXTURE = 0.035
"""Width of a particle's edge and of the support's grains (standard deviations), and the support's rms contrast."""


class Specimen:
    """A periodic map, bilinear between its points.

    Parameters
    ----------
    transmission : (n, n) ndarray of float32
        Part of the electrons that pass undeflected; n is a power of two.
    pixel_nm : float
        Distance of two points of the map; point (0, 0) is at position (0, 0).
    """

    def __init__(self, transmission: Floats, pixel_nm: float) -> None:
        side = len(transmission)
        if transmission.shape != (side, side) or side & (side - 1):
            raise ValueError(f"a map of shape {transmission.shape}: it must be square, with a power of two points")
        self.transmission = np.array(transmission, np.float32)
        self.transmission.flags.writeable = False
        self.pixel_nm = pixel_nm
        self.period_nm = side * pixel_nm
        self._side = side
        # one more row and column, so that the neighbours of the last point need no wrapping
        self._flat = np.pad(self.transmission, (0, 1), mode="wrap").ravel()

    def sample(self, y_nm: Floats, x_nm: Floats, gy_nm: Floats, gx_nm: Floats) -> NDArray[np.float32]:
        """Transmission at every position and offset.

        Parameters
        ----------
        y_nm, x_nm : (n,) ndarray of float64
            Positions on the specimen.
        gy_nm, gx_nm : (m,) ndarray of float64
            Offsets added to each of them.

        Returns
        -------
        (n, m) ndarray of float32
            Bilinear between the map's four points around each.
        """
        y, iy = self._split(y_nm, gy_nm)
        x, ix = self._split(x_nm, gx_nm)
        width = self._side + 1
        index = (iy * width + ix).astype(np.intp)
        upper = self._flat.take(index, mode="clip")
        lower = self._flat.take(index + width, mode="clip")
        upper += x * (self._flat.take(index + 1, mode="clip") - upper)
        lower += x * (self._flat.take(index + (width + 1), mode="clip") - lower)
        upper += y * (lower - upper)
        return upper

    def _split(self, position_nm: Floats, offset_nm: Floats) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Fraction of a pixel, and pixel within the period, (n, m); float32 holds a position to 1e-4 nm."""
        inside = np.mod(position_nm, self.period_nm) / self.pixel_nm
        at = inside.astype(np.float32)[:, None] + (np.mod(offset_nm, self.period_nm) / self.pixel_nm).astype(np.float32)
        whole = np.floor(at)
        at -= whole
        return at, whole.astype(np.int32) & (self._side - 1)

    def blurred(self, aberrations: Aberrations, semi_angle_mrad: float) -> Specimen:
        """What a probe sees of it: the mean over all rays of the disc.

        Notes
        -----
        ``mean over a of S(r + g(a))``, as a product of Fourier transforms: the probe of geometrical optics.
        Diffraction (0.1 nm at 25 mrad and 100 kV) is less than a point of the map and left out.
        """
        side = self._side
        gy, gx = aberrations.gradient(*rays(semi_angle_mrad))
        probe = np.zeros(side * side)
        y, x = gy / self.pixel_nm, gx / self.pixel_nm
        iy, ix = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
        for dy, wy in ((0, 1 - (y - iy)), (1, y - iy)):
            for dx, wx in ((0, 1 - (x - ix)), (1, x - ix)):
                index = ((iy + dy) % side) * side + (ix + dx) % side
                probe += np.bincount(index, wy * wx, side * side)
        spectrum = np.fft.rfft2(self.transmission) * np.conj(np.fft.rfft2(probe.reshape(side, side)))
        seen = np.fft.irfft2(spectrum, (side, side)) / len(gy)
        return Specimen(seen.astype(np.float32), self.pixel_nm)


@functools.lru_cache(maxsize=4)
def grow(seed: int) -> Specimen:
    """A support with grains and, on it, round particles of 2 to 6 nm; the same seed gives the same."""
    random = np.random.default_rng([seed, 1])
    thickness = np.zeros((SIDE, SIDE))
    covered, wanted = 0.0, COVER * (SIDE * PIXEL_NM) ** 2
    while covered < wanted:
        radius = random.uniform(1.0, 3.0)
        covered += np.pi * radius**2
        _add_particle(thickness, random.uniform(0, SIDE, 2), radius / PIXEL_NM, random.uniform(0.25, 0.7))
    grains = _smoothed(random.standard_normal((SIDE, SIDE)), TEXTURE_NM)
    grains *= TEXTURE / grains.std()
    transmission = 0.93 * np.exp(-_smoothed(thickness, EDGE_NM)) + grains
    return Specimen(np.clip(transmission, THINNEST, 1.0).astype(np.float32), PIXEL_NM)


def _add_particle(thickness: NDArray[Any], centre: NDArray[Any], radius: float, depth: float) -> None:
    """Add the projection of a ball, ``depth`` at its middle; lengths in points of the map, which is periodic."""
    reach = int(radius) + 1
    near = np.floor(centre).astype(int)
    y, x = (near[i] + np.arange(-reach, reach + 2) for i in (0, 1))
    far = ((y - centre[0]) ** 2)[:, None] + (x - centre[1]) ** 2
    thickness[np.ix_(y % SIDE, x % SIDE)] += depth * np.sqrt(np.clip(1 - far / radius**2, 0, None))


def _smoothed(image: NDArray[Any], sigma_nm: float) -> NDArray[Any]:
    """Convolved with a Gaussian, periodic."""
    ky, kx = np.fft.fftfreq(SIDE, PIXEL_NM), np.fft.rfftfreq(SIDE, PIXEL_NM)
    passed = np.exp(-2 * (np.pi * sigma_nm) ** 2 * (ky[:, None] ** 2 + kx**2))
    smooth: NDArray[Any] = np.fft.irfft2(np.fft.rfft2(image) * passed, image.shape)
    return smooth
