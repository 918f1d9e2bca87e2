"""Run folders, and the kernels as the processes that a scheduler starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_kernels import jsonfile
from mpi_kernels.contract import JobSpec, Recipe, ReductionSpec, SourceSpec

HERE = Path(__file__).parent
R = "mpi_kernels.reductions"
STANDARD = (
    ReductionSpec(use=f"{R}.virtual_image:VirtualImage", name="bf"),
    ReductionSpec(use=f"{R}.virtual_image:VirtualImage", name="adf", parameters={"shape": "annulus"}),
    ReductionSpec(use=f"{R}.pattern:Pattern", name="pattern"),
    ReductionSpec(use=f"{R}.centre_of_mass:CentreOfMass", name="com"),
    ReductionSpec(use=f"{R}.radial_profile:RadialProfile", name="radial", parameters={"scan": True}),
    ReductionSpec(use=f"{R}.image:Image", name="picture"),
)


def folder(
    path: Path,
    source: Path,
    form: str,
    *,
    ranks: int = 1,
    reductions: Sequence[ReductionSpec] = STANDARD,
    scan_shape: tuple[int, ...] | None = None,
    **facts: Any,
) -> Path:
    """A run folder with its job.json."""
    path.mkdir(parents=True)
    job = JobSpec(
        job="0123456789abcdef-01",
        acquisition="0123456789abcdef",
        trace="feedbeef",
        recipe=Recipe(name="standard", reductions=tuple(reductions), scan_shape=scan_shape),
        source=SourceSpec(path=str(source), format=form, digest="0" * 32),
        ranks=ranks,
        **facts,
    )
    jsonfile.publish(path / "job.json", jsonfile.encode(job))
    return path


def environment(**more: str) -> dict[str, str]:
    """Without marks of another launcher, and with the tests' own plug-ins."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "SLURM_", "EMFLOW_RANKS"))}
    return kept | {"PYTHONPATH": str(HERE / "mpi"), "OMP_NUM_THREADS": "1"} | more


def launch(mpiexec: str | None, ranks: int, *arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """``python ...`` alone, or under ``mpiexec -n ranks``."""
    prefix = [mpiexec, "-n", str(ranks)] if mpiexec else []
    command = [*prefix, sys.executable, *map(str, arguments)]
    env = environment(**kwargs.pop("env", {}))
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=env, check=False, **kwargs)


@pytest.fixture(scope="session")
def kernels() -> SimpleNamespace:
    """What the integration tests of the kernels share."""
    return SimpleNamespace(folder=folder, launch=launch, environment=environment, standard=STANDARD, here=HERE)
