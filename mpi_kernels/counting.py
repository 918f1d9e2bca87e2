"""Electron counting: which pixels of a frame were hit, and the thresholds between noise, electrons and x-rays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

FIT_ROUNDS = 100
"""Steps of the fit at most; from the start below it takes about ten."""

NEIGHBOURS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))
"""The eight around a pixel; the first four come before it, row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Where electrons begin and end, and what they were derived from.

    Attributes
    ----------
    background, x_ray : float
        An electron is above the one and below the other; in the data's unit, dark reference subtracted.
    noise_mean, noise_sigma : float
        Of the readout noise; NaN where both thresholds were given.
    method : {"given", "gaussian", "quantiles"}
        ``gaussian``: the fit.  ``quantiles``: the fit found no peak, so median and 16 % quantile stand for it.
    """

    background: float
    x_ray: float
    noise_mean: float = float("nan")
    noise_sigma: float = float("nan")
    method: Literal["given", "gaussian", "quantiles"] = "given"


def subtracted(frames: np.ndarray, dark: np.ndarray | None) -> np.ndarray:
    """Frames less the dark reference, float32 up to 16 bits per pixel, else float64; as they are without one.

    Parameters
    ----------
    frames : (n, det_y, det_x) ndarray
    dark : (det_y, det_x) ndarray, optional
        Mean dark frame.
    """
    if dark is None:
        return frames
    kind = np.float32 if frames.dtype.itemsize <= 2 else np.float64
    less: np.ndarray = np.subtract(frames, dark, dtype=kind)
    return less


def events(
    frames: np.ndarray, background: float, x_ray: float, dark: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the electrons of each frame.

    Parameters
    ----------
    frames : (n, det_y, det_x) ndarray
        At most 2**32 pixels each.
    background, x_ray : float
        A hit has ``background < value < x_ray``, and is the largest of the 3 x 3 pixels around it.
    dark : (det_y, det_x) ndarray, optional
        Subtracted first.

    Returns
    -------
    counts : (n,) ndarray of int64
    pixels : (sum of counts,) ndarray of uint32
        Flat indices, frame by frame, ascending.

    Notes
    -----
    Of two equal neighbours the first, row by row, is the hit.  Outside the frame there is nothing, and a NaN is
    nothing.  The skirt of an x-ray is no electron, since its neighbour is larger.
    Source of the rule: Ercius et al. 2024, doi:10.1093/mam/ozae086, and stempy, which differs for equal neighbours
    (counts neither) and at the frame's edge (looks across it at the opposite one).
    """
    n, height, width = frames.shape
    flat = subtracted(frames, dark).reshape(n, -1)
    with np.errstate(invalid="ignore"):
        which, at = np.nonzero((flat > background) & (flat < x_ray))
    row, column = np.divmod(at, width)
    values, keep = flat[which, at], np.ones(len(at), np.bool_)
    for number, (y, x) in enumerate(NEIGHBOURS):
        inside = (row + y >= 0) & (row + y < height) & (column + x >= 0) & (column + x < width)
        beside = flat[which, np.where(inside, at + y * width + x, at)]
        larger = beside > values if number >= len(NEIGHBOURS) // 2 else beside >= values
        keep &= ~(larger & inside)
    return np.bincount(which[keep], minlength=n), at[keep].astype(np.uint32)


def thresholds(
    frames: np.ndarray, dark: np.ndarray | None, *, background_sigma: float, x_ray_sigma: float
) -> Thresholds:
    """Derive thresholds from sample frames, most of whose pixels saw no electron.

    ``background = noise_mean + background_sigma noise_sigma`` of a Gaussian fitted to the histogram's noise peak;
    ``x_ray = mean + x_ray_sigma std`` of all pixels.  Source: stempy (stempy.readthedocs.io), electron_count.

    Parameters
    ----------
    frames : (n, det_y, det_x) ndarray
        NaN and infinities do not count.
    dark : (det_y, det_x) ndarray, optional
    """
    values = subtracted(frames, dark).reshape(-1)
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return Thresholds(background=np.inf, x_ray=np.inf, method="quantiles")
    low, middle = np.percentile(values, (15.865525, 50))  # one sigma below the median; electrons lie above
    whole = frames.dtype.kind in "iu"
    start = float(max(middle - low, 0.5 if whole else 0.0))
    fitted = _peak(values, float(middle), start, whole=whole) if start > 0 else None
    mean, sigma = fitted or (float(middle), start)
    return Thresholds(
        background=mean + background_sigma * sigma,
        x_ray=float(values.mean() + x_ray_sigma * values.std()),
        noise_mean=mean,
        noise_sigma=sigma,
        method="gaussian" if fitted else "quantiles",
    )


def _peak(values: np.ndarray, middle: float, sigma: float, *, whole: bool) -> tuple[float, float] | None:
    """Mean and sigma of a Gaussian fitted to the histogram around its peak; None if it does not settle there.

    Least squares by Levenberg and Marquardt.  The window ends two sigma above the median, where electrons take over.
    """
    width = max(1.0, np.floor(sigma / 8)) if whole else sigma / 8
    first = np.floor(middle - 4 * sigma) - 0.5 if whole else middle - 4 * sigma
    bins = int(np.ceil((middle + 2 * sigma - first) / width))
    if bins < 3 or not np.isfinite([first, width]).all():
        return None
    limits = (first, first + bins * width)
    counts, edges = np.histogram(values, bins, limits)
    # where the values of a bin really are: whole numbers less a dark level lie on a comb beside the bins' middles
    sums = np.histogram(values, bins, limits, weights=values - middle)[0]
    centres = np.where(counts > 0, middle + sums / np.maximum(counts, 1), (edges[:-1] + edges[1:]) / 2)
    state = np.array([float(counts.max()), middle, sigma])
    damping, error = 1e-3, np.inf
    for _ in range(FIT_ROUNDS):
        model, slopes = _gaussian(centres, state)
        residual = counts - model
        error = float(residual @ residual)
        normal = slopes.T @ slopes
        step = np.linalg.lstsq(normal + damping * np.diag(np.diag(normal)), slopes.T @ residual, rcond=None)[0]
        tried = counts - _gaussian(centres, state + step)[0] if state[2] + step[2] > 0 else np.array([np.inf])
        if float(tried @ tried) > error:
            damping *= 10
            if damping > 1e12:
                break
            continue
        state, damping = state + step, damping / 10
        if np.abs(step[1:]).max() < 1e-9 * sigma:
            break
    amplitude, mean, found = (float(v) for v in state)
    settled = amplitude > 0 and abs(mean - middle) < 2 * sigma and sigma / 4 < found < 2 * sigma
    return (mean, found) if settled else None


def _gaussian(centres: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (bins,) and derivatives (bins, 3) of ``a exp(-((x - m) / s)^2 / 2)``."""
    amplitude, mean, sigma = state
    away = (centres - mean) / sigma
    shape = np.exp(-0.5 * away * away)
    value = amplitude * shape
    return value, np.stack([shape, value * away / sigma, value * away * away / sigma], axis=1)
