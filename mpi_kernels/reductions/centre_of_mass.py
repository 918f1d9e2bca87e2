"""Centre of mass of each frame, the plane that de-scan adds to it, and its integral, the phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Moments, Output, Reduction, Term
from mpi_kernels.reductions import fields, geometry
from mpi_kernels.weights import sum_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class CentreOfMass(Reduction):
    """First moments of each frame: outputs ``y``, ``x``, ``total``, and for 4d data ``phase``.

    Parameters
    ----------
    radius : float, optional
        Only pixels with ``d <= radius`` of the centre count; all pixels if left out.
    centre : (float, float), optional
        ``(y, x)`` in pixels of that disc; the middle of the frame if left out.
    unit : str
        Of the radius: "px", or the unit in which the detector is calibrated.
    remove_descan : bool
        Subtract the slopes of the fitted plane from ``y`` and ``x`` (their means stay).  Never done unless asked for;
        the slopes are measured and stored either way.

    Notes
    -----
    ``y = sum(i I) / sum(I)`` over pixel rows i, ``x`` likewise over columns; the first pixel's centre is 0; NaN where
    no count fell.  Source: Müller et al. 2014, doi:10.1038/ncomms6653.

    ``phase`` is the image whose gradient (per scan step) comes nearest to the vectors less their means, by Fourier
    transform: ``F(phase) = (k_y F(y) + k_x F(x)) / (2 pi i |k|^2)``, periodic at the edges, of mean 0.  A position
    without counts is given the mean, so that it pulls nothing; if no position has counts the phase is NaN.
    Source: Lazić, Bosch and Lazar 2016, doi:10.1016/j.ultramic.2015.10.011.

    The plane is ``a + b scan_y + c scan_x``, fitted by least squares to the positions with counts.
    """

    radius: float | None = None
    centre: tuple[float, float] | None = None
    unit: str = "px"
    remove_descan: bool = False

    def __post_init__(self) -> None:
        if self.centre is not None and self.radius is None:
            raise RecipeError("centre is the centre of a disc: give its radius as well")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Maps over the scan."""
        found = {
            "y": Output(over="scan", unit="px", long_name="centre of mass, y"),
            "x": Output(over="scan", unit="px", long_name="centre of mass, x"),
            "total": Output(
                over="scan",
                dtype=sum_dtype(header.dtype).name,
                unit=header.unit,
                long_name="sum of the frame",
            ),
        }
        if header.kind == "4d":
            found["phase"] = Output(over="scan", unit="px^2", long_name="integrated centre of mass")
        return found

    def terms(self, header: Header) -> Mapping[str, Term]:
        """Total and first moments."""
        if self.radius is None:
            return {"moments": Moments()}
        mask = geometry.disc(header, self.centre, self.radius, self.unit)
        if not mask.any():
            raise RecipeError(f"no pixel of a frame of {header.det_shape} is within {self.radius} {self.unit}")
        return {"moments": Moments(mask)}

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Divide, fit the plane and integrate."""
        y, x, total, scalars = measured(arrays["moments"], header.frames, remove_descan=self.remove_descan)
        found = {"y": y, "x": x, "total": total}
        if header.kind == "4d":
            found["phase"] = fields.phase(y, x)
        return found, scalars


def measured(
    moments: np.ndarray, frames: int, *, remove_descan: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Scalar]]:
    """Centres ``y`` and ``x`` in px and total of each frame from its moments (scan + (3,)), and what is measured.

    So many ``frames`` were there; others have no counts either.

    The scalars are `CentreOfMass`'s: frames without counts, the means, and the slopes of the planes.
    """
    total = np.ascontiguousarray(moments[..., 0])
    counted = np.isfinite(total) & (total != 0)
    y, x = (_divided(moments[..., i], total, counted) for i in (1, 2))
    slopes = [fields.slopes(v) for v in (y, x)]
    scalars: dict[str, Scalar] = {"frames_without_counts": int(frames - np.count_nonzero(counted))}
    scalars |= described({"y": y, "x": x}, slopes)
    if remove_descan:
        y, x = (v - fields.plane(v, along) for v, along in zip((y, x), slopes, strict=True))
    return y, x, total, scalars


def described(components: Mapping[str, np.ndarray], slopes: list[list[float]]) -> dict[str, Scalar]:
    """Scalars of a field: the mean of each component, and its slope along each axis of the scan."""
    scalars: dict[str, Scalar] = {}
    for (name, values), steps in zip(components.items(), slopes, strict=True):
        mean = fields.mean(values, np.isfinite(values))
        scalars[f"mean_{name}"] = None if np.isnan(mean) else mean
        along = ("scan_y", "scan_x") if values.ndim == 2 else ("frame",)
        scalars |= {f"descan_{name}_per_{a}": s for a, s in zip(along, steps, strict=True)}
    return scalars


def _divided(moment: np.ndarray, total: np.ndarray, counted: np.ndarray) -> np.ndarray:
    found = np.full(total.shape, np.nan)
    np.divide(moment, total, out=found, where=True if counted.all() else counted)
    return found
