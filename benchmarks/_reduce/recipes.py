"""The recipes that are measured, as this program's reductions and as arrays that any other program can use."""

from __future__ import annotations

import numpy as np

from mpi_kernels.contract import ReductionSpec

INNER, MIDDLE, OUTER = 16.0, 32.0, 56.0
"""Radii of the disc and of the two rings, in pixels."""

BINS = 64

VIRTUAL = "mpi_kernels.reductions.virtual_image:VirtualImage"
MASKS = (
    ReductionSpec(use=VIRTUAL, name="bf", parameters={"radius": INNER}),
    ReductionSpec(use=VIRTUAL, name="ring", parameters={"shape": "annulus", "inner": INNER, "outer": MIDDLE}),
    ReductionSpec(use=VIRTUAL, name="adf", parameters={"shape": "annulus", "inner": MIDDLE, "outer": OUTER}),
)
WHOLE = ReductionSpec(use=VIRTUAL, name="all", parameters={"radius": 1e6})
SUM = ReductionSpec(use="benchmarks._reduce.sum_alone:SumAlone", name="pattern")
PATTERN = ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern", parameters={"variance": False})
COM = ReductionSpec(use="mpi_kernels.reductions.centre_of_mass:CentreOfMass", name="com")
RADIAL = ReductionSpec(
    use="mpi_kernels.reductions.radial_profile:RadialProfile", name="radial", parameters={"bins": BINS, "scan": True}
)

RECIPES: dict[str, tuple[ReductionSpec, ...]] = {
    "sum": (SUM,),
    "mask": MASKS[:1],
    "masks": (*MASKS, WHOLE),
    "com": (COM,),
    "fused": (PATTERN, *MASKS, COM),
    "radial": (RADIAL,),
}
"""By name; ``masks`` are three and the total."""


def distances(det: tuple[int, int]) -> np.ndarray:
    """Squared distance of each pixel from the middle of the frame, (det_y, det_x) float64 in px^2."""
    y, x = np.indices(det, dtype=np.float64)
    found: np.ndarray = (y - (det[0] - 1) / 2) ** 2 + (x - (det[1] - 1) / 2) ** 2
    return found


def masks(det: tuple[int, int]) -> np.ndarray:
    """Disc, two rings, everything: (4, det_y, det_x) bool."""
    d2 = distances(det)
    rings = [d2 <= INNER**2, (d2 > INNER**2) & (d2 <= MIDDLE**2), (d2 > MIDDLE**2) & (d2 <= OUTER**2)]
    return np.stack([*rings, np.ones(det, bool)])


def rings(det: tuple[int, int]) -> np.ndarray:
    """Ring of each pixel, one pixel wide; -1 beyond the last one: (det_y, det_x) int32."""
    ring = np.floor(np.sqrt(distances(det))).astype(np.int32)
    return np.where(ring < BINS, ring, -1)
