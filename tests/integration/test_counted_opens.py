"""Counted electrons open in stempy, py4DSTEM and HyperSpy, and are the same on one rank and on three."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from mpi_kernels import job
from mpi_kernels.contract import ReductionSpec
from mpi_kernels.ranks import Ranks

COUNT = ReductionSpec(
    use="mpi_kernels.reductions.count_electrons:CountElectrons",
    name="counted",
    parameters={"background": 30.0, "x_ray": 1000.0},
)
SUM = ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern", parameters={"variance": False})
STEMPY = """
import json, sys
from stempy.io.sparse_array import SparseArray
found = SparseArray.from_hdf5(sys.argv[1])
sums = found.sum(axis=(0, 1)), found.sum(axis=(2, 3))
print(json.dumps({"shape": [int(n) for n in found.shape], "pattern": sums[0].tolist(), "image": sums[1].tolist()}))
"""
PY4DSTEM = """
import json, sys, os
sys.stdout, stdout = open(os.devnull, "w"), sys.stdout
import numpy as np, py4DSTEM
root = py4DSTEM.read(sys.argv[1])
lists, pattern = root.tree("counted/events"), root.tree("counted/pattern").data
image, again = np.zeros(lists.shape, int), np.zeros(pattern.shape, int)
for at in np.ndindex(lists.shape):
    points = lists.get_pointlist(*at).data
    image[at] = len(points)
    np.add.at(again, (points["qx"], points["qy"]), 1)
print(json.dumps({"image": image.tolist(), "pattern": again.tolist()}), file=stdout)
"""
HYPERSPY = """
import json, sys, warnings
warnings.simplefilter("ignore")
import hyperspy.api as hs
how = {"EMD": {}, "Nexus": {"nxdata_only": True, "hardlinks_only": True}}
found = {f: hs.load(sys.argv[1], file_format=f, **more) for f, more in how.items()}
print(json.dumps({f: sorted(s.metadata.General.title for s in signals) for f, signals in found.items()}))
"""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames that are not square, an electron here and there, and a position without any."""
    rng = np.random.default_rng(2)
    data = rng.poisson(5, (5, 7, 12, 9)) + 100 * (rng.random((5, 7, 12, 9)) < 0.02)
    data[2, 3] = 5
    path = tmp_path_factory.mktemp("counted") / "scan.npy"
    np.save(path, data.astype(np.uint16))
    return path


def result(kernels: SimpleNamespace, base: Path, scan: Path, mpiexec: str = "", ranks: int = 1) -> Path:
    folder = kernels.folder(
        base / f"run{ranks}", scan, "mpi_kernels.formats.npy:Npy", reductions=[COUNT, SUM], ranks=ranks
    )
    if ranks == 1:
        assert job.run(folder, Ranks()) is not None
    else:
        done = kernels.launch(mpiexec, ranks, "-m", "mpi4py", "-m", "mpi_kernels", folder)
        assert done.returncode == 0, done.stderr
    return folder / "result.h5"


def truth(file: Path) -> dict[str, list]:
    """From the dense maps of the same result."""
    with h5py.File(file) as opened:
        return {
            n: opened[f"counted/{o}/data"][()].tolist() for n, o in (("image", "electrons"), ("pattern", "pattern"))
        }


def peer(script: str, file: Path) -> dict[str, list]:
    python = os.environ["EMFLOW_PEERS_PYTHON"]
    done = subprocess.run(
        [python, "-", str(file)], input=script, capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.needs_peers
def test_stempy(kernels: SimpleNamespace, scan: Path, tmp_path: Path) -> None:
    file = result(kernels, tmp_path, scan)
    assert peer(STEMPY, file) == {"shape": [5, 7, 12, 9], **truth(file)}


@pytest.mark.needs_peers
def test_py4dstem(kernels: SimpleNamespace, scan: Path, tmp_path: Path) -> None:
    file = result(kernels, tmp_path, scan)
    assert peer(PY4DSTEM, file) == truth(file)


@pytest.mark.needs_peers
def test_hyperspy_still_opens_the_maps(kernels: SimpleNamespace, scan: Path, tmp_path: Path) -> None:
    maps = sorted(["electrons", "pattern", "max", "mean", "sum"])
    assert peer(HYPERSPY, result(kernels, tmp_path, scan)) == {"EMD": maps, "Nexus": maps}


@pytest.mark.needs_mpi
def test_three_ranks_keep_the_same_events(kernels: SimpleNamespace, scan: Path, tmp_path: Path, mpiexec: str) -> None:
    with (
        h5py.File(result(kernels, tmp_path, scan)) as one,
        h5py.File(result(kernels, tmp_path, scan, mpiexec, 3)) as three,
    ):
        lists = [[f.tolist() for f in file["electron_events/frames"][()]] for file in (one, three)]
        assert lists[0] == lists[1]
        assert sum(map(len, lists[0])) > 50
        assert lists[0][2 * 7 + 3] == []
        for row, frame in enumerate(lists[0]):
            assert len(frame) == one["counted/electrons/data"][row // 7, row % 7]
        assert one["/"].attrs["version"] == 3
