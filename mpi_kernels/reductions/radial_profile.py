"""Radial profile: mean intensity by distance from a centre."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels, Output, Reduction, Sum, Term
from mpi_kernels.reductions import geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialProfile(Reduction):
    """Mean intensity of a pixel in rings around a centre: output ``profile``, and ``scan_profile`` if asked for.

    Parameters
    ----------
    centre : (float, float), optional
        ``(y, x)`` in pixels; the middle of the frame if left out.
    width : float
        Of a ring, in pixels: ring k holds the pixels with ``k width <= d < (k + 1) width``.
    bins : int, optional
        Number of rings; as many as reach the farthest pixel if left out.
    scan : bool
        Also give the profile of every frame, ``scan_profile``.

    Notes
    -----
    ``profile`` is the profile of the mean pattern.  A ring without pixels is NaN.
    """

    centre: tuple[float, float] | None = None
    width: float = 1.0
    bins: int | None = None
    scan: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.width < float("inf"):
            raise RecipeError(f"a ring can't be {self.width} px wide")
        if self.bins is not None and self.bins < 1:
            raise RecipeError(f"there can't be {self.bins} bins")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Profiles along the radius."""
        bins, axes = self._labels(header)[1], (geometry.radial_axis(header, self.width),)
        name = "mean intensity of a pixel"
        found = {"profile": Output(over="frame", shape=(bins,), axes=axes, unit=header.unit, long_name=name)}
        if self.scan:
            found["scan_profile"] = Output(over="scan", shape=(bins,), axes=axes, unit=header.unit, long_name=name)
        return found

    def terms(self, header: Header) -> Mapping[str, Term]:
        """Sum of all frames, and the rings of each frame if asked for."""
        labels, bins = self._labels(header)
        found: dict[str, Term] = {"sum": Sum()}
        return found | {"rings": Labels(labels, bins)} if self.scan else found

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Divide by the number of pixels of each ring."""
        labels, bins = self._labels(header)
        counted = labels >= 0
        pixels = np.bincount(labels[counted], minlength=bins)
        empty = pixels == 0
        divisor = np.where(empty, np.nan, pixels)
        weights = (arrays["sum"] / header.frames)[counted]
        found = {"profile": np.bincount(labels[counted], weights=weights, minlength=bins) / divisor}
        if self.scan:
            found["scan_profile"] = arrays["rings"] / divisor
        return found, {"empty_rings": int(np.count_nonzero(empty))}

    def _labels(self, header: Header) -> tuple[np.ndarray, int]:
        distance = np.sqrt(geometry.distance2(header, self.centre, "px"))
        rings = np.floor(distance / self.width)
        bins = int(rings.max()) + 1 if self.bins is None else self.bins
        if bins > 1 << 20:
            raise RecipeError(f"{bins} rings of {self.width} px are too many")
        return np.where(rings < bins, rings, -1).astype(np.int32), bins
