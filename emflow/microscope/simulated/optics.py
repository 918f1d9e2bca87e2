"""The aberration function and what its slope does to a ray."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aberrations:
    """Defocus and two-fold astigmatism, nm.

    Notes
    -----
    ``chi(a) = C10/2 (ax^2 + ay^2) + C12a/2 (ax^2 - ay^2) + C12b ax ay``, nm for angles ``a`` in rad: the terms n = 1
    in the notation of Krivanek, Dellby, Lupini 1999, doi:10.1016/S0304-3991(99)00013-3.
    """

    C10_nm: float = 0.0
    C12a_nm: float = 0.0
    C12b_nm: float = 0.0

    def gradient(self, ay: Floats, ax: Floats) -> tuple[Floats, Floats]:
        """Where the ray of an angle meets the specimen, as seen from the ray of angle 0.

        Parameters
        ----------
        ay, ax : ndarray of float64
            Angles, rad.

        Returns
        -------
        gy, gx : ndarray of float64
            Gradient of chi, nm: the image at angle ``a`` is the specimen sampled at ``r + g(a)``.

        Notes
        -----
        Tilted beams of an aberrated probe give bright field images that are shifted by the gradient of the
        aberration function.  Source: Lupini, Chi, Jesse 2016, J. Microscopy 263, 43, doi:10.1111/jmi.12372.
        """
        gy = (self.C10_nm - self.C12a_nm) * ay + self.C12b_nm * ax
        gx = (self.C10_nm + self.C12a_nm) * ax + self.C12b_nm * ay
        return gy, gx


def rays(semi_angle_mrad: float, count: int = 4096) -> tuple[Floats, Floats]:
    """Angles that fill the probe's disc evenly.

    Returns
    -------
    ay, ax : (count,) ndarray of float64
        rad.

    Notes
    -----
    Ray k is at radius ``sqrt((k + 1/2)/count)`` and the golden angle times k.
    Source: Vogel 1979, doi:10.1016/0025-5564(79)90080-4.
    """
    k = np.arange(count)
    radius = semi_angle_mrad * 1e-3 * np.sqrt((k + 0.5) / count)
    turn = k * (math.pi * (3 - math.sqrt(5)))
    return radius * np.sin(turn), radius * np.cos(turn)
