"""Defocus and twofold astigmatism from segment images: how far each is shifted, against the angle it looks from.

Source of the method: the image at detector angle a is shifted by the gradient of the aberration function there
(Lupini, Chi and Jesse 2016, doi:10.1111/jmi.12372); iterated alignment to the mean and a linear fit of the shifts as
in tilt-corrected bright field (Varnavides et al. 2023, arXiv:2309.05250).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emflow.agent.policies import registration
from emflow.agent.policies.coarse import coarse

BRIGHT = 0.5
"""Segments count from this share of the bright level on; below it they lie mostly outside the bright disc."""

ITERATIONS = 3
"""Alignments to the mean at most; where the field is several times the shifts, a fourth moves nothing by 0.1 nm."""

CONVERGED_PX = 0.05
"""No further alignment once the last one moved no segment by more than this: the next would move it by far less."""

REACH = 0.6
"""Largest shift that is looked for, as a share of the field: neighbours must still see the same specimen."""

LIMIT_PX = 5
"""Largest shift that an alignment may add to the one before it."""

TUKEY = 4.685
"""Tuning of Tukey's biweight for 95 % efficiency with normal errors.  Source: Holland and Welsch 1977,
doi:10.1080/03610927708827533."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Aberrations of a scan, and how far they can be believed.

    Attributes
    ----------
    coefficients_nm, errors_nm : (3,) ndarray of float64
        C10, C12a, C12b, and their standard errors from the scatter of the shifts.
    correlation : float
        Mean normalised correlation of the aligned segments with the mean of the others.
    residual_nm, residual_px : float
        Root mean square of the shifts, per component, that the coefficients do not explain: of all segments.
    inliers : float
        Share of segments whose shift is near the coefficients' (weight in the robust fit above one half).
    smoothness : float
        Correlation of the mean image with itself one scan position further, smaller of y and x.
    at_bound : bool
        The coefficients lie on the edge of the search.
    segments : int
        Bright segments that were used.
    """

    coefficients_nm: np.ndarray
    errors_nm: np.ndarray
    correlation: float
    residual_nm: float
    residual_px: float
    inliers: float
    smoothness: float
    at_bound: bool
    segments: int


def gradients(angles: np.ndarray) -> np.ndarray:
    """Shift in nm per nm of C10, C12a and C12b.

    Parameters
    ----------
    angles : (k, 2) ndarray of float64
        ``(y, x)`` in rad.

    Returns
    -------
    (k, 2, 3) ndarray of float64
        Gradient of ``C10/2 |a|^2 + C12a/2 (ax^2 - ay^2) + C12b ax ay`` by ``(ay, ax)``; the image at angle a is the
        specimen at ``r`` plus this shift.
    """
    y, x = angles[:, 0], angles[:, 1]
    found: np.ndarray = np.stack([np.stack([y, -y, x], axis=-1), np.stack([x, x, y], axis=-1)], axis=1)
    return found


def bright(images: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Segments of the bright disc, (k,) bool, from images (ny, nx, k) and the pixels of each segment (k,)."""
    level = images.mean(axis=(0, 1)) / pixels
    # percentiles, not maxima: one hot segment does not raise the bar for all
    seeing = level[level > 0.1 * np.percentile(level, 95)]
    if not seeing.size:
        return np.zeros(level.shape, np.bool_)
    found: np.ndarray = (level >= BRIGHT * np.percentile(seeing, 75)) & (level > 0)
    return found


def estimate(images: np.ndarray, angles: np.ndarray, steps_nm: tuple[float, float]) -> Estimate:
    """Aberrations from the images of bright segments.

    Parameters
    ----------
    images : (ny, nx, k) ndarray
        One image per segment, positive means.
    angles : (k, 2) ndarray of float64
        ``(y, x)`` of each segment in mrad, from any origin.
    steps_nm : (float, float)
        Scan steps ``(y, x)``; negative where the scan runs against the axis.
    """
    stack = np.ascontiguousarray(np.moveaxis(images, -1, 0), np.float64)
    counts = stack.mean(axis=(1, 2))
    stack = stack / counts[:, None, None] - 1.0
    steps = np.asarray(steps_nm, np.float64)
    design = gradients((angles - angles.mean(axis=0)) * 1e-3) / steps[None, :, None]  # px per nm
    bound = min(REACH * n / float(np.abs(design[:, i, 0]).max() or np.inf) for i, n in enumerate(stack.shape[1:]))
    weight = counts / counts.max()
    coefficients = coarse(stack, design, weight, bound)
    for _ in range(ITERATIONS):
        placed = np.rint(design @ coefficients)
        found = registration.register(*_spectra(stack, design @ coefficients, weight), stack.shape[1:], LIMIT_PX)
        fit = _fit(design, placed + found.shifts, np.where(found.at_limit, 0.0, weight))
        moved_px = float(np.abs(design @ (fit.coefficients - coefficients)).max())
        coefficients = fit.coefficients
        if moved_px < CONVERGED_PX:
            break
    return Estimate(
        coefficients_nm=coefficients,
        errors_nm=fit.errors,
        correlation=float(found.correlations.mean()),
        residual_nm=float(np.sqrt(((fit.residuals * steps) ** 2).mean())),
        residual_px=float(np.sqrt((fit.residuals**2).mean())),
        inliers=float((fit.robust > 0.5).mean()),
        smoothness=_smoothness(stack, design @ coefficients, weight),
        at_bound=bool(abs(coefficients[0]) + np.hypot(*coefficients[1:]) > 0.95 * bound),
        segments=len(stack),
    )


