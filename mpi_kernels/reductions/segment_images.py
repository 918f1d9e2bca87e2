"""Segment images: the detector cut into bins, one image of the specimen per bin, with the angle that it looks from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Axis, Header, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels, Output, Reduction, Sum, Term
from mpi_kernels.reductions import calibration, geometry
from mpi_kernels.weights import sum_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentImages(Reduction):
    """One image per detector segment: outputs ``images``, ``angles`` and ``pixels``.

    Parameters
    ----------
    across : int
        Segments along each side of the frame, which is cut into equal bins as nearly as whole pixels allow; a side
        of fewer pixels has one per pixel.
    radius : float, optional
        Only pixels with ``d <= radius`` of the centre count, and segments without such a pixel are left out; all
        pixels if left out.
    centre : (float, float), optional
        ``(y, x)`` in pixels of that disc; the middle of the frame if left out.
    unit : str
        Of the radius: "px", or the unit in which the detector is calibrated.

    Notes
    -----
    The segments must be known before the data are, so the whole frame is cut by default, and whoever reads the result
    keeps the bright ones (`images` divided by `pixels`).

    ``angles`` are each segment's mean position weighted with the intensity of the whole scan, ``sum(p I) / sum(I)``,
    so that a segment on the edge of the bright disc has the angle of its bright part; its middle where no count fell.
    In mrad where the detector is calibrated in mrad or rad, or in reciprocal lengths and the file knows the voltage,
    with the file's own origin; else in px from the first pixel.  By reciprocity each image is that of a tilted plane
    wave.  Source: Lupini, Chi and Jesse 2016,
    doi:10.1111/jmi.12372.
    """

    across: int = 8
    radius: float | None = None
    centre: tuple[float, float] | None = None
    unit: str = "px"

    def __post_init__(self) -> None:
        if not 1 <= self.across <= 64:
            raise RecipeError(f"across = {self.across}: a side is cut into 1 to 64 segments")
        if self.centre is not None and self.radius is None:
            raise RecipeError("centre is the centre of a disc: give its radius as well")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Images over the scan, and where each of them looks from."""
        count = int(self._labels(header).max()) + 1
        segment, unit = Axis(name="segment", unit=""), angle_unit(header)
        return {
            "images": Output(
                over="scan",
                shape=(count,),
                dtype=sum_dtype(header.dtype).name,
                unit=header.unit,
                long_name="sum over each segment",
                axes=(segment,),
            ),
            "angles": Output(
                over="frame",
                shape=(count, 2),
                unit=unit,
                long_name="centroid (y, x) of each segment",
                axes=(segment, Axis(name="yx", unit="")),
            ),
            "pixels": Output(
                over="frame", shape=(count,), dtype="int64", long_name="pixels of each segment", axes=(segment,)
            ),
        }

    def terms(self, header: Header) -> Mapping[str, Term]:
        """The segments, and the sum of all frames, which weighs their centroids."""
        labels = self._labels(header)
        return {"images": Labels(labels, int(labels.max()) + 1), "sum": Sum()}

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """The images as they are, and the centroids."""
        labels = self._labels(header)
        pixels = np.bincount(labels[labels >= 0])
        found = {
            "images": arrays["images"],
            "angles": _centroids(labels, arrays["sum"], header),
            "pixels": pixels.astype(np.int64),
        }
        return found, {"segments": len(pixels), "angle_unit": angle_unit(header)}

    def _labels(self, header: Header) -> np.ndarray:
        """Segment of each pixel, (det_y, det_x) int32; -1 outside the disc."""
        rows, columns = (np.arange(n) * min(self.across, n) // n for n in header.det_shape)
        bins = rows[:, None] * (int(columns[-1]) + 1) + columns[None, :]
        if self.radius is None:
            return bins.astype(np.int32)
        inside = geometry.disc(header, self.centre, self.radius, self.unit)
        if not inside.any():
            raise RecipeError(f"no pixel of a frame of {header.det_shape} is within {self.radius} {self.unit}")
        labels = np.full(header.det_shape, -1, np.int32)
        labels[inside] = np.unique(bins[inside], return_inverse=True)[1]
        return labels


def angle_unit(header: Header) -> str:
    """``"mrad"`` where both axes of the detector are calibrated as angles, or reciprocal lengths and the voltage is
    known, else ``"px"``."""  # noqa: D205, D209
    return "mrad" if len(header.det_axes) == 2 and all(_mrad(a, header) for a in header.det_axes) else "px"


def _mrad(axis: Axis, header: Header) -> float:
    """Size of an axis' unit in mrad; 0 if it is no angle, or the scale no number."""
    if not np.isfinite((axis.scale, axis.offset)).all() or not axis.scale:
        return 0.0
    kind, size = geometry.UNITS.get(axis.unit, ("", 0.0))
    known = calibration.volts(header)
    if kind == "reciprocal":  # angle = wavelength * q
        return size * calibration.wavelength_nm(known) * 1e3 if known else 0.0
    return size if kind == "angle" else 0.0


def _centroids(labels: np.ndarray, total: np.ndarray, header: Header) -> np.ndarray:
    """Mean positions of the segments weighted with the intensity, (segments, 2) as ``(y, x)``."""
    counted = labels >= 0
    which = labels[counted]
    weights = total[counted].astype(np.float64)
    # a dead or hot pixel (NaN, infinity) or a negative sum (readout offset) pulls nothing
    weights = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0)
    dark = np.bincount(which, weights=weights) == 0
    weights = np.where(dark[which], 1.0, weights)
    found = np.empty((len(dark), 2))
    for column, position in enumerate(np.nonzero(counted)):
        moment = np.bincount(which, weights=weights * position)
        found[:, column] = moment / np.bincount(which, weights=weights)
    if angle_unit(header) == "mrad":
        for column, axis in enumerate(header.det_axes):
            found[:, column] = (axis.offset + axis.scale * found[:, column]) * _mrad(axis, header)
    return found
