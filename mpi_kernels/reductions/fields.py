"""Vector fields over the scan: their plane, rotation, derivatives and integral; y first, float64 throughout.

A vector ``(y, x)`` points along increasing indices.  Angles run from +x towards +y, as those of a wedge do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Field = tuple[np.ndarray, np.ndarray]
"""Components ``(y, x)``, each (scan_y, scan_x) float64; NaN where nothing was measured."""

Steps = tuple[float, float]
"""Length of a scan step along y and along x."""


def mean(values: np.ndarray, good: np.ndarray) -> float:
    """Mean where ``good``, without a copy where that is everywhere; NaN where it is nowhere."""
    if good.all():
        return float(values.mean())
    return float(values[good].mean()) if good.any() else float("nan")


def slopes(values: np.ndarray) -> list[float]:
    """Slope per step along each axis of the plane that is fitted to the finite positions."""
    good = np.isfinite(values)
    if not good.any():
        return [0.0] * values.ndim
    if good.all():
        return [_slope_of_all(values, axis) for axis in range(values.ndim)]
    design = np.stack(np.nonzero(good), axis=1).astype(np.float64)
    design -= design.mean(axis=0)
    # an axis of one step has no slope: lstsq's smallest solution gives 0 there
    return [float(s) for s in np.linalg.lstsq(design, values[good] - values[good].mean(), rcond=None)[0]]


def plane(values: np.ndarray, along: Sequence[float] | None = None) -> np.ndarray:
    """Slopes (those that are fitted, unless given) times position: 0 in the middle of the finite positions."""
    good, fitted = np.isfinite(values), np.zeros(values.shape)
    if not good.any():
        return fitted
    middle = [(n - 1) / 2 for n in values.shape] if good.all() else [float(at.mean()) for at in np.nonzero(good)]
    for axis, (slope, centre) in enumerate(zip(along or slopes(values), middle, strict=True)):
        steps = slope * (np.arange(values.shape[axis]) - centre)
        fitted += steps.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return fitted


def _slope_of_all(values: np.ndarray, axis: int) -> float:
    """Where every position counts the axes are orthogonal, and each slope stands alone."""
    n = values.shape[axis]
    if n < 2:
        return 0.0
    along, others = np.arange(n) - (n - 1) / 2, tuple(a for a in range(values.ndim) if a != axis)
    return float(along @ values.mean(axis=others) / (along @ along))


def rotated(field: Field, degrees: float) -> Field:
    """Each vector turned by an angle from +x towards +y; multiples of 90 degrees are exact."""
    y, x = field
    quarters, rest = divmod(degrees, 90.0)
    if rest == 0.0:
        turned = [(y, x), (x, -y), (-y, -x), (-x, y)][int(quarters) % 4]
        return turned[0], turned[1]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return sin * x + cos * y, cos * x - sin * y


def derivatives(field: Field, steps: Steps = (1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Divergence ``dFy/dy + dFx/dx`` and curl ``dFy/dx - dFx/dy``, (scan_y, scan_x) each.

    Central differences, one-sided at the edges; an axis of one step has no derivative and counts as 0.
    """
    y, x = field
    divergence = _slope(y, 0, steps) + _slope(x, 1, steps)
    curl = _slope(y, 1, steps) - _slope(x, 0, steps)
    return divergence, curl


