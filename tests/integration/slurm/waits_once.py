"""A reduction for tests: the first job that computes it does not get on, and the next ones do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.protocols import Block, Output, Reduction


@dataclass(frozen=True, slots=True)
class WaitsOnce(Reduction):
    """Frames that were seen; whoever makes the folder ``marker`` waits for as long as a test may take."""

    marker: str

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """One number for each frame."""
        return {"seen": Output(over="scan", dtype="int64")}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        """Count, or wait."""
        try:
            Path(self.marker).mkdir()
        except FileExistsError:
            out["seen"][...] = 1
        else:
            time.sleep(300)
