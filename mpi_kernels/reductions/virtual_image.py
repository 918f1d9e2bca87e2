"""Virtual images: each frame summed over a disc, an annulus, a wedge or a mask from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Masks, Output, Reduction, Term
from mpi_kernels.reductions import geometry, mask_file
from mpi_kernels.weights import sum_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualImage(Reduction):
    """Sum of each frame over a region of the detector; output ``image``.

    Parameters
    ----------
    shape : {"disc", "annulus", "wedge", "mask"}
        ``disc``: ``d <= radius``.  ``annulus``: ``inner < d <= outer``, so that disc and annulus share no pixel; an
        inner radius of 0 takes the centre in.  ``wedge``: as an annulus, between two angles.  ``mask``: from ``file``.
    centre : (float, float), optional
        ``(y, x)`` in pixels, the first pixel's centre is 0; the middle of the frame, ``(n - 1) / 2``, if left out.
    radius : float, optional
        Of the disc; a quarter of the frame's shorter side if left out.
    inner, outer : float, optional
        Radii of annulus and wedge; for an annulus 1 and 2 of the default radius, for a wedge 0 and the whole frame.
    angles : (float, float), optional
        First and last direction of the wedge in degrees, from +x towards +y; the first is included, the last not, so
        that wedges that meet share no pixel.
    file : str, optional
        A ``.npy`` file of shape (det_y, det_x): bool, integer or float weights.  A path on the compute node.
    unit : str
        Of the radii: "px", or the unit in which the detector is calibrated, such as "mrad".
    """

    shape: Literal["disc", "annulus", "wedge", "mask"] = "disc"
    centre: tuple[float, float] | None = None
    radius: float | None = None
    inner: float | None = None
    outer: float | None = None
    angles: tuple[float, float] | None = None
    file: str | None = None
    unit: str = "px"

    def __post_init__(self) -> None:
        given = {n for n in ("centre", "radius", "inner", "outer", "angles", "file") if getattr(self, n) is not None}
        allowed = {
            "disc": {"centre", "radius"},
            "annulus": {"centre", "inner", "outer"},
            "wedge": {"centre", "inner", "outer", "angles"},
            "mask": {"file"},
        }[self.shape]
        if given - allowed:
            step = f"a {self.shape} takes {', '.join(sorted(allowed))}"
            raise RecipeError(f"{', '.join(sorted(given - allowed))}: not for shape {self.shape!r}", next_step=step)
        for needed in {"wedge": "angles", "mask": "file"}.get(self.shape), None:
            if needed and needed not in given:
                raise RecipeError(f"shape {self.shape!r} needs {needed!r}")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """One value per frame, in the data's 64-bit integers where data and weights are integers."""
        weights = self._weights(header)
        whole = sum_dtype(header.dtype, weights.dtype).name
        return {"image": Output(over="scan", dtype=whole, unit=header.unit, long_name=f"sum over {self.shape}")}

    def terms(self, header: Header) -> Mapping[str, Term]:
        """The region as weights."""
        return {"image": Masks(self._weights(header)[None])}

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """The image, and how many pixels of the detector it counts."""
        scalars: dict[str, Scalar] = {"pixels": int(np.count_nonzero(self._weights(header)))}
        if self.file is not None:
            scalars["file_sha256"] = mask_file.read(self.file).sha256
        return {"image": arrays["image"][..., 0]}, scalars

    def _weights(self, header: Header) -> np.ndarray:
        """Weights, (det_y, det_x)."""
        if self.shape == "mask":
            return self._from_file(header)
        if self.shape == "disc":
            radius = geometry.default_radius(header, self.unit) if self.radius is None else self.radius
            region = geometry.disc(header, self.centre, radius, self.unit)
        else:
            region = self._ring(header)
        if not region.any():
            raise RecipeError(f"the {self.shape} holds no pixel of a frame of {header.det_shape}")
        return region

    def _ring(self, header: Header) -> np.ndarray:
        d2 = geometry.distance2(header, self.centre, self.unit)
        wedge = self.shape == "wedge"
        quarter = geometry.default_radius(header, self.unit)
        inner = self.inner if self.inner is not None else (0.0 if wedge else quarter)
        outer = self.outer if self.outer is not None else (float("inf") if wedge else 2 * quarter)
        if not 0 <= inner < outer:
            raise RecipeError(f"no ring between radius {inner} and {outer}")
        region: np.ndarray = geometry.within(d2, outer)
        if inner:
            region &= ~geometry.within(d2, inner)
        if self.angles is None:
            return region
        wedge_region: np.ndarray = region & geometry.sector(
            geometry.directions(header, self.centre, self.unit), *self.angles
        )
        return wedge_region

    def _from_file(self, header: Header) -> np.ndarray:
        assert self.file is not None
        return mask_file.read(self.file).fitting(header.det_shape, "the frames")
