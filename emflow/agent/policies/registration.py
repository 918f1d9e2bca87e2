"""Shifts between many pairs of images at once, to a fraction of a pixel; numpy only."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

CUT_OFF = 0.2
"""Width (standard deviation, cycles per pixel) of the Gaussian weight of spatial frequencies: near Nyquist, 0.5, an
image with shot noise holds little else, and interpolated images nothing true."""

UPSAMPLING = (4, 16)
"""The peak is found to whole pixels, then on grids of these fractions of a pixel, and last on a parabola."""


@dataclass(frozen=True, slots=True)
class Shifts:
    """What `register` found.

    Attributes
    ----------
    shifts : (k, 2) ndarray of float64
        ``d`` in pixels, ``(y, x)``, with ``image(r) = reference(r + d)``.
    correlations : (k,) ndarray of float64
        Normalised correlation at that shift, of the windowed images, -1 to 1.
    at_limit : (k,) ndarray of bool
        The peak is on the edge of the search, so it may be none.
    """

    shifts: np.ndarray
    correlations: np.ndarray
    at_limit: np.ndarray


@functools.cache
def window(shape: tuple[int, int]) -> np.ndarray:
    """Hann window of an image, (ny, nx) float64, whose outermost samples are not zero."""
    y, x = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in shape)
    outer: np.ndarray = y[:, None] * x[None, :]
    outer.flags.writeable = False
    return outer


@functools.cache
def weights(shape: tuple[int, int]) -> np.ndarray:
    """Weight of each frequency of `numpy.fft.rfft2`, (ny, nx // 2 + 1) float64, for sums over the half plane.

    Frequencies that stand for themselves and their negative count twice; frequency 0 not at all.
    """
    ky, kx = np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1])
    found: np.ndarray = np.exp(-(ky[:, None] ** 2 + kx[None, :] ** 2) / (2 * CUT_OFF**2))
    twice = np.full(len(kx), 2.0)
    twice[0] = 1.0
    if shape[1] % 2 == 0:
        twice[-1] = 1.0
    found = found * twice
    found[0, 0] = 0.0
    found.flags.writeable = False
    return found


def spectra(images: np.ndarray) -> np.ndarray:
    """Fourier transforms of images less their windowed mean, times the window.

    Parameters
    ----------
    images : (k, ny, nx) ndarray of float64

    Returns
    -------
    (k, ny, nx // 2 + 1) ndarray of complex128
    """
    w = window((images.shape[1], images.shape[2]))
    means = np.tensordot(images, w, axes=([1, 2], [0, 1])) / w.sum()
    found: np.ndarray = np.fft.rfft2((images - means[:, None, None]) * w)
    return found


def register(images: np.ndarray, references: np.ndarray, shape: tuple[int, int], limit: int) -> Shifts:
    """Shift of each image against its own reference.

    Parameters
    ----------
    images, references : (k, ny, nx // 2 + 1) ndarray of complex128
        From `spectra`.
    shape : (int, int)
        ``(ny, nx)`` of the images.
    limit : int
        Largest shift that is looked for, in pixels along each axis.

    Notes
    -----
    The peak of the cross-correlation to whole pixels, then the correlation on finer grids around it as two products
    with small matrices instead of a padded transform.  Source: Guizar-Sicairos, Thurman and Fienup 2008,
    doi:10.1364/OL.33.000156.
    """
    weight = weights(shape)
    cross = np.conj(images) * references * weight
    norms = np.sqrt(_power(images, weight) * _power(references, weight))
    peaks, at_limit = _whole(cross, shape, limit)
    found = peaks.astype(np.float64)
    values = np.zeros(len(found))
    step = 1.0
    for fraction in UPSAMPLING:
        reach, step = step, 1.0 / fraction
        found, values = _finer(cross, shape, found, step, round(reach / step))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.where(norms > 0, values / norms, 0.0)
    return Shifts(found, correlations, at_limit)


def _power(transforms: np.ndarray, weight: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.tensordot(np.abs(transforms) ** 2, weight, axes=([1, 2], [0, 1]))
    return found


def _whole(cross: np.ndarray, shape: tuple[int, int], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Peaks to whole pixels, (k, 2) int, and which lie on the edge of the search."""
    half = np.ones(cross.shape[2])
    half[1 : (shape[1] + 1) // 2] = 2.0  # `weights` counted them twice; irfft2 does so itself
    correlation = np.fft.irfft2(cross / half, s=shape)
    limits = [min(limit, (n - 1) // 2) for n in shape]
    rows, columns = (np.arange(-m, m + 1) for m in limits)
    near = correlation[:, rows[:, None], columns[None, :]].reshape(len(cross), -1)
    best = near.argmax(axis=1)
    peaks = np.stack([rows[best // len(columns)], columns[best % len(columns)]], axis=1)
    return peaks, (np.abs(peaks) >= limits).any(axis=1)


def _finer(
    cross: np.ndarray, shape: tuple[int, int], around: np.ndarray, step: float, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Peaks of the correlation on a grid of ``step`` pixels, ``reach`` steps to each side, and on a parabola there.

    Returns
    -------
    (k, 2) and (k,) ndarray of float64
        Peaks in pixels, and the correlation (not normalised) on the grid's best point.
    """
    ky, kx = np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1])
    offsets = np.arange(-reach, reach + 1) * step
    # the turn to each pair's own centre, then one grid for all of them
    turned = cross * np.exp(2j * np.pi * ky * around[:, :1])[:, :, None]
    turned *= np.exp(2j * np.pi * kx * around[:, 1:])[:, None, :]
    grid = np.exp(2j * np.pi * offsets[:, None] * ky) @ turned @ np.exp(2j * np.pi * kx[:, None] * offsets)
    values = grid.real
    inner = values[:, 1:-1, 1:-1].reshape(len(cross), -1)
    best = inner.argmax(axis=1)
    y, x = best // (2 * reach - 1) + 1, best % (2 * reach - 1) + 1
    k = np.arange(len(cross))
    top = values[k, y, x]
    peak_y = offsets[y] + step * _vertex(values[k, y - 1, x], top, values[k, y + 1, x])
    peak_x = offsets[x] + step * _vertex(values[k, y, x - 1], top, values[k, y, x + 1])
    return around + np.stack([peak_y, peak_x], axis=1), top


def _vertex(before: np.ndarray, at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Place of the vertex of a parabola through three equidistant values, in steps from the middle, -1 to 1."""
    curvature = before - 2 * at + after
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(curvature < 0, (before - after) / (2 * curvature), 0.0)
    return np.clip(found, -1.0, 1.0)
