"""A format whose source fails at a given frame of a given rank; found by the kernels through PYTHONPATH.

Its file is JSON: ``{"frames", "at", "how"}``; ``how`` is raise, bug, kill, exit, sys.exit,
hang or slow (which only takes its time).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import MissingData
from mpi_kernels.protocols import Source


class FaultySource:
    align, layout = 1, None

    def __init__(self, path: str) -> None:
        self._path, self._fault = path, json.loads(Path(path).read_text())
        self.header = Header(
            format="faulty",
            kind="stack",
            scan_shape=(self._fault["frames"],),
            det_shape=(4, 4),
            dtype="uint16",
            members=(),
            rule="exact",
        )

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        out[...] = np.arange(start, stop)[:, None, None]
        how = self._fault["how"]
        if how == "slow":
            time.sleep(0.05)
        elif start <= self._fault["at"] < stop:
            if how == "raise":
                raise MissingData("the file ends early", path=self._path, frame=self._fault["at"])
            if how == "bug":
                raise ZeroDivisionError("a mistake\nin a plug-in")
            if how == "sys.exit":
                sys.exit(0)
            if how == "hang":
                Path(f"{self._path}.hangs").touch()
                time.sleep(3600.0)
            if how == "exit":
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    def complete(self) -> None: ...

    def close(self) -> None: ...


class Faulty:
    suffixes: ClassVar[tuple[str, ...]] = (".faulty",)

    def probe(self, path: str) -> Header:
        return FaultySource(path).header

    def open(self, path: str) -> Source:
        return FaultySource(path)
