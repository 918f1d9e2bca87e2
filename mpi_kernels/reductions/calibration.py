"""From pixels and scan steps to the gradient of a phase in rad/nm, where the file's calibrations allow it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpi_kernels.contract import Axis, Header
from mpi_kernels.errors import RecipeError
from mpi_kernels.reductions import geometry

LENGTHS = {"nm": 1.0, "Å": 0.1, "A": 0.1, "pm": 1e-3, "um": 1e3, "µm": 1e3, "μm": 1e3, "mm": 1e6, "m": 1e9}
"""Units of a scan axis in nm; the two micro signs are U+00B5 and U+03BC."""

VOLTAGE = "high_tension_v"
"""Key of the accelerating voltage, in V, in a header's metadata."""

PLANCK = 6.62607015e-34
CHARGE = 1.602176634e-19
MASS = 9.1093837015e-31
LIGHT = 299792458.0
"""h (J s), e (C), electron mass (kg), c (m/s).  Source: CODATA 2018, physics.nist.gov/constants."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What one detector pixel and one scan step are worth.

    Attributes
    ----------
    vector : (float, float)
        ``vector_unit`` per pixel, along y and x.
    steps : (float, float)
        Length of a scan step along y and x, in nm or in steps.
    vector_unit, phase_unit, derivative_unit : str
        Of the field, its integral and its derivatives.
    missing : str
        Why it is all in pixels; empty where it is in rad.
    """

    vector: geometry.Point = (1.0, 1.0)
    steps: geometry.Point = (1.0, 1.0)
    vector_unit: str = "px"
    phase_unit: str = "px^2"
    derivative_unit: str = ""
    missing: str = ""


def wavelength_nm(volts: float) -> float:
    """De Broglie wavelength of an electron in nm, relativistic: ``h / sqrt(2 m e V (1 + e V / (2 m c^2)))``.

    Source: Reimer and Kohl 2008, Transmission Electron Microscopy, chapter 2.

    >>> round(wavelength_nm(300e3) * 1e3, 4)  # pm
    1.9687
    """
    energy = CHARGE * volts
    return 1e9 * PLANCK / math.sqrt(2 * MASS * energy * (1 + energy / (2 * MASS * LIGHT * LIGHT)))


def scales(header: Header, voltage_kv: float | None = None) -> Scales:
    """Scales in rad/nm where detector, scan and, for angles, the voltage are known; else in pixels and steps.

    A shift of the pattern by the spatial frequency q is a phase gradient of ``2 pi q``; ``q = angle / wavelength``.
    The directions are those of the indices, so an axis whose calibration runs backwards is not used.

    Raises
    ------
    RecipeError
        The voltage is none.
    """
    if voltage_kv is not None and not 0 < voltage_kv < math.inf:
        raise RecipeError(f"voltage_kv = {voltage_kv} is no voltage")
    if len(header.det_axes) != 2 or len(header.scan_axes) != 2:
        return Scales(missing="the detector or the scan is not calibrated")
    if not all(math.isfinite(a.scale) and a.scale > 0 for a in (*header.det_axes, *header.scan_axes)):
        return Scales(missing="an axis runs backwards or has no step")
    lengths = [LENGTHS.get(a.unit, 0.0) * a.scale for a in header.scan_axes]
    if not all(lengths):
        return Scales(missing=f"the scan is in {header.scan_axes[0].unit or 'steps'}, which is no length")
    known = volts(header, voltage_kv)
    found = [_gradient(axis, known) for axis in header.det_axes]
    if not all(found):
        angles = any(geometry.UNITS.get(a.unit, ("",))[0] == "angle" for a in header.det_axes)
        return Scales(missing="the voltage is unknown" if angles and not known else "the detector's unit is no angle")
    return Scales((found[0], found[1]), (lengths[0], lengths[1]), "rad/nm", "rad", "rad/nm^2")


def volts(header: Header, voltage_kv: float | None = None) -> float:
    """The recipe's voltage, or the file's; 0 if neither has one."""
    if voltage_kv is not None:
        return voltage_kv * 1e3
    known = header.metadata.get(VOLTAGE)
    usable = isinstance(known, int | float) and not isinstance(known, bool) and 0 < known < math.inf
    return float(known) if usable and known is not None else 0.0


def _gradient(axis: Axis, known: float) -> float:
    """Phase gradient of one pixel, rad/nm, at a voltage or 0 for an unknown one; 0 if it can't be told."""
    kind, size = geometry.UNITS.get(axis.unit, ("", 0.0))
    if kind == "reciprocal":
        return 2 * math.pi * axis.scale * size
    if kind == "angle" and known:
        return 2 * math.pi * axis.scale * size * 1e-3 / wavelength_nm(known)
    return 0.0
