"""Exact scans on their way to a file: how fast it grows, and how Nion Swift would describe it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mpi_kernels.exact import ExactScan

ByteOrder = Literal["<", ">", "="]

NM_PER_STEP = 0.5
"""Scan calibration of the files, nm per position; the detector's is 1 mrad per pixel with 0 in the middle."""

BYTES_PER_CALL = 1 << 24
"""Bytes that are made at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a file grows.

    Attributes
    ----------
    rows_per_step : int
        Scan rows (frames of a stack) written at once; 0 writes all without a pause.
    pause_s : float
        Seconds between steps.
    step : callable, optional
        Called after each step with the number of frames written; may raise to stop in the middle.
    """

    rows_per_step: int = 0
    pause_s: float = 0.0
    step: Callable[[int], None] | None = None


AT_ONCE = Pace()


def blocks(scan: ExactScan, pace: Pace = AT_ONCE) -> Iterator[tuple[int, int]]:
    """Bounds of the frames to write next; pauses and calls back after each step."""
    row = scan.scan_shape[-1] if len(scan.scan_shape) == 2 else 1
    frame_bytes = math.prod(scan.det_shape) * scan.dtype.itemsize
    size = row * pace.rows_per_step or max(1, BYTES_PER_CALL // frame_bytes)
    for start in range(0, scan.count, size):
        stop = min(scan.count, start + size)
        yield start, stop
        if pace.step is not None:
            pace.step(stop)
        if pace.pause_s and stop < scan.count:
            time.sleep(pace.pause_s)


def properties(scan: ExactScan) -> dict[str, Any]:
    """Nion Swift's description of the scan."""
    scanned = [{"offset": 0.0, "scale": NM_PER_STEP, "units": "nm"} for _ in scan.scan_shape]
    detected = [{"offset": -float(n // 2), "scale": 1.0, "units": "mrad"} for n in scan.det_shape]
    return {
        "data_shape": [*scan.scan_shape, *scan.det_shape],
        "data_dtype": scan.dtype.name,
        "is_sequence": False,
        "collection_dimension_count": len(scan.scan_shape),
        "datum_dimension_count": 2,
        "intensity_calibration": {"offset": 0.0, "scale": 1.0, "units": "counts"},
        "dimensional_calibrations": scanned + detected,
        "metadata": {"instrument": {"high_tension": 100000.0}},
        "version": 1,
    }
