"""Integrated centre of mass: the phase of a thin specimen, its gradient, divergence and curl, turned into the scan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mpi_kernels.contract import Header, Kind, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Output, Reduction, Term
from mpi_kernels.reductions import calibration, fields
from mpi_kernels.reductions.centre_of_mass import CentreOfMass, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegratedCentreOfMass(Reduction):
    """Phase from the centres of mass: outputs ``phase``, ``y``, ``x``, ``divergence`` and ``curl``.

    Parameters
    ----------
    radius, centre, unit
        Pixels that count, as in `CentreOfMass`.
    rotation : float or "estimate"
        Degrees by which a vector on the detector has to be turned, from +x towards +y, to lie in the scan.
        "estimate": the angle of least curl, in (-90, 90]; whether the contrast is right or reversed (180 degrees away)
        no curl can tell.  The estimate and its quality are scalars either way.
    remove_descan : bool
        Subtract the slopes of the fitted planes, as in `CentreOfMass`; they are stored either way.
    voltage_kv : float, optional
        Accelerating voltage in kV; the file's, if left out.

    Notes
    -----
    For a thin specimen of phase p, ``2 pi <q>(r)`` is the gradient of p convolved with the probe's intensity; ``<q>``
    is the centre of mass less its mean, and a positive phase attracts the pattern towards increasing phase.
    Sources: Müller et al. 2014, doi:10.1038/ncomms6653; Lazić, Bosch and Lazar 2016,
    doi:10.1016/j.ultramic.2015.10.011.

    In rad, rad/nm and rad/nm^2 where detector, scan and (for a detector in angles) the voltage are known; else in
    px, and the scalar ``uncalibrated`` says why.  The projected charge density is the divergence times a negative
    constant.  Frames that are mirrored or transposed are put right by the recipe's orientation only:
    ``rotation_quality_transposed`` above ``rotation_quality`` says that they are.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"4d"})
    radius: float | None = None
    centre: tuple[float, float] | None = None
    unit: str = "px"
    rotation: float | Literal["estimate"] = 0.0
    remove_descan: bool = False
    voltage_kv: float | None = None

    def __post_init__(self) -> None:
        self._plain()
        check_rotation(self.rotation)

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Maps over the scan, in rad or px."""
        scales = calibration.scales(header, self.voltage_kv)
        return {
            "phase": Output(over="scan", unit=scales.phase_unit, long_name="integrated centre of mass"),
            "y": Output(over="scan", unit=scales.vector_unit, long_name="shift along the scan's y"),
            "x": Output(over="scan", unit=scales.vector_unit, long_name="shift along the scan's x"),
            "divergence": Output(over="scan", unit=scales.derivative_unit, long_name="divergence of the shift"),
            "curl": Output(over="scan", unit=scales.derivative_unit, long_name="curl of the shift"),
        }

    def terms(self, header: Header) -> Mapping[str, Term]:
        """Total and first moments, shared with the centre of mass."""
        return self._plain().terms(header)

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Divide, calibrate, turn, integrate and differentiate."""
        y, x, _, scalars = measured(arrays["moments"], header.frames, remove_descan=self.remove_descan)
        scales = calibration.scales(header, self.voltage_kv)
        found, turned = integrated((y * scales.vector[0], x * scales.vector[1]), scales.steps, self.rotation)
        return found, {**scalars, **turned, "uncalibrated": scales.missing}

    def _plain(self) -> CentreOfMass:
        return CentreOfMass(radius=self.radius, centre=self.centre, unit=self.unit, remove_descan=self.remove_descan)


def check_rotation(rotation: float | Literal["estimate"]) -> None:
    """Raise `RecipeError` unless it is an angle in degrees or the word that asks for one."""
    if rotation != "estimate" and not math.isfinite(rotation):
        raise RecipeError(f"rotation = {rotation} is no angle")


def integrated(
    field: fields.Field, steps: fields.Steps, rotation: float | Literal["estimate"]
) -> tuple[dict[str, np.ndarray], dict[str, Scalar]]:
    """Maps ``phase y x divergence curl`` of a field on the detector's axes, and the rotation that was found and used.

    The components keep their means in ``y`` and ``x``; the phase is that of the field less its mean.
    """
    best = fields.rotation(field, steps)
    mirrored = fields.rotation((field[1], field[0]), steps)
    used = best.degrees if rotation == "estimate" else rotation
    if not math.isfinite(used):  # nothing to estimate from
        used = 0.0
    y, x = fields.rotated(field, used)
    divergence, curl = fields.derivatives((y, x), steps)
    found = {"phase": fields.phase(y, x, steps), "y": y, "x": x, "divergence": divergence, "curl": curl}
    return {n: np.ascontiguousarray(a) for n, a in found.items()}, {
        "rotation_deg": used,
        "rotation_estimate_deg": best.degrees,
        "rotation_quality": best.quality,
        "rotation_quality_transposed": mirrored.quality,
    }
