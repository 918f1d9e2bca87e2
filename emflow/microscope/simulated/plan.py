"""What an action means for detectors and files, worked out before anything is done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from emflow.microscope.protocol import Acquire, Acquired, Camera, Scan
from emflow.microscope.simulated.detector import PIXELS_AT_ONCE
from emflow.microscope.simulated.optics import Floats
from emflow.microscope.simulated.parameters import Parameters
from emflow.microscope.simulated.writing import MERLIN_LEAD, Dataset, Format

MAX_BYTES = 4 << 30
"""Largest file."""

MAX_EXPOSURE_US = 1e9
MAX_STEP_NM = 1e4
MAX_CENTRE_NM = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An acquisition to be made.

    Attributes
    ----------
    kind : str
        ``image``, ``stack`` or ``4d``.
    form : str
        Format of the file.
    scan_shape : tuple of int
        ``()`` for an image, ``(frames,)``, ``(scan_y, scan_x)``.
    det_shape : (int, int)
        Of a frame; of the image, for one.
    grid : (int, int)
        Exposures: rows of the scan and positions in a row; a camera series has one position in each.
    step_nm : float
        Between positions; 0 for a parked probe.
    centre_nm : (float, float)
        Of the field.
    frame_s : float
        Each exposure.
    electrons : float
        That reach the specimen in each.
    """

    kind: Literal["image", "stack", "4d"]
    form: Format
    dtype: np.dtype
    scan_shape: tuple[int, ...]
    det_shape: tuple[int, int]
    grid: tuple[int, int]
    step_nm: float
    centre_nm: tuple[float, float]
    frame_s: float
    electrons: float
    reach_mrad: float

    @property
    def exposures(self) -> int:
        """How many there are."""
        return math.prod(self.grid)

    @property
    def dose_e(self) -> float:
        """Electrons on the specimen in all."""
        return self.electrons * self.exposures

    @property
    def file_bytes(self) -> int:
        """Size of the data in the file."""
        lead = MERLIN_LEAD if self.form == "merlin" else 0
        frames = math.prod(self.scan_shape)
        return frames * (math.prod(self.det_shape) * self.dtype.itemsize + lead)

    @property
    def piece(self) -> int:
        """Exposures of a row that are computed at once."""
        pixels = 1 if self.kind == "image" else math.prod(self.det_shape)
        return max(1, min(self.grid[1], PIXELS_AT_ONCE // pixels))

    def positions(self) -> Iterator[tuple[Floats, Floats, int]]:
        """Where the probe stands, piece by piece: y and x, (n,) float64 nm, and the exposures made before."""
        (rows, columns), (cy, cx) = self.grid, self.centre_nm
        # as Nion Swift has it: position n / 2 is the centre
        y = cy + (np.arange(rows) - rows / 2) * self.step_nm
        x = cx + (np.arange(columns) - columns / 2) * self.step_nm
        for row in range(rows):
            for start in range(0, columns, self.piece):
                part = x[start : start + self.piece]
                yield np.full(len(part), y[row]), part, row * columns + start

    def acquired(self, name: str, path: str) -> Acquired:
        """The note of the finished acquisition."""
        return Acquired(
            name=name,
            path=path,
            kind=self.kind,
            scan_shape=self.scan_shape,
            det_shape=self.det_shape,
            frames=math.prod(self.scan_shape),
            dose_e=self.dose_e,
        )

    def dataset(self, name: str, trace: str, controls: Mapping[str, float]) -> Dataset:
        """The array to write, described as Nion Swift does, with the controls (never the true aberrations)."""
        axes = self._scan_axes() + self._det_axes()
        shape = (*self.scan_shape, *self.det_shape)
        properties: dict[str, Any] = {
            "title": name,
            "data_shape": list(shape),
            "data_dtype": self.dtype.name,
            "is_sequence": self.kind == "stack",
            "collection_dimension_count": 2 if self.kind == "4d" else 0,
            "datum_dimension_count": 2,
            "intensity_calibration": {"offset": 0.0, "scale": 1.0, "units": "counts"},
            "dimensional_calibrations": [{"offset": o, "scale": s, "units": u} for o, s, u in axes],
            "metadata": {
                "hardware_source": {"hardware_source_name": "simulated", "exposure": self.frame_s},
                "instrument": {"defocus": controls["C10_nm"] * 1e-9, "controls": dict(controls)},
                "emflow": {"trace": trace, "electrons_per_exposure": self.electrons},
            },
        }
        if self.step_nm:
            properties["metadata"]["scan"] = {
                "fov_nm": self.step_nm * max(self.grid),
                "center_y_nm": self.centre_nm[0],
                "center_x_nm": self.centre_nm[1],
                "rotation": 0.0,
            }
        # an image has a row of its pixels for each row of the scan
        piece = self.piece if self.kind == "4d" else 1
        return Dataset(shape=shape, dtype=self.dtype, piece=piece, properties=properties)

    def _scan_axes(self) -> list[tuple[float, float, str]]:
        """Offset, scale and unit of each axis of the scan."""
        if self.kind == "stack":
            return [(0.0, self.frame_s, "s")]
        return self._field() if self.kind == "4d" else []

    def _det_axes(self) -> list[tuple[float, float, str]]:
        if self.kind == "image":
            return self._field()
        scales = [2e-3 * self.reach_mrad / n for n in self.det_shape]
        return [(-(n // 2) * s, s, "rad") for n, s in zip(self.det_shape, scales, strict=True)]

    def _field(self) -> list[tuple[float, float, str]]:
        return [(c - n / 2 * self.step_nm, self.step_nm, "nm") for n, c in zip(self.grid, self.centre_nm, strict=True)]


def plan(action: Acquire, parameters: Parameters) -> Plan:
    """What an action means.

    Raises
    ------
    ValueError
        It can't be made: more than 4 GiB, or a step, time or place that no microscope has.
    """
    exposure_us = action.dwell_us if isinstance(action, Scan) else action.exposure_us
    _within("the exposure, us", exposure_us, MAX_EXPOSURE_US)
    still = isinstance(action, Camera)
    if not isinstance(action, Camera):
        _within("step_nm", action.step_nm, MAX_STEP_NM)
        if not all(math.isfinite(c) and abs(c) <= MAX_CENTRE_NM for c in action.centre_nm):
            raise ValueError(f"centre_nm is {action.centre_nm}, out of reach ({MAX_CENTRE_NM:g})")
    image = isinstance(action, Scan)
    grid = (action.frames, 1) if isinstance(action, Camera) else action.shape
    made = Plan(
        kind="stack" if still else "image" if image else "4d",
        form="npy" if image and parameters.format == "merlin" else parameters.format,
        dtype=np.dtype(parameters.dtype),
        scan_shape=() if image else (grid[0],) if still else grid,
        det_shape=grid if image else parameters.ronchigram_shape if still else parameters.detector_shape,
        grid=grid,
        step_nm=0.0 if isinstance(action, Camera) else action.step_nm,
        centre_nm=(0.0, 0.0) if isinstance(action, Camera) else action.centre_nm,
        frame_s=exposure_us * 1e-6,
        electrons=parameters.electrons_per_us * exposure_us,
        reach_mrad=parameters.detector_mrad,
    )
    if made.file_bytes > MAX_BYTES:
        raise ValueError(f"it would be {made.file_bytes / 2**30:.1f} GiB, more than {MAX_BYTES >> 30}")
    return made


def _within(what: str, value: float, most: float) -> None:
    if not (math.isfinite(value) and 0 < value <= most):
        raise ValueError(f"{what} is {value:g}; it must be more than 0 and at most {most:g}")
