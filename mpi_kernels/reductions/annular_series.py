"""Annular series: one virtual image for each ring around a centre, from dark field to bright."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Axis, Header, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels, Output, Reduction, Term
from mpi_kernels.reductions import geometry
from mpi_kernels.weights import sum_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnularSeries(Reduction):
    """Virtual images of rings of equal width: outputs ``images`` and ``pixels``.

    Parameters
    ----------
    rings : int
        How many, 1 to 4096.
    inner, outer : float, optional
        Radii of the whole series in ``unit``; 0, and half of the frame's shorter side, if left out.
    centre : (float, float), optional
        ``(y, x)`` in pixels; the middle of the frame if left out.
    unit : str
        Of the radii: "px", or the unit in which the detector is calibrated.

    Notes
    -----
    Ring k holds ``inner + k w < d <= inner + (k + 1) w`` with ``w = (outer - inner) / rings``, as a virtual annulus
    does; an inner radius of 0 takes the centre in, so that the rings add up to the disc.  Sums, not means: divided by
    ``pixels`` they are a radial profile of each frame.  A ring without pixels is 0 everywhere.
    Source: Gammer, Ozdol, Liebscher and Minor 2015, doi:10.1016/j.ultramic.2015.03.015 (virtual apertures).
    """

    rings: int = 8
    inner: float = 0.0
    outer: float | None = None
    centre: tuple[float, float] | None = None
    unit: str = "px"

    def __post_init__(self) -> None:
        if not 1 <= self.rings <= 4096:
            raise RecipeError(f"rings = {self.rings}: a series has 1 to 4096 of them")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Images along the radius, and the number of pixels of each ring."""
        edges = self._edges(header)
        width = float(edges[1] - edges[0])
        axis = Axis(name="radius", scale=width, offset=self.inner + width / 2, unit=self.unit)
        return {
            "images": Output(
                over="scan",
                shape=(self.rings,),
                dtype=sum_dtype(header.dtype).name,
                unit=header.unit,
                long_name="sum over each ring",
                axes=(axis,),
            ),
            "pixels": Output(
                over="frame", shape=(self.rings,), dtype="int64", long_name="pixels of each ring", axes=(axis,)
            ),
        }

    def terms(self, header: Header) -> Mapping[str, Term]:
        """The rings as regions of one detector."""
        return {"images": Labels(self._labels(header), self.rings)}

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """The images as they are."""
        labels = self._labels(header)
        pixels = np.bincount(labels[labels >= 0], minlength=self.rings).astype(np.int64)
        return {"images": arrays["images"], "pixels": pixels}, {"empty_rings": int(np.count_nonzero(pixels == 0))}

    def _edges(self, header: Header) -> np.ndarray:
        """Radii between the rings, (rings + 1,) float64."""
        outer = 2 * geometry.default_radius(header, self.unit) if self.outer is None else self.outer
        if not 0 <= self.inner < outer < float("inf"):
            raise RecipeError(f"no rings between radius {self.inner} and {outer}")
        edges = self.inner + (outer - self.inner) * np.arange(self.rings + 1) / self.rings
        edges[-1] = outer
        return edges

    def _labels(self, header: Header) -> np.ndarray:
        labels = geometry.rings(header, self.centre, self._edges(header), self.unit)
        if (labels < 0).all():
            raise RecipeError(f"the rings hold no pixel of a frame of {header.det_shape}")
        return labels
