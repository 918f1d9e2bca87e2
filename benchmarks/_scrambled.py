"""A microscope some of whose scans tell nonsense that looks well, for the benchmark of the loop."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emflow.microscope.protocol import SCAN_NAME, Acquire, Acquired
from emflow.microscope.simulated.backend import SimulatedMicroscope

BLOCK_PX = 8
"""Side of the parts of the detector whose images are moved; that of the segments of the policy's recipe."""


class Scrambled(SimulatedMicroscope):
    """A simulated microscope that scrambles a share of its 4D scans before they are noted as whole.

    The image of each block of detector pixels is moved by a random vector, periodically: every image is as good as
    before, counts and pattern stay, and the shifts between images say nothing.

    Parameters
    ----------
    folder, state, parameters
        As for `SimulatedMicroscope`; one more parameter, ``scrambled_share``, 0 to 1.  Which scans are hit depends on
        the seed and the number of the decision only, so that two experiments can be compared.
    """

    def __init__(self, folder: Path, state: Path, parameters: Mapping[str, Any]) -> None:
        own = dict(parameters)
        self._share = float(own.pop("scrambled_share"))
        self._scans, self._seed = folder, int(own["seed"])
        super().__init__(folder, state, own)

    def acquire(self, action: Acquire, name: str, trace: str, abort: threading.Event) -> Acquired:
        """Acquire as ever, then perhaps scramble the file."""
        acquired = super().acquire(action, name, trace, abort)
        found = SCAN_NAME.fullmatch(name)
        decision = int(found["command"].split("-")[1]) if found else 0
        random = np.random.default_rng([self._seed, decision, 9])
        if acquired.kind == "4d" and random.random() < self._share:
            scramble(self._scans / acquired.path, random)
        return acquired


def scramble(path: Path, random: np.random.Generator) -> None:
    """Move the image of each block of a ``.npy`` of shape (scan_y, scan_x, det_y, det_x), in place."""
    data = np.load(path, mmap_mode="r+", allow_pickle=False)
    for y in range(0, data.shape[2], BLOCK_PX):
        for x in range(0, data.shape[3], BLOCK_PX):
            block = data[:, :, y : y + BLOCK_PX, x : x + BLOCK_PX]
            block[...] = np.roll(block, random.integers(0, data.shape[:2]), axis=(0, 1))
    data.flush()
