"""Position-averaged diffraction pattern, of the whole scan or of a region of the specimen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header, Kind, Scalar
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Block, Output, Reduction, Sum, Term
from mpi_kernels.reductions import mask_file
from mpi_kernels.weights import sum_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacbed(Reduction):
    """Mean frame of a region of the scan: outputs ``mean`` and ``sum``.

    Parameters
    ----------
    region : (int, int, int, int), optional
        ``(y0, x0, y1, x1)`` in scan steps: positions ``y0 <= y < y1``, ``x0 <= x < x1``; the whole scan if left out.
    file : str, optional
        A ``.npy`` of the scan's shape, bool: the positions that count.  Not together with ``region``.

    Notes
    -----
    ``sum`` is exact for integers.  Averaged over whole unit cells the pattern depends on thickness and tilt, not on
    source size.  Source: LeBeau, Findlay, Allen and Stemmer 2010, doi:10.1016/j.ultramic.2009.10.001.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"4d"})
    region: tuple[int, int, int, int] | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if self.region is not None and self.file is not None:
            raise RecipeError("region and file both say which positions count: give one of them")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Two patterns of the frame's shape."""
        self._positions(header)  # a wrong region is told before any frame is read
        whole = sum_dtype(header.dtype).name
        shape, unit = header.det_shape, header.unit
        return {
            "mean": Output(over="frame", shape=shape, unit=unit, long_name="position-averaged pattern"),
            "sum": Output(over="frame", shape=shape, dtype=whole, unit=unit, long_name="sum over the region"),
        }

    def terms(self, header: Header) -> Mapping[str, Term]:  # noqa: ARG002
        """The sum of all frames, which other reductions want as well; a region has to choose its frames itself."""
        return {"sum": Sum()} if self.region is None and self.file is None else {}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        """Add the frames of the region."""
        counts = self._positions(block.header).reshape(-1)[block.start : block.start + len(block.frames)]
        whole = out["sum"]
        _check_bound(block, whole.dtype)
        for run in _runs(counts):
            whole += block.frames[run].sum(axis=0, dtype=whole.dtype)
        out["mean"][...] += np.count_nonzero(counts)  # until the end: the positions that were measured

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Divide by the number of positions."""
        positions = int(arrays["mean"].flat[0]) if "mean" in arrays else header.frames
        scalars: dict[str, Scalar] = {"positions": positions}
        if self.file is not None:
            scalars["file_sha256"] = mask_file.read(self.file).sha256
        return {"mean": arrays["sum"] / positions, "sum": arrays["sum"]}, scalars

    def _positions(self, header: Header) -> np.ndarray:
        """Which positions count, (scan_y, scan_x) bool."""
        if self.file is not None:
            chosen = mask_file.read(self.file).fitting(header.scan_shape, "the scan")
            if chosen.dtype != np.bool_:
                raise RecipeError(f"the positions are {chosen.dtype}, not bool", path=self.file)
        else:
            y0, x0, y1, x1 = self.region or (0, 0, *header.scan_shape)
            height, width = header.scan_shape
            if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
                raise RecipeError(f"region {list(self.region or ())} is not inside the scan of {header.scan_shape}")
            chosen = np.zeros(header.scan_shape, np.bool_)
            chosen[y0:y1, x0:x1] = True
        if not chosen.any():
            raise RecipeError("no position counts", path=self.file)
        return chosen


def _check_bound(block: Block, whole: np.dtype) -> None:
    """Refuse pixels that could overflow the sum of a whole scan; only 64-bit data can hold such values."""
    frames = block.frames
    if frames.dtype.kind not in "iu" or np.iinfo(frames.dtype).max * block.header.frames <= np.iinfo(whole).max:
        return
    top = max(int(frames.max()), -int(frames.min())) * block.header.frames
    if top > np.iinfo(whole).max:
        raise RecipeError(f"the sum of the region can reach {top}, more than {whole} holds")


def _runs(counts: np.ndarray) -> list[slice]:
    """Slices of consecutive frames that count: views, where an index would copy them."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], counts, [False])).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
