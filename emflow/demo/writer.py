"""Stands for the detector's software, which writes scans slowly: ``python -m emflow.demo.writer FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from emflow.exact import ExactScan, Pace
from emflow.synthetic import write_empad, write_merlin, write_nion_h5, write_npy

SCANS: tuple[tuple[str, str, tuple[int, int], tuple[int, int], Callable[..., Path]], ...] = (
    ("numpy_48x64.npy", "uint16", (48, 64), (128, 128), write_npy),
    ("merlin_32x32.mib", "uint16", (32, 32), (256, 256), write_merlin),
    ("swift_40x40.h5", "float32", (40, 40), (96, 96), write_nion_h5),
    ("scan_x48_y32.raw", "float32", (32, 48), (128, 128), write_empad),
)
"""Name, pixels, scan shape, frame shape and writer of each scan."""

ROW_PAUSE_S = 0.04
PARTICLES = 9


class Particles(ExactScan):
    """A made-up specimen: round particles that absorb, and bend the beam by the slope of their thickness."""

    def _thickness(self) -> np.ndarray:
        """Thickness at each scan position, (scan_y, scan_x), 0 to 1."""
        rows, columns = self.scan_shape
        random = np.random.default_rng(self.seed)
        y, x = np.indices((rows, columns), dtype=np.float64)
        thickness = np.zeros((rows, columns))
        for _ in range(PARTICLES):
            cy, cx = random.uniform(0, rows), random.uniform(0, columns)
            width = random.uniform(0.06, 0.14) * min(rows, columns)
            thickness += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))
        thickness /= thickness.max()
        return thickness

    def shifts(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Shift of each frame, (n, 2) int64 in ``1/steps`` pixel: the slope of the thickness, within the margin."""
        slope = np.stack(np.gradient(self._thickness()), axis=-1)
        reach = np.array(self.margin) * self.steps
        shifts: np.ndarray = np.rint(slope / np.abs(slope).max() * reach).astype(np.int64).reshape(-1, 2)
        return shifts[start:stop]

    def gains(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Brightness of each frame, (n,) int64: 4 in vacuum, 1 at the thickest."""
        gains: np.ndarray = (4 - np.rint(3 * self._thickness())).astype(np.int64).ravel()
        return gains[start:stop]


def main(folder: Path) -> None:
    """Write every scan of `SCANS`, row by row, one after the other."""
    for seed, (name, dtype, scan_shape, det_shape, write) in enumerate(SCANS):
        scan = Particles(scan_shape, det_shape, dtype, seed=seed)
        write(scan, folder / name, pace=Pace(rows_per_step=1, pause_s=ROW_PAUSE_S))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
