"""Phases of scans whose rotation is known: one that Prismatic simulated, one that Nion Swift's simulator wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emflow import registry
from mpi_kernels import engine, plan
from mpi_kernels.contract import Recipe, ReductionSpec
from mpi_kernels.plugins import make_format
from mpi_kernels.ranks import Ranks

pytestmark = pytest.mark.needs_data


def reduced(path: Path) -> engine.Reduced:
    source = make_format(registry.target("formats", "hdf5")).open(str(path))
    names = ("integrated_centre_of_mass", "differential_phase")
    specs = tuple(ReductionSpec(use=registry.target("reductions", n), name=n) for n in names)
    try:
        found = engine.reduce(plan.make(Recipe(name="r", reductions=specs), source.header), source, Ranks())
    finally:
        source.close()
    assert found is not None
    return found


def test_silicon_has_no_rotation_and_its_columns_attract(real_data: Path) -> None:
    found = reduced(real_data / "emd_prismatic" / "Si100_4D.emd")
    scalars, phase = found.scalars["integrated_centre_of_mass"], found.arrays["integrated_centre_of_mass"]["phase"]
    assert abs(scalars["rotation_estimate_deg"]) < 0.01
    assert scalars["rotation_quality"] > 0.95
    assert scalars["rotation_quality_transposed"] < 0.2
    assert scalars["uncalibrated"] == ""
    np.testing.assert_allclose(phase, phase.T, atol=1e-3)  # the projection along [100] has this mirror
    assert phase.max() > -2 * phase.min() > 0  # few sharp columns on a flat ground: where electrons go is positive
    segments = found.arrays["differential_phase"]["phase"]
    assert np.corrcoef(phase.ravel(), segments.ravel())[0, 1] > 0.98


def test_a_simulated_microscope_without_scan_rotation(real_data: Path) -> None:
    found = reduced(real_data / "nion_swift" / "swift_cts_32x32x64x64.h5")
    scalars = found.scalars["integrated_centre_of_mass"]
    assert abs(scalars["rotation_estimate_deg"]) < 3
    assert scalars["rotation_quality"] > 0.9 > scalars["rotation_quality_transposed"]
    assert scalars["uncalibrated"] == ""
    phases = [found.arrays[n]["phase"].ravel() for n in ("integrated_centre_of_mass", "differential_phase")]
    assert np.corrcoef(*phases)[0, 1] > 0.95
