"""A single image, passed on unchanged, with its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header, Kind, Scalar
from mpi_kernels.protocols import Block, Output, Reduction

SLAB_PIXELS = 1 << 20
"""Pixels that the statistics take at a time; bounds their memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image(Reduction):
    """The image itself, in its own dtype: output ``image``; scalars ``min max mean std sum`` of its finite pixels.

    Notes
    -----
    ``sum`` of integers is exact; ``std`` is that of the population, from squared differences to the mean (float64).
    All are None if no pixel is finite; ``not_finite`` counts those that are not.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """One frame, over a scan of one position: rows are gathered as bytes, so no bit of a pixel can change."""
        return {"image": Output(over="scan", shape=header.det_shape, dtype=header.dtype, unit=header.unit)}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        """Copy."""
        out["image"][...] = block.frames

    def end(
        self,
        arrays: Mapping[str, np.ndarray],
        header: Header,  # noqa: ARG002
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """The image and its statistics."""
        flat = arrays["image"].reshape(-1)
        slabs = [flat[i : i + SLAB_PIXELS] for i in range(0, flat.size, SLAB_PIXELS)]
        count = sum(int(np.count_nonzero(np.isfinite(slab))) for slab in slabs)
        scalars: dict[str, Scalar] = {"not_finite": flat.size - count}
        if not count:
            return arrays, scalars | dict.fromkeys(("min", "max", "mean", "std", "sum"))
        total = sum(_total(slab) for slab in slabs)
        mean = total / count
        squares = sum(float(np.square(_finite(slab).astype(np.float64) - mean).sum()) for slab in slabs)
        scalars |= {
            "min": min(_finite(slab).min().item() for slab in slabs if _finite(slab).size),
            "max": max(_finite(slab).max().item() for slab in slabs if _finite(slab).size),
            "mean": mean,
            "std": float(np.sqrt(squares / count)),
            "sum": total,
        }
        return arrays, scalars


def _finite(slab: np.ndarray) -> np.ndarray:
    return slab if slab.dtype.kind in "iu" else slab[np.isfinite(slab)]


def _total(slab: np.ndarray) -> int | float:
    """Sum of the finite pixels: a Python integer of integers, which cannot overflow, else float64."""
    if slab.dtype.kind not in "iu":
        return float(_finite(slab).sum(dtype=np.float64))
    if slab.dtype.itemsize < 8:
        return int(slab.sum(dtype=np.int64 if slab.dtype.kind == "i" else np.uint64))
    return int(slab.sum(dtype=object))
