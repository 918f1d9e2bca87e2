"""A reduction as a user would write it: largest value of each frame, in plain numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.protocols import Block, Output, Reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMax(Reduction):
    def outputs(self, header: Header) -> Mapping[str, Output]:
        return {"map": Output(over="scan", dtype=header.dtype, unit=header.unit)}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        out["map"][...] = block.frames.max(axis=(1, 2))
