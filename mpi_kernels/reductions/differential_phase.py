"""Differential phase contrast by detector segments, and its integral."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mpi_kernels.contract import Header, Kind, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels, Output, Reduction, Term
from mpi_kernels.reductions import calibration, fields, geometry
from mpi_kernels.reductions.centre_of_mass import described
from mpi_kernels.reductions.integrated_centre_of_mass import check_rotation, integrated
from mpi_kernels.weights import sum_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentialPhase(Reduction):
    """Signals of opposite segments over their total: outputs ``phase y x divergence curl`` and ``total``.

    Parameters
    ----------
    segments : int
        Equal sectors of the ring, an even number of 4 to 64; the first is centred on direction ``turn``, the others
        follow from +x towards +y.
    inner, outer : float, optional
        Radii of the ring in ``unit``; 0, and half of the frame's shorter side, if left out.
    turn : float
        Degrees.
    centre : (float, float), optional
        ``(y, x)`` in pixels; the middle of the frame if left out.  The pixel at the centre itself has no direction
        and is in no segment.
    unit : str
        Of the radii: "px", or the unit in which the detector is calibrated.
    disc_radius : float, optional
        Radius of the bright disc (the convergence semi-angle) in ``unit``: turns signals into shifts, and so the
        phase into rad where calibrations allow.  It lies between ``inner`` and ``outer``.
    rotation, remove_descan, voltage_kv
        As in `IntegratedCentreOfMass`.

    Notes
    -----
    ``x = sum_k I_k cos a_k / sum_k I_k``, ``y`` likewise with the sine; with four segments A, B, C, D this is
    ``x = (A - C) / total`` and ``y = (B - D) / total``.  NaN where no count fell on any segment.
    Source: Shibata et al. 2012, doi:10.1038/nphys2337; integrated: Lazić, Bosch and Lazar 2016,
    doi:10.1016/j.ultramic.2015.10.011.

    An even disc of radius R that is shifted rigidly by d gives ``n sin(pi/n)/pi * d/R / (1 - (inner/R)^2)``, to first
    order in d/R: only its rim moves through the segments.  ``disc_radius`` inverts this; it is exact for a phase ramp
    over the probe and an approximation for structure finer than the probe.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"4d"})
    segments: int = 4
    inner: float = 0.0
    outer: float | None = None
    turn: float = 0.0
    centre: tuple[float, float] | None = None
    unit: str = "px"
    disc_radius: float | None = None
    rotation: float | Literal["estimate"] = 0.0
    remove_descan: bool = False
    voltage_kv: float | None = None

    def __post_init__(self) -> None:
        if not 4 <= self.segments <= 64 or self.segments % 2:
            raise RecipeError(f"segments = {self.segments}: an even number of 4 to 64")
        if not math.isfinite(self.turn):
            raise RecipeError(f"turn = {self.turn} is no angle")
        if self.disc_radius is not None and not self.inner < self.disc_radius < math.inf:
            raise RecipeError(f"disc_radius = {self.disc_radius} is not beyond the inner radius {self.inner}")
        check_rotation(self.rotation)

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Maps over the scan."""
        scales = self._scales(header)
        return {
            "phase": Output(over="scan", unit=scales.phase_unit, long_name="integrated differential phase contrast"),
            "y": Output(over="scan", unit=scales.vector_unit, long_name="differential phase contrast along y"),
            "x": Output(over="scan", unit=scales.vector_unit, long_name="differential phase contrast along x"),
            "divergence": Output(over="scan", unit=scales.derivative_unit, long_name="divergence of the signal"),
            "curl": Output(over="scan", unit=scales.derivative_unit, long_name="curl of the signal"),
            "total": Output(
                over="scan",
                dtype=sum_dtype(header.dtype).name,
                unit=header.unit,
                long_name="sum over all segments",
            ),
        }

    def terms(self, header: Header) -> Mapping[str, Term]:
        """The segments as regions of one detector."""
        return {"segments": Labels(self._labels(header), self.segments)}

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Weigh the segments, divide, scale, turn and integrate."""
        images = arrays["segments"]
        total = np.ascontiguousarray(images.sum(axis=-1))
        counted = np.isfinite(total) & (total != 0)
        directions = np.radians(self.turn + 360.0 * np.arange(self.segments) / self.segments)
        signals = [_signal(images, np.round(w, 15), total, counted) for w in (np.sin(directions), np.cos(directions))]
        slopes = [fields.slopes(s) for s in signals]
        scalars = described({"y": signals[0], "x": signals[1]}, slopes)
        if self.remove_descan:
            signals = [s - fields.plane(s, along) for s, along in zip(signals, slopes, strict=True)]
        scales = self._scales(header)
        field = (signals[0] * scales.vector[0], signals[1] * scales.vector[1])
        found, turned = integrated(field, scales.steps, self.rotation)
        scalars |= {"frames_without_counts": int(header.frames - np.count_nonzero(counted))}
        return {**found, "total": total}, {**scalars, **turned, "uncalibrated": scales.missing}

    def _scales(self, header: Header) -> calibration.Scales:
        """What a signal of 1 is worth: a number of its own, or with the disc's radius a shift."""
        if self.disc_radius is None:
            return calibration.Scales((1.0, 1.0), (1.0, 1.0), "", "px", "1/px", "disc_radius is not given")
        scales = calibration.scales(header, self.voltage_kv)
        covered = 1 - (self.inner / self.disc_radius) ** 2
        shift = self.disc_radius * covered * math.pi / (self.segments * math.sin(math.pi / self.segments))
        worth = [s * shift / p for s, p in zip(scales.vector, geometry.pixel_size(header, self.unit), strict=True)]
        return calibration.Scales(
            (worth[0], worth[1]),
            scales.steps,
            scales.vector_unit,
            scales.phase_unit,
            scales.derivative_unit,
            scales.missing,
        )

    def _labels(self, header: Header) -> np.ndarray:
        """Segment of each pixel, (det_y, det_x) int32; -1 outside the ring and at its centre."""
        outer = 2 * geometry.default_radius(header, self.unit) if self.outer is None else self.outer
        if not 0 <= self.inner < outer < math.inf:
            raise RecipeError(f"no ring between radius {self.inner} and {outer}")
        if self.disc_radius is not None and self.disc_radius > outer:
            raise RecipeError(f"disc_radius = {self.disc_radius} is beyond the outer radius {outer}")
        ring = geometry.rings(header, self.centre, np.array([self.inner, outer]), self.unit) == 0
        ring &= geometry.distance2(header, self.centre, self.unit) > 0
        directed = geometry.directions(header, self.centre, self.unit)
        edges = self.turn + 360.0 * (np.arange(self.segments + 1) - 0.5) / self.segments
        labels = np.full(header.det_shape, -1, np.int32)
        for k in range(self.segments):
            labels[ring & geometry.sector(directed, edges[k], edges[k + 1])] = k
        if (labels < 0).all():
            raise RecipeError(f"the segments hold no pixel of a frame of {header.det_shape}")
        return labels


def _signal(images: np.ndarray, weights: np.ndarray, total: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """``sum_k w_k I_k / total`` of each frame; NaN without counts."""
    found = np.full(total.shape, np.nan)
    np.divide(images.astype(np.float64) @ weights, total, out=found, where=counted)
    return found
