"""Counted data under real mpiexec: the terms from events equal those of the dense frames, to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_stempy

pytestmark = pytest.mark.needs_mpi
SCAN = ExactScan((3, 5), (6, 8), "uint8", seed=2, empty_every=4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_its_share_of_events(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, ranks: int) -> None:
    path = write_stempy(SCAN, tmp_path / "counted.h5")
    done = kernels.launch(mpiexec, ranks, kernels.here / "mpi" / "sparse_terms.py", path, tmp_path / "found.npz")
    assert done.returncode == 0, done.stderr
    frames = SCAN.frames(0, 15).astype(np.int64)
    y, x = np.indices((6, 8))
    squares = (frames * frames).sum(axis=0)
    wanted = {
        "Sum": frames.sum(axis=0),
        "SumSq": np.stack([squares >> 32, squares & 0xFFFFFFFF]),
        "Max": frames.max(axis=0),
        "Moments": np.stack([(frames * w).sum(axis=(1, 2)) for w in (1, y, x)], axis=1),
        "Masks": np.stack([(frames * w).sum(axis=(1, 2)) for w in (y > x, y * 3 - x)], axis=1),
        "Labels": np.stack([(frames * ((y + x) % 4 - 1 == i)).sum(axis=(1, 2)) for i in range(3)], axis=1),
    }
    with np.load(tmp_path / "found.npz") as found:
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            assert found[name].dtype.kind in "iu"
            np.testing.assert_array_equal(found[name], array, err_msg=name)
