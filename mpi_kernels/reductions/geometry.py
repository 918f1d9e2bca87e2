"""Where pixels are: distances and angles from a centre, in pixels or in the detector's calibrated unit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mpi_kernels.contract import Axis, Header
from mpi_kernels.errors import RecipeError

Point = tuple[float, float]

_PER_ANGSTROM = ("reciprocal", 10.0)
UNITS = {"mrad": ("angle", 1.0), "rad": ("angle", 1e3), "1/nm": ("reciprocal", 1.0), "nm^-1": ("reciprocal", 1.0)}
UNITS |= dict.fromkeys(("1/Å", "1/A", "Å^-1", "A^-1"), _PER_ANGSTROM)
"""What a unit measures, and its size in mrad or 1/nm; units of one kind are converted."""


EDGE = 1e-12
"""Relative slack of a squared radius: far above float64's rounding (1e-16), far below the next pixel's distance."""


def centre_of(header: Header, centre: Point | None) -> Point:
    """``(y, x)`` in pixels; the middle of the frame, ``(n - 1) / 2``, if not given."""
    if centre is not None:
        if not np.isfinite(centre).all():
            raise RecipeError(f"centre {centre} is not a point")
        return centre
    height, width = header.det_shape
    return (height - 1) / 2, (width - 1) / 2


def pixel_size(header: Header, unit: str) -> Point:
    """Size ``(y, x)`` of a detector pixel in a unit.

    Raises
    ------
    RecipeError
        The file has no calibration in this unit.
    """
    if unit == "px":
        return 1.0, 1.0
    sizes = [_in_unit(axis, unit) for axis in header.det_axes]
    if len(sizes) != 2 or not all(np.isfinite(sizes)) or not all(sizes):
        known = ", ".join(sorted({a.unit for a in header.det_axes} - {""})) or "none"
        raise RecipeError(
            f"the detector is not calibrated in {unit!r}; its units: {known}", next_step='give radii in px, unit = "px"'
        )
    return sizes[0], sizes[1]


def default_radius(header: Header, unit: str) -> float:
    """A quarter of the shorter side of the frame, but at least 0.75 pixels.

    A centre between four pixels is 0.71 pixels away from them, so that the default disc is never empty.
    """
    height, width = pixel_size(header, unit)
    return max(min(header.det_shape[0] * height, header.det_shape[1] * width) / 4, 0.75 * max(height, width))


def offsets(header: Header, centre: Point | None, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Distances along y, (det_y, 1), and along x, (1, det_x), from the centre, float64 in ``unit``."""
    (cy, cx), (sy, sx) = centre_of(header, centre), pixel_size(header, unit)
    y, x = (np.arange(n, dtype=np.float64) for n in header.det_shape)
    return ((y - cy) * sy)[:, None], ((x - cx) * sx)[None, :]


def distance2(header: Header, centre: Point | None, unit: str) -> np.ndarray:
    """Squared distance of each pixel from the centre, (det_y, det_x) float64 in ``unit`` squared."""
    y, x = offsets(header, centre, unit)
    squares: np.ndarray = y * y + x * x
    return squares


def disc(header: Header, centre: Point | None, radius: float, unit: str) -> np.ndarray:
    """Pixels of a disc, its edge included (``d <= radius``): (det_y, det_x) bool."""
    if not 0 <= radius < float("inf"):
        raise RecipeError(f"radius {radius} is not a length")
    return within(distance2(header, centre, unit), radius)


def within(d2: np.ndarray, radius: float) -> np.ndarray:
    """Whether squared distances are inside a radius or on it: an edge must not be lost to rounding in a unit."""
    region: np.ndarray = d2 <= radius * radius * (1 + EDGE)
    return region


def rings(header: Header, centre: Point | None, edges: np.ndarray, unit: str) -> np.ndarray:
    """Ring of each pixel, (det_y, det_x) int32: ring k holds ``edges[k] < d <= edges[k + 1]``; -1 is in none.

    An innermost edge of 0 takes the centre in.  Rings that meet share no pixel and miss none.
    """
    bounds = np.where(edges > 0, edges * edges * (1 + EDGE), -1.0)
    found = np.searchsorted(bounds, distance2(header, centre, unit), side="left") - 1
    return np.where(found < len(edges) - 1, found, -1).astype(np.int32)


def directions(header: Header, centre: Point | None, unit: str) -> np.ndarray:
    """Direction of each pixel in degrees from +x towards +y, (det_y, det_x) in [-180, 180); the centre's is 0."""
    y, x = offsets(header, centre, unit)
    return turn(np.degrees(np.arctan2(y, x)))


def turn(degrees: np.ndarray | float) -> np.ndarray:
    """Directions as one number each, in [-180, 180), so that whoever compares two of them decides alike.

    Rounded to 1e-9 degrees: a pixel on an edge must not fall off it, or into both sides, by float64's last bits.
    """
    found: np.ndarray = np.round((np.asarray(degrees, np.float64) + 180.0) % 360.0 - 180.0, 9)
    return np.where(found >= 180.0, found - 360.0, found)


def sector(directed: np.ndarray, first: float, last: float) -> np.ndarray:
    """Pixels from the first direction, included, to the last, not: sectors that meet share no pixel and miss none.

    Parameters
    ----------
    directed : ndarray
        From `directions`.
    first, last : float
        Degrees; a whole turn apart they are the whole circle.

    Raises
    ------
    RecipeError
        The two are one direction.
    """
    if not np.isfinite([first, last]).all() or first == last:
        raise RecipeError(f"no wedge between {first} and {last} degrees")
    begin, end = turn(first), turn(last)
    after, before = directed >= begin, directed < end
    # each edge is one comparison of the same two numbers, whichever of its two sectors asks
    region: np.ndarray = after & before if begin < end else after | before
    return region


def radial_axis(header: Header, width_px: float) -> Axis:
    """Axis of rings ``width_px`` wide around a centre, in the detector's unit if both its axes share one."""
    axis = Axis(name="radius", scale=width_px, offset=width_px / 2, unit="px")
    if len(header.det_axes) == 2:
        y, x = header.det_axes
        if y.unit == x.unit and y.unit and math.isclose(abs(y.scale), abs(x.scale), rel_tol=1e-6) and y.scale:
            size = abs(y.scale)
            return replace(axis, scale=width_px * size, offset=width_px * size / 2, unit=y.unit)
    return axis


def _in_unit(axis: Axis, unit: str) -> float:
    if axis.unit == unit:
        return abs(axis.scale)
    (kind, size), (wanted, step) = UNITS.get(axis.unit, ("", 1.0)), UNITS.get(unit, (None, 1.0))
    return abs(axis.scale) * size / step if kind == wanted else float("nan")