def _spectra(stack: np.ndarray, shifts: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spectra of the images, and of the mean of all others where each image is, both only where others reach.

    An image is put at its shift to whole pixels, after the rest was taken out by linear interpolation.
    """
    whole = np.rint(shifts).astype(np.intp)
    placed = _moved(stack, shifts - whole) * weight[:, None, None]
    total, trust, corner = _canvas(placed, whole, weight)
    ny, nx = stack.shape[1:]
    references = np.empty_like(stack)
    images = np.empty_like(stack)
    for k, (y, x) in enumerate(corner):
        others = trust[y : y + ny, x : x + nx] - weight[k]
        seen = others > 0.5 * weight[k]
        references[k] = np.where(seen, (total[y : y + ny, x : x + nx] - placed[k]) / np.where(seen, others, 1.0), 0.0)
        images[k] = np.where(seen, stack[k], 0.0)
    return registration.spectra(images), registration.spectra(references)


def _moved(stack: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Images at ``r - rest``, for rests of up to half a pixel; the edge repeats."""
    found = stack
    for axis in (1, 2):
        part = rest[:, axis - 1].reshape(-1, 1, 1)
        n = stack.shape[axis]
        before = np.take(found, np.maximum(np.arange(n) - 1, 0), axis=axis)
        after = np.take(found, np.minimum(np.arange(n) + 1, n - 1), axis=axis)
        found = found * (1 - np.abs(part)) + before * np.maximum(part, 0) + after * np.maximum(-part, 0)
    return found


def _canvas(placed: np.ndarray, whole: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum of images put at whole shifts, the sum of their weights, and each image's corner, (k, 2) int."""
    corner = whole - whole.min(axis=0)
    ny, nx = placed.shape[1:]
    height, width = corner.max(axis=0)
    total = np.zeros((ny + int(height), nx + int(width)))
    trust = np.zeros_like(total)
    for k, (y, x) in enumerate(corner):
        total[y : y + ny, x : x + nx] += placed[k]
        trust[y : y + ny, x : x + nx] += weight[k]
    return total, trust, corner


def _smoothness(stack: np.ndarray, shifts: np.ndarray, weight: np.ndarray) -> float:
    """Correlation of the aligned mean with itself one position further, the smaller of y and x.

    Shifts are taken to whole pixels: interpolation would make noise smooth.
    """
    total, trust, _ = _canvas(stack * weight[:, None, None], np.rint(shifts).astype(np.intp), weight)
    well = trust > 0.5 * trust.max()
    mean = np.where(well, total / np.where(well, trust, 1.0), 0.0)
    mean = np.where(well, mean - mean[well].mean(), 0.0)
    power = float((mean**2).sum())
    if power == 0:
        return 0.0
    return float(min((mean[1:] * mean[:-1]).sum(), (mean[:, 1:] * mean[:, :-1]).sum()) / power)


@dataclass(frozen=True, slots=True)
class _Fit:
    coefficients: np.ndarray  # (3,) nm
    errors: np.ndarray  # (3,) nm
    residuals: np.ndarray  # (k, 2) px
    robust: np.ndarray  # (k,) weight of Tukey's biweight, 0 to 1


def _fit(design: np.ndarray, shifts: np.ndarray, weight: np.ndarray) -> _Fit:
    """Coefficients and one shift common to all, by weighted least squares, reweighted with Tukey's biweight.

    Parameters
    ----------
    design : (k, 2, 3) ndarray of float64
        Pixels per nm.
    shifts : (k, 2) ndarray of float64
        In pixels.
    weight : (k,) ndarray of float64
        0 leaves a segment out.
    """
    count = len(design)
    columns = np.concatenate([design, np.broadcast_to(np.eye(2), (count, 2, 2))], axis=2).reshape(-1, 5)
    robust = (weight > 0).astype(np.float64)
    for _ in range(6):
        root = np.repeat(np.sqrt(weight * robust), 2)
        solution = np.linalg.lstsq(columns * root[:, None], shifts.reshape(-1) * root, rcond=None)[0]
        residuals = shifts - (columns @ solution).reshape(-1, 2)
        length = np.hypot(residuals[:, 0], residuals[:, 1])
        scale = float(np.median(length)) / 1.1774  # median length of a normal vector of unit variance: sqrt(2 ln 2)
        reduced = length / (TUKEY * max(scale, 1e-6))
        robust = np.where(reduced < 1, (1 - reduced**2) ** 2, 0.0)
    both = np.repeat(weight * robust, 2)
    freedom = max(2 * int(np.count_nonzero(weight * robust)) - 5, 1)
    variance = float((both * residuals.reshape(-1) ** 2).sum() / max(both.mean(), 1e-12)) / freedom
    inverse = np.linalg.pinv((columns * both[:, None]).T @ columns) * both.mean()
    return _Fit(solution[:3], np.sqrt(np.diag(inverse)[:3] * variance), residuals, robust)