def phase(y: np.ndarray, x: np.ndarray, steps: Steps = (1.0, 1.0)) -> np.ndarray:
    """Integral of a vector field: the image whose gradient comes nearest to it, by Fourier transform.

    Parameters
    ----------
    y, x : (scan_y, scan_x) ndarray of float64
        Components; NaN counts as the mean of the others.
    steps : (float, float)
        Length of a scan step along y and x; the result is in the field's unit times this length.

    Returns
    -------
    (scan_y, scan_x) ndarray of float64
        Of mean 0, periodic at the edges; NaN everywhere if there is no finite vector.

    Notes
    -----
    ``F(phase) = (k_y F(y) + k_x F(x)) / (2 pi i |k|^2)``, the least-squares solution.
    Source: Frankot and Chellappa 1988, doi:10.1109/34.3909; for STEM Lazić, Bosch and Lazar 2016,
    doi:10.1016/j.ultramic.2015.10.011.
    """
    good = np.isfinite(y) & np.isfinite(x)
    if not good.any():
        return np.full(y.shape, np.nan)
    whole = good.all()
    parts = [np.fft.rfft2(v - mean(v, good) if whole else np.where(good, v - mean(v, good), 0.0)) for v in (y, x)]
    ky, kx = np.fft.fftfreq(y.shape[0], steps[0])[:, None], np.fft.rfftfreq(y.shape[1], steps[1])[None, :]
    k2 = ky * ky + kx * kx
    k2[0, 0] = 1.0  # the mean: its numerator is 0
    parts[0] *= ky
    parts[1] *= kx
    parts[0] += parts[1]
    parts[0] *= -0.5j / np.pi / k2
    return np.fft.irfft2(parts[0], y.shape)


@dataclass(frozen=True, slots=True)
class Turn:
    """A rotation found in a field.

    Attributes
    ----------
    degrees : float
        In (-90, 90]; the opposite direction, 180 degrees away, has the same curl.  NaN if the field has no derivative.
    quality : float
        ``1 - curl2(best) / curl2(worst)``: 1 if the turned field is a pure gradient, 0 if no angle is better than
        another; NaN as above.
    """

    degrees: float
    quality: float


def rotation(field: Field, steps: Steps = (1.0, 1.0)) -> Turn:
    """The rotation that makes the field most nearly a gradient: smallest sum of squared curls.

    The fitted planes are taken off first, since de-scan has a curl of its own.  The derivatives are those between four
    positions each, which have no edge; a line of positions tells no rotation.

    Notes
    -----
    Turned by t, ``curl' = curl cos t + div sin t`` and ``div' = div cos t - curl sin t``, so the sum of squares of both
    stays, and the smallest curl is the largest divergence.  With ``A = sum curl^2``, ``B = sum div^2``,
    ``C = sum curl div`` the sum is ``(A + B)/2 + M cos(2 t - p)``, ``M = hypot((A - B)/2, C)``,
    ``p = atan2(C, (A - B)/2)``; the smallest is at ``t = (p + pi)/2``.
    Source of the criterion: Savitzky et al. 2021, doi:10.1017/S1431927621000477; the closed form follows from it.
    """
    y, x = (v - plane(v) for v in field)
    (y_y, y_x), (x_y, x_x) = (_between(v, steps) for v in (y, x))
    divergence, curl = y_y + x_x, y_x - x_y
    good = np.isfinite(divergence) & np.isfinite(curl)
    a, b, c = (
        float((p[good] * q[good]).sum()) for p, q in ((curl, curl), (divergence, divergence), (curl, divergence))
    )
    half = np.hypot((a - b) / 2, c)
    worst = (a + b) / 2 + half
    if not worst > 0 or not np.isfinite(worst):
        return Turn(float("nan"), float("nan"))
    degrees = float(np.degrees((np.arctan2(c, (a - b) / 2) + np.pi) / 2))  # in (0, 180]
    return Turn(degrees - 180.0 if degrees > 90.0 else degrees, float(2 * half / worst))


def _between(values: np.ndarray, steps: Steps) -> Field:
    """Derivatives along y and x in the middle of each four positions, (scan_y - 1, scan_x - 1)."""
    along_y, along_x = np.diff(values, axis=0) / steps[0], np.diff(values, axis=1) / steps[1]
    return (along_y[:, 1:] + along_y[:, :-1]) / 2, (along_x[1:] + along_x[:-1]) / 2


def _slope(values: np.ndarray, axis: int, steps: Steps) -> np.ndarray:
    if values.shape[axis] < 2:
        return np.zeros(values.shape)
    found: np.ndarray = np.gradient(values, steps[axis], axis=axis)
    return found
