"""What Nion Swift writes beside its data: the ``properties`` of an .h5 file, the .json beside a .npy file.

Source: nionswift ``nion/swift/model/HDF5Handler.py`` and ``nion/data/DataAndMetadata.py`` (keys
``collection_dimension_count``, ``datum_dimension_count``, ``dimensional_calibrations``, ``intensity_calibration``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpi_kernels.contract import Axis, Scalar
from mpi_kernels.errors import FormatError
from mpi_kernels.formats.pixels import axes

_FACTS = (
    ("high_tension_v", "instrument", "high_tension"),
    ("defocus_m", "instrument", "defocus"),
    ("exposure_s", "hardware_source", "exposure"),
    ("binning", "hardware_source", "binning"),
    ("camera", "hardware_source", "hardware_source_name"),
    ("counts_per_electron", "hardware_source", "counts_per_electron"),
    ("fov_nm", "scan", "fov_nm"),
    ("scan_rotation_rad", "scan", "rotation"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the properties say: calibrations, unit, metadata, and what looks doubtful."""

    scan_axes: tuple[Axis, ...] = ()
    det_axes: tuple[Axis, ...] = ()
    unit: str = "counts"
    metadata: dict[str, Scalar]
    warnings: tuple[str, ...] = ()


def facts(properties: Mapping[str, Any], shape: Sequence[int], path: str) -> Facts:
    """Read Swift's properties of an array that has ``shape``.

    Raises
    ------
    FormatError
        The properties say that the data are no frames (spectra, a different number of axes).
    """
    scan_count = len(shape) - 2
    datum = properties.get("datum_dimension_count")
    if isinstance(datum, int) and datum != 2:
        raise FormatError(
            f"its data have {datum} axes for each scan position; frames have 2",
            path=path,
            next_step="spectra are not reduced; name a 4D or image dataset",
        )
    stated = properties.get("data_shape")
    if isinstance(stated, list) and stated != list(shape):
        raise FormatError(
            f"its properties describe an array of shape {stated!r:.80}, the data have {list(shape)}",
            path=path,
            next_step="export the data again: properties and data do not belong together",
        )
    scan_axes, det_axes = axes(tuple(shape[:scan_count]), _calibrations(properties))
    metadata = _metadata(properties)
    return Facts(
        scan_axes=scan_axes,
        det_axes=det_axes,
        unit=_unit(properties),
        metadata=metadata,
        warnings=_valid_rows(properties, shape),
    )


def _calibrations(properties: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    found = properties.get("dimensional_calibrations")
    if not isinstance(found, list) or not all(isinstance(c, dict) for c in found):
        return []
    return [(_number(c.get("scale"), 1.0), _number(c.get("offset"), 0.0), _text(c.get("units"))) for c in found]


def _unit(properties: Mapping[str, Any]) -> str:
    found = properties.get("intensity_calibration")
    return (_text(found.get("units")) if isinstance(found, dict) else "") or "counts"


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def _text(value: object) -> str:
    return value[:64] if isinstance(value, str) else ""


def _metadata(properties: Mapping[str, Any]) -> dict[str, Scalar]:
    kept: dict[str, Scalar] = {}
    metadata = properties.get("metadata")
    if isinstance(metadata, dict):
        for name, group, key in _FACTS:
            value = metadata.get(group, {}).get(key) if isinstance(metadata.get(group), dict) else None
            if isinstance(value, (bool, int, float, str)):
                kept[name] = value
    for name in ("title", "created"):
        if _text(properties.get(name)):
            kept[name] = _text(properties[name])
    return kept


def _valid_rows(properties: Mapping[str, Any], shape: Sequence[int]) -> tuple[str, ...]:
    """A warning and not an error: what a scan in sections leaves in ``valid_rows`` is not documented."""
    metadata = properties.get("metadata")
    scan = metadata.get("scan") if isinstance(metadata, dict) else None
    rows = scan.get("valid_rows") if isinstance(scan, dict) else None
    if len(shape) == 4 and isinstance(rows, int) and rows < shape[0]:
        return (f"Swift says that only {rows} of {shape[0]} scan rows are valid",)
    return ()
