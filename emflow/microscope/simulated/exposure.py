"""What arrives at the detector, piece by piece: specimen, aberrations and movement come together here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emflow.microscope.simulated.detector import Camera
from emflow.microscope.simulated.optics import Aberrations, Floats
from emflow.microscope.simulated.parameters import Parameters
from emflow.microscope.simulated.plan import Plan
from emflow.microscope.simulated.specimen import Specimen

Where = Callable[[float], tuple[float, float]]
"""How far the specimen has moved, (y, x) nm, after so many seconds of exposure of this acquisition."""

_NO_OFFSET: Floats = np.zeros(1)


def expected(
    made: Plan, parameters: Parameters, specimen: Specimen, true: Aberrations, where: Where
) -> Iterator[tuple[NDArray[Any], int]]:
    """Electrons that each pixel can expect.

    Yields
    ------
    block : (n, det_y, det_x) ndarray of float64
        The next frames; for an image (1, columns), its next row.
    exposures : int
        Positions of the probe that it is made of.

    Notes
    -----
    A specimen that has moved by ``m`` shows at ``r`` what was at ``r - m``.  It stands still while a piece is exposed.
    """
    if made.kind == "image":
        seen = specimen.blurred(true, parameters.semi_angle_mrad)
        for y, x, before in made.positions():
            moved_y, moved_x = where((before + len(x) / 2) * made.frame_s)
            passed = seen.sample(y - moved_y, x - moved_x, _NO_OFFSET, _NO_OFFSET)
            yield made.electrons * np.clip(1 - passed.reshape(1, -1).astype(np.float64), 0, 1), len(x)
        return
    camera = Camera.of(made.det_shape, parameters.detector_mrad, parameters.semi_angle_mrad)
    gy, gx = true.gradient(camera.ay, camera.ax)
    for y, x, before in made.positions():
        moved_y, moved_x = where((before + len(x) / 2) * made.frame_s)
        passed = specimen.sample(y - moved_y, x - moved_x, gy, gx)
        yield camera.expected(passed, made.electrons, parameters.background), len(x)
