"""Simulated microscopes in folders of their own, and what they wrote."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emflow import registry
from emflow.microscope.protocol import Acquire, Acquired
from emflow.microscope.simulated.backend import SimulatedMicroscope
from mpi_kernels.contract import Header
from mpi_kernels.formats.choose import choose

CALM: dict[str, Any] = {"clock": "scan", "drift_nm_per_s": [0.0, 0.0], "noise": False, "dtype": "float32"}
"""Nothing moves, nothing is random, nothing is rounded."""


class Lab:
    """A microscope with its share and private folder."""

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        self.share, self.state = folder / "share", folder / "state"
        self.share.mkdir(parents=True, exist_ok=True)
        self.microscope = SimulatedMicroscope(self.share, self.state, parameters)
        self.made = 0

    def acquire(self, action: Acquire, name: str | None = None, abort: threading.Event | None = None) -> Acquired:
        self.made += 1
        return self.microscope.acquire(action, name or f"a{self.made}", "trace", abort or threading.Event())

    def header(self, acquired: Acquired) -> Header:
        return self.probe(acquired.path)

    def probe(self, path: str) -> Header:
        """What emflow's formats say of a file of the share."""
        formats = {n: registry.load("formats", n)() for n in registry.names("formats")}
        return choose(str(self.share / path), formats)[1]

    def data(self, acquired: Acquired) -> np.ndarray:
        """The array as emflow's own format reads it."""
        header = self.header(acquired)
        out = np.empty((max(1, acquired.frames), *header.det_shape), header.dtype)
        source = registry.load("formats", header.format)().open(str(self.share / acquired.path))
        with contextlib.closing(source):
            source.complete()
            source.frames(0, len(out), out)
        return out.reshape(*acquired.scan_shape, *acquired.det_shape)

    def files(self) -> list[str]:
        return sorted(p.name for p in self.share.iterdir())


@pytest.fixture
def lab(tmp_path: Path) -> Callable[..., Lab]:
    """``lab(**parameters)``; the same folder each time unless ``folder`` is named."""

    def make(folder: str = "lab", **parameters: Any) -> Lab:
        return Lab(tmp_path / folder, parameters)

    return make


@pytest.fixture
def calm(lab: Callable[..., Lab]) -> Callable[..., Lab]:
    """``lab`` with `CALM` unless told otherwise."""
    return lambda folder="lab", **parameters: lab(folder, **{**CALM, **parameters})
