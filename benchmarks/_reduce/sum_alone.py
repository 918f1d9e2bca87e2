"""The sum of all frames and nothing else, for the row that is held against programs which do only that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.protocols import Output, Reduction, Sum, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class SumAlone(Reduction):
    """Output ``sum``."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """One array of the frame's shape."""
        dtype = {"u": "uint64", "i": "int64"}.get(np.dtype(header.dtype).kind, "float64")
        return {"sum": Output(over="frame", shape=header.det_shape, dtype=dtype, unit=header.unit)}

    def terms(self, header: Header) -> Mapping[str, Term]:  # noqa: ARG002
        """The sum."""
        return {"sum": Sum()}
