"""A microscope whose scans tell nothing: every frame is right, and none is where it was taken."""

from __future__ import annotations

import threading
import zlib

import numpy as np

from emflow.microscope.protocol import Acquire, Acquired
from emflow.microscope.simulated.backend import SimulatedMicroscope


class Scrambled(SimulatedMicroscope):
    """A simulated microscope that shuffles the positions of each scan before it is noted as whole."""

    def acquire(self, action: Acquire, name: str, trace: str, abort: threading.Event) -> Acquired:
        """Acquire as ever, then shuffle."""
        made = super().acquire(action, name, trace, abort)
        data = np.load(self._folder / made.path, mmap_mode="r+")
        frames = data.reshape(-1, *data.shape[2:])
        frames[:] = frames[np.random.default_rng(zlib.crc32(name.encode())).permutation(len(frames))]
        data.flush()
        return made
