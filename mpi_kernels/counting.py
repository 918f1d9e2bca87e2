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
    flat = frames.reshape(-1)
    with np.errstate(invalid="ignore"):
        found = np.flatnonzero(frames >= _least(frames.dtype, background, dark))
        level = None if dark is None else dark.reshape(-1).astype(np.float64)
        which, at = np.divmod(found, height * width)
        values = _less(flat[found], level, at)
        hits = (values > background) & (values < x_ray)
    found, which, at, values = found[hits], which[hits], at[hits], values[hits]
    row, column = np.divmod(at, width)
    keep = np.ones(len(at), np.bool_)
    for number, (y, x) in enumerate(NEIGHBOURS):
        inside = (row + y >= 0) & (row + y < height) & (column + x >= 0) & (column + x < width)
        step = np.where(inside, y * width + x, 0)
        beside = _less(flat[found + step], level, at + step)
        larger = beside > values if number >= len(NEIGHBOURS) // 2 else beside >= values
        keep &= ~(larger & inside)
    return np.bincount(which[keep], minlength=n), at[keep].astype(np.uint32)


def _least(dtype: np.dtype, background: float, dark: np.ndarray | None) -> np.ndarray:
    """The least value of a pixel that can be above ``background``, () or (det_y, det_x) in the frames' own dtype.

    At times a little low: one comparison without a conversion leaves few pixels, and none too few, to the exact rule.
    """
    level = np.asarray(0.0 if dark is None else dark, np.float64)
    wanted = level + background
    if dtype.kind == "f":
        margin = 4 * float(np.finfo(dtype).eps) * (np.abs(level) + abs(background))
        with np.errstate(over="ignore"):
            low: np.ndarray = (wanted - margin).astype(dtype)
        return low
    limits = np.iinfo(dtype)
    top = float(limits.max) if dtype.itemsize < 8 else np.nextafter(float(limits.max), 0.0)  # 2**64 is no uint64
    least: np.ndarray = np.clip(np.where(np.isfinite(wanted), np.floor(wanted), top), float(limits.min), top)
    return least.astype(dtype)


def _less(values: np.ndarray, level: np.ndarray | None, at: np.ndarray) -> np.ndarray:
    """Some pixels less the dark level, float64; as they are without one."""
    less: np.ndarray = values if level is None else values - level[at]
    return less


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
    values = np.subtract(frames, 0.0 if dark is None else dark, dtype=np.float64).reshape(-1)
    if frames.dtype.kind == "f" or dark is not None:
        values = values[np.isfinite(values)]
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
    values = values[(values >= first) & (values < first + bins * width)]
    which = np.minimum((values - first) / width, bins - 1).astype(np.int64)
    counts = np.bincount(which, minlength=bins)
    # where the values of a bin really are: whole numbers less a dark level lie on a comb beside the bins' middles
    sums = np.bincount(which, values - middle, bins)
    centres = np.where(counts > 0, middle + sums / np.maximum(counts, 1), first + width * (np.arange(bins) + 0.5))
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
