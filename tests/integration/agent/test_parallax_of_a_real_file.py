"""The estimate on a scan that Nion Swift wrote, whose aberrations are known and were not asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from emflow import registry
from emflow.agent.policies import parallax
from emflow.recipes import load_recipe
from mpi_kernels import engine, plan
from mpi_kernels.formats.choose import choose
from mpi_kernels.ranks import Ranks

pytestmark = pytest.mark.needs_data


def test_swift_scan(real_data: Path) -> None:
    folder = real_data / "nion_swift"
    truth = json.loads((folder / "cts_32x32x64x64.truth.json").read_text(encoding="utf-8"))
    wanted = np.array([truth["C10_m"], truth["C12_a_m"], truth["C12_b_m"]]) * 1e9
    path = folder / "swift_cts_32x32x64x64.h5"
    formats = {n: registry.load("formats", n)() for n in registry.names("formats")}
    chosen, header = choose(str(path), formats)
    source = formats[chosen].open(str(path))
    made = plan.make(load_recipe("aberrations", relative_to=folder), header)
    reduced = engine.reduce(made, source, Ranks())
    source.close()
    assert reduced is not None
    assert reduced.scalars["segments"]["angle_unit"] == "mrad"
    arrays = reduced.arrays["segments"]
    bright = parallax.bright(arrays["images"], arrays["pixels"])
    found = parallax.estimate(arrays["images"][..., bright], arrays["angles"][bright], (1.0, 1.0))
    assert bright.all()
    assert abs(found.coefficients_nm[0] - wanted[0]) <= 0.05 * abs(wanted[0])
    assert np.hypot(*(found.coefficients_nm - wanted)[1:]) <= 0.15 * np.hypot(*wanted[1:])
    assert found.correlation > 0.9
    assert found.inliers > 0.8
    assert found.smoothness > 0.5
