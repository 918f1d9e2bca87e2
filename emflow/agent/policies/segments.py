"""Segment images of a result, checked: what can't be used is refused here, with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emflow.agent.policies import parallax
from emflow.agent.protocol import Result
from mpi_kernels.contract import Axis

NM = {"nm": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "m": 1e9, "pm": 1e-3, "Å": 0.1, "A": 0.1}
"""Length units of scan axes, in nm."""

SMALLEST = 16
"""Scan positions along a side; fewer hold no image that could be aligned."""


class Refused(Exception):
    """A result that nothing can be concluded from; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Bright segments of a scan.

    Attributes
    ----------
    images : (ny, nx, k) ndarray of float64
        Counts.
    angles : (k, 2) ndarray of float64
        ``(y, x)`` in mrad.
    steps_nm : (float, float)
        Scan steps; negative where the scan runs against the axis.
    reach_mrad : float
        Largest distance of a segment from the middle of all.
    settings : dict of float
        Controls when the scan was made.
    """

    images: np.ndarray
    angles: np.ndarray
    steps_nm: tuple[float, float]
    reach_mrad: float
    settings: dict[str, float]


def read(result: Result, controls: Sequence[str], *, name: str = "segments") -> Segments:
    """The bright segments of a result.

    Parameters
    ----------
    result : Result
        With a reduction ``segment_images`` under ``name``.
    controls : sequence of str
        Controls whose values are needed.

    Raises
    ------
    Refused
        The result is doubtful, not whole, not calibrated, or holds a number that is none.
    """
    if result.quality != "OK" or result.coverage < 1:
        raise Refused(f"result {result.job} is {result.quality}, of {100 * result.coverage:.0f} % of the scan")
    settings = {n: result.settings[n] for n in controls if math.isfinite(result.settings.get(n, math.nan))}
    if len(settings) < len(controls):
        raise Refused(f"the scan does not say what {', '.join(n for n in controls if n not in settings)} was")
    unit = result.scalars.get(name, {}).get("angle_unit")
    if unit != "mrad":
        raise Refused(f"the detector is not calibrated as angles: the unit of {name}/angles is {unit}")
    try:
        images, angles, pixels = (result.array(f"{name}/{o}") for o in ("images", "angles", "pixels"))
        axes = result.axes(f"{name}/images")
    except KeyError as error:
        raise Refused(f"the recipe does not give what is needed: {error.args[0]}") from error
    steps = (_step_nm(axes[0]), _step_nm(axes[1]))
    if images.ndim != 3 or min(images.shape[:2]) < SMALLEST:
        raise Refused(f"segment images of shape {images.shape}: a scan of {SMALLEST} by {SMALLEST} is the least")
    if angles.shape != (images.shape[2], 2) or pixels.shape != (images.shape[2],) or not (pixels > 0).all():
        raise Refused(f"{images.shape[2]} images do not go with angles of shape {angles.shape}")
    images = images.astype(np.float64)
    if not (np.isfinite(images).all() and np.isfinite(angles).all()):
        raise Refused("not all numbers of the segment images are finite")
    bright = parallax.bright(images, pixels)
    images, angles = images[..., bright], angles[bright]
    reach = float(np.hypot(*(angles - angles.mean(axis=0)).T).max()) if len(angles) else 0.0
    if not reach > 0:
        raise Refused("no bright segments at different angles")
    if not (images.std(axis=(0, 1)) > 0).all():
        raise Refused("a segment image is the same everywhere")
    return Segments(images=images, angles=angles, steps_nm=steps, reach_mrad=reach, settings=settings)


def _step_nm(axis: Axis) -> float:
    step = axis.scale * NM.get(axis.unit, math.nan)
    if not (math.isfinite(step) and step):
        raise Refused(f"the scan is not calibrated as lengths: a step of {axis.scale:g} {axis.unit or 'nothing'}")
    return step
