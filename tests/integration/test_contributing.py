"""What CONTRIBUTING.md tells a newcomer to write does work, on one rank and on two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow import registry
from mpi_kernels import jsonfile
from mpi_kernels.contract import JOB_FILE, RESULT_H5, JobSpec, Recipe, ReductionSpec, SourceSpec

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
IMPORTS = """
from collections.abc import Mapping
from dataclasses import dataclass
import numpy as np
from mpi_kernels.contract import Header
from mpi_kernels.protocols import Block, Output, Reduction
"""


@pytest.mark.needs_mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_reduction_of_the_page_computes(tmp_path: Path, mpiexec: str, ranks: int) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "newcomer.py").write_text(IMPORTS + example)
    rng = np.random.default_rng(1)
    frames = rng.poisson(0.5, (5, 7, 6, 9)).astype(np.uint16)
    np.save(tmp_path / "scan.npy", frames)
    acquisition = "0123456789abcdef"
    folder = tmp_path / "runs" / "2024-05-01" / acquisition / "01"
    folder.mkdir(parents=True)
    spec = JobSpec(
        job=f"{acquisition}-01",
        acquisition=acquisition,
        trace=acquisition,
        recipe=Recipe(name="newcomer", reductions=(ReductionSpec(use="newcomer:Coverage", name="coverage"),)),
        source=SourceSpec(path=str(tmp_path / "scan.npy"), format=registry.target("formats", "npy")),
        ranks=ranks,
    )
    jsonfile.publish(folder / JOB_FILE, jsonfile.encode(spec))
    start = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py"] if ranks > 1 else [sys.executable]
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    done = subprocess.run(
        [*start, "-m", "mpi_kernels", str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with h5py.File(folder / RESULT_H5) as result:
        np.testing.assert_array_equal(result["/coverage/pixels/data"][()], np.count_nonzero(frames, axis=(2, 3)))
