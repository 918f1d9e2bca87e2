"""Calibrations as HDF5 conventions write them, turned into axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpi_kernels.contract import Axis
from mpi_kernels.formats.hdf5_open import Contents, attribute, text_of
from mpi_kernels.formats.pixels import axes, split_shape

Calibration = tuple[float, float, str]

_UNITS = {
    "[n_m]": "nm",
    "[n_m^-1]": "1/nm",
    "A^-1": "1/Å",
    "1/A": "1/Å",
    "A": "Å",
    "pixels": "px",
    "pixel": "px",
    "?/m": "px",
}
"""py4DSTEM, HyperSpy, Prismatic and fpd spellings; ``A^-1`` would be read as ampere by unit libraries."""


def dimension(contents: Contents, name: str) -> Calibration:
    """Scale, offset and unit of a dimension dataset; uncalibrated if it is none or not uniform."""
    dataset = contents.datasets.get(name)
    if dataset is None or dataset.ndim != 1 or dataset.dtype.kind not in "iuf" or not 2 <= dataset.shape[0] <= 1 << 20:
        return 1.0, 0.0, ""
    values = dataset[:].astype(float)
    scale = (values[-1] - values[0]) / (len(values) - 1)
    if not math.isfinite(scale) or not abs(values[1] - values[0] - scale) <= 1e-3 * abs(scale):
        return 1.0, 0.0, ""
    return float(scale), float(values[0]), text_of(attribute(dataset, "units"))


def array_axes(
    shape: Sequence[int], dims: Sequence[Calibration], path: str
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Axes of the squeezed array; the calibrations of dropped axes of length 1 go with them."""
    _, scan_shape, _ = split_shape(shape, path)
    if len(dims) != len(shape):
        return (), ()
    kept = [(s, o, _UNITS.get(u, u)) for s, o, u in dims]
    while len(kept) > len(scan_shape) + 2:
        lengths = list(shape[: len(shape) - 2])
        last = len(lengths) - 1 - lengths[::-1].index(1)
        del kept[last]
        shape = [*shape[:last], *shape[last + 1 :]]
    if all(c == (1.0, 0.0, "") for c in kept):
        return (), ()
    return axes(scan_shape, kept)


def number(value: Any, default: float = 1.0) -> float:
    """An attribute as a number; ``default`` if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def scalar(contents: Contents, group: str, names: Sequence[str]) -> float:
    """The first number found under one of the names of a group; 0 if there is none."""
    for name in names:
        dataset = contents.datasets.get(f"{group}/{name}")
        if dataset is not None and dataset.size == 1 and dataset.dtype.kind in "iuf":
            return float(dataset[()].item() if dataset.ndim == 0 else dataset[:].flat[0])
    return 0.0
