"""Electron counting: which pixels each frame's electrons hit, kept as sparse events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.counting import Thresholds, events, thresholds
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Block, Events, Output, Reduction
from mpi_kernels.reductions import mask_file


@dataclass(frozen=True, slots=True, kw_only=True)
class CountElectrons(Reduction):
    """Electrons of each frame: outputs ``electrons`` and ``pattern``, and the events themselves.

    Parameters
    ----------
    dark : str, optional
        A ``.npy`` of shape (det_y, det_x), the mean dark frame, subtracted first; NaN masks a pixel.  A path on the
        compute node.
    background, x_ray : float, optional
        Thresholds in the data's unit, dark subtracted; what is left out comes from sample frames.
    background_sigma, x_ray_sigma : float
        How many sigma above the noise (the whole sample) that threshold lies.
    sample : int
        Frames of the sample, the first ones of the scan.

    Notes
    -----
    A hit is above ``background``, below ``x_ray``, and the largest of the 3 x 3 pixels around it
    (`mpi_kernels.counting`).  The events are stored as stempy and py4DSTEM read them (`mpi_kernels.electrons`).
    Source: Ercius et al. 2024, doi:10.1093/mam/ozae086.
    """

    sparse: ClassVar[bool] = True
    dark: str | None = None
    background: float | None = None
    x_ray: float | None = None
    background_sigma: float = 4.0
    x_ray_sigma: float = 10.0
    sample: int = 20

    def __post_init__(self) -> None:
        given = [v for v in (self.background, self.x_ray, self.background_sigma, self.x_ray_sigma) if v is not None]
        if not all(math.isfinite(v) for v in given):
            raise RecipeError("a threshold is no number")
        if self.background is not None and self.x_ray is not None and self.x_ray <= self.background:
            raise RecipeError(f"no electron is above {self.background} and below {self.x_ray}")
        if not 1 <= self.sample <= 1000:
            raise RecipeError(f"sample = {self.sample}: 1 to 1000 frames")

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Counts over the scan and over the frame."""
        self._dark(header)  # a wrong file is told before any frame is read
        if math.prod(header.det_shape) > 1 << 32:
            raise RecipeError(f"a frame of {header.det_shape} has more pixels than an event can number")
        return {
            "electrons": Output(over="scan", dtype="int64", unit="electrons", long_name="electrons of each frame"),
            "pattern": Output(
                over="frame",
                shape=header.det_shape,
                dtype="int64",
                unit="electrons",
                long_name="electrons of each pixel",
            ),
        }

    def samples(self, header: Header) -> int:  # noqa: ARG002
        """None if both thresholds are given."""
        return self.sample if self.background is None or self.x_ray is None else 0

    def settled(self, frames: np.ndarray, header: Header) -> Reduction:
        """With the thresholds of the sample."""
        dark = self._dark(header)
        found = thresholds(frames, dark, background_sigma=self.background_sigma, x_ray_sigma=self.x_ray_sigma)
        given = {n: getattr(self, n) for n in ("background", "x_ray") if getattr(self, n) is not None}
        parameters = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _Settled(**parameters, found=dataclasses.replace(found, **given))

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> Events:
        """Count a block."""
        used = self._thresholds()
        counts, pixels = events(block.frames, used.background, used.x_ray, self._dark(block.header))
        out["electrons"][...] = counts
        pattern = out["pattern"].reshape(-1)
        pattern += np.bincount(pixels, minlength=pattern.size)
        return Events(block.start, counts, pixels)

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """The counts as they are, and the thresholds."""
        used, total = self._thresholds(), int(arrays["electrons"].sum())
        scalars: dict[str, Scalar] = {
            "electrons": total,
            "electrons_per_pixel": total / header.frames / math.prod(header.det_shape),
            "background": used.background,
            "x_ray": used.x_ray,
            "noise_mean": used.noise_mean,
            "noise_sigma": used.noise_sigma,
            "thresholds": used.method,
        }
        if self.dark is not None:
            scalars["dark_sha256"] = mask_file.read(self.dark).sha256
        return arrays, scalars

    def _thresholds(self) -> Thresholds:
        assert self.background is not None  # the engine settles what is not
        assert self.x_ray is not None
        return Thresholds(background=self.background, x_ray=self.x_ray)

    def _dark(self, header: Header) -> np.ndarray | None:
        if self.dark is None:
            return None
        dark = mask_file.read(self.dark).fitting(header.det_shape, "the frames")
        if np.isinf(dark).any():
            raise RecipeError("the dark frame holds infinities", path=self.dark, next_step="NaN masks a pixel")
        return dark


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled(CountElectrons):
    """With thresholds from a sample."""

    found: Thresholds

    def _thresholds(self) -> Thresholds:
        return self.found
