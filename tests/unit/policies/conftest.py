"""Synthetic segment images, made without the simulator, and results in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emflow.agent.protocol import Decision, Step
from mpi_kernels.contract import Axis

CONTROLS = ("C10_nm", "C12a_nm", "C12b_nm")


@functools.cache
def specimen(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A periodic random texture of unit variance, as its Fourier transform (n, n), and the frequencies (n,) in 1/nm.

    Grains of 1 nm (standard deviation), a period of 128 nm; frequencies at which they have nothing are left out.
    """
    side, pixel_nm, grain_nm = 256, 0.5, 1.0
    k = np.fft.fftfreq(side, pixel_nm)
    passed = np.exp(-2 * (np.pi * grain_nm) ** 2 * (k[:, None] ** 2 + k[None, :] ** 2))
    spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=(side, side))) * passed / side**2
    spectrum[0, 0] = 0
    spectrum /= np.sqrt((np.abs(spectrum) ** 2).sum())
    low = np.abs(k) < 0.5
    return spectrum[np.ix_(low, low)], k[low]


@functools.cache
def scan(
    c10: float,
    c12a: float = 0.0,
    c12b: float = 0.0,
    *,
    seed: int = 1,
    shape: tuple[int, int] = (48, 48),
    step_nm: float = 1.5,
    across: int = 8,
    reach_mrad: float = 32.0,
    disc_mrad: float = 25.0,
    counts: float | None = 2000.0,
    contrast: float = 0.15,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (ny, nx, k), angles (k, 2) in mrad and pixels (k,) of a specimen under aberrations, 2 x 2 rays a segment.

    The image at angle a is the specimen at ``r + g(a)``; ``counts`` is the dose per position, None for no noise.
    """
    spectrum, k = specimen(seed)
    position = [np.exp(2j * np.pi * np.outer(np.arange(n) * step_nm, k)) for n in shape]
    rays = ((np.arange(2 * across) + 0.5) / across - 1) * reach_mrad
    bright = [(i, j) for i in range(2 * across) for j in range(2 * across) if np.hypot(rays[i], rays[j]) <= disc_mrad]
    images, angles, seen = np.zeros((across**2, *shape)), np.zeros((across**2, 2)), np.zeros(across**2)
    for i, j in bright:
        y, x = rays[i] * 1e-3, rays[j] * 1e-3
        gy, gx = c10 * y - c12a * y + c12b * x, c10 * x + c12a * x + c12b * y
        rows, columns = position[0] * np.exp(2j * np.pi * k * gy), position[1] * np.exp(2j * np.pi * k * gx)
        segment = (i // 2) * across + j // 2
        images[segment] += 1 + contrast * (rows @ spectrum @ columns.T).real
        angles[segment] += (rays[i], rays[j])
        seen[segment] += 1
    images = np.clip(images, 0, None) / len(bright)
    if counts is not None:
        images = np.random.default_rng(seed + 1000).poisson(images * counts).astype(np.uint64)
    found = np.moveaxis(images, 0, -1), angles / np.maximum(seen, 1)[:, None], np.full(across**2, 4)
    for array in found:
        array.flags.writeable = False  # shared by all who ask for the same scan
    return found


@dataclass
class Made:
    """A result in memory."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CONTROLS, 0.0))
    step_nm: float | tuple[float, float] = 1.5
    scan_unit: str = "nm"
    quality: str = "OK"
    coverage: float = 1.0
    job: str = "0123456789abcdef-01"

    def array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise KeyError(f"no map {name!r} in this result")
        return self.arrays[name]

    def axes(self, name: str) -> tuple[Axis, ...]:
        steps = self.step_nm if isinstance(self.step_nm, tuple) else (self.step_nm, self.step_nm)
        named = zip(("scan_y", "scan_x"), steps, strict=True)
        scan = (Axis(name=n, scale=step, unit=self.scan_unit) for n, step in named)
        return (*scan, Axis(name="segment", unit=""))


def result(
    images: np.ndarray,
    angles: np.ndarray,
    pixels: np.ndarray,
    settings: Mapping[str, float] | None = None,
    **facts: Any,
) -> Made:
    arrays = {"segments/images": images, "segments/angles": angles, "segments/pixels": pixels}
    scalars = {"segments": {"segments": len(pixels), "angle_unit": "mrad"}}
    return Made(arrays, scalars, **({"settings": dict(settings)} if settings else {}), **facts)


def step(number: int, decision: Decision, settings: Mapping[str, float] | None = None) -> Step:
    return Step(number=number, decision=decision, settings=dict(settings or {}), receipts=())


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """What the tests of the policies share."""
    return SimpleNamespace(scan=scan, result=result, step=step, Made=Made, at_zero=dict.fromkeys(CONTROLS, 0.0))
