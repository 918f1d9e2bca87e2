"""Real mpiexec: one, two and three ranks give what one process without MPI gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

pytestmark = pytest.mark.needs_mpi
NPY = "mpi_kernels.formats.npy:Npy"


def maps(folder: Path) -> dict[str, np.ndarray]:
    manifest = json.loads((folder / "result.json").read_text())
    with h5py.File(folder / "result.h5") as file:
        return {name: file[name]["data"][()] for name in manifest["outputs"]}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_one_two_and_three_ranks_equal_no_mpi(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, dtype: str
) -> None:
    data = np.random.default_rng(7).poisson(3, (5, 7, 20, 24)).astype(dtype)
    data[2, 3] = 0
    if dtype.startswith("float"):
        data[4, 4, 1, 1], data[0, 0, 2, 2] = np.nan, np.inf
    np.save(tmp_path / "scan.npy", data)
    alone = kernels.folder(tmp_path / "alone", tmp_path / "scan.npy", NPY)
    assert kernels.launch(None, 1, "-m", "mpi_kernels", alone).returncode == 0
    want = maps(alone)
    assert len(want) == 12
    for ranks in (1, 2, 3):
        block = data[0, 0].nbytes * (1, 3, 11)[ranks - 1]
        folder = kernels.folder(tmp_path / str(ranks), tmp_path / "scan.npy", NPY, ranks=ranks, block_bytes=block)
        done = kernels.launch(mpiexec, ranks, "-m", "mpi4py", "-m", "mpi_kernels", folder)
        assert done.returncode == 0, done.stderr
        for name, array in maps(folder).items():
            assert array.dtype == want[name].dtype
            if array.dtype.kind in "iu":
                np.testing.assert_array_equal(array, want[name], err_msg=name)
            else:
                finite = want[name][np.isfinite(want[name])]
                bound = 16 * data.size * 2.0**-52 / min(data.shape[:1])
                np.testing.assert_allclose(
                    array, want[name], rtol=bound, atol=bound * np.abs(finite).max(initial=0), err_msg=name
                )
        assert json.loads((folder / "result.json").read_text())["ranks"] == ranks


def test_more_ranks_than_frames(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    data = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4) - 7
    np.save(tmp_path / "stack.npy", data)
    folder = kernels.folder(tmp_path / "run", tmp_path / "stack.npy", NPY, ranks=3)
    done = kernels.launch(mpiexec, 3, "-m", "mpi_kernels", folder)
    assert done.returncode == 0, done.stderr
    found = maps(folder)
    np.testing.assert_array_equal(found["/pattern/max"], data.max(axis=0))
    np.testing.assert_array_equal(found["/pattern/sum"], data.sum(axis=0))
    np.testing.assert_array_equal(found["/com/total"], data.sum(axis=(1, 2)))


def test_an_image_with_three_ranks(kernels: SimpleNamespace, mpiexec: str, tmp_path: Path) -> None:
    data = np.random.default_rng(8).normal(size=(6, 9)).astype(np.float32)
    np.save(tmp_path / "image.npy", data)
    folder = kernels.folder(tmp_path / "run", tmp_path / "image.npy", NPY, ranks=3)
    done = kernels.launch(mpiexec, 3, "-m", "mpi_kernels", folder)
    assert done.returncode == 0, done.stderr
    assert list(maps(folder)) == ["/picture/image"]
    np.testing.assert_array_equal(maps(folder)["/picture/image"], data)


NODES = """
from mpi_kernels.ranks import world
ranks = world()
found = ranks.gather_json(ranks.on_node())
if found:
    print(found)
"""


@pytest.mark.needs_native
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_four_ranks_and_two_nodes_change_no_bit(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, dtype: str
) -> None:
    """Groups of 64 frames of this size, six in all: shares begin at their bounds, so that floats keep every bit too."""
    data = np.random.default_rng(9).normal(500, 40, (12, 30, 96, 98)).astype(dtype)
    np.save(tmp_path / "scan.npy", data)
    two_nodes = {"MPIR_CVAR_NUM_CLIQUES": "2"}  # MPICH: ranks in two groups that see no memory of each other
    told = kernels.launch(mpiexec, 4, "-c", NODES, env=two_nodes)
    assert json.loads(told.stdout) == [2, 2, 2, 2], told.stderr
    want: dict[str, np.ndarray] = {}
    for ranks, env in ((1, {}), (2, {}), (3, {}), (4, {}), (4, two_nodes)):
        name = f"{ranks}-{len(env)}"
        folder = kernels.folder(tmp_path / name, tmp_path / "scan.npy", NPY, ranks=ranks)
        done = kernels.launch(mpiexec, ranks, "-m", "mpi_kernels", folder, env=env)
        assert done.returncode == 0, done.stderr
        found = maps(folder)
        want = want or found
        for path, array in found.items():
            np.testing.assert_array_equal(array, want[path], err_msg=f"{path} with {name}", strict=True)
