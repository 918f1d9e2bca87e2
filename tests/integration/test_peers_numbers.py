"""The numbers of LiberTEM, py4DSTEM and pyxem on the same scan, with their conventions translated into ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emflow.direct import reduce_file
from mpi_kernels.contract import Recipe, ReductionSpec
from mpi_kernels.exact import ExactScan

pytestmark = pytest.mark.needs_peers
R = "mpi_kernels.reductions"
PIXELS = 1e-4
"""Agreement of centres of mass, px; two of the three compute in float32."""

LIBERTEM = """
import sys
import numpy as np
from libertem.api import Context
from libertem.udf.com import CoMUDF
from libertem.udf.masks import ApplyMasksUDF
from libertem.udf.sum import SumUDF
path, masks, out = sys.argv[1], np.load(sys.argv[2]).astype(np.float64), sys.argv[3]
with Context.make_with("inline") as context:
    udfs = [
        SumUDF(dtype="float64"),  # its default, float32, is not exact beyond 2**24
        ApplyMasksUDF(mask_factories=lambda: masks, mask_count=len(masks), mask_dtype=np.float64),
        CoMUDF(),
    ]
    total, images, com = context.run_udf(dataset=context.load("npy", path=path), udf=udfs)
np.savez(out, sum=total["intensity"].data, images=images["intensity"].data, com=com["raw_com"].data)
"""
PY4DSTEM = """
import sys
import numpy as np
import py4DSTEM
data, masks, out = np.load(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
cube = py4DSTEM.DataCube(data=data)
total = cube.get_dp_mean(returncalc=True).data * np.prod(data.shape[:2])
images = [
    cube.get_virtual_image(mode="mask", geometry=m.astype(np.float64), name=f"m{i}", returncalc=True).data
    for i, m in enumerate(masks)
]
dpc = py4DSTEM.process.phase.DPC(datacube=cube, verbose=False)
dpc.preprocess(force_com_rotation=0, force_com_transpose=False, plot_center_of_mass=False, plot_rotation=False)
com = np.stack([dpc._com_measured_x, dpc._com_measured_y], -1)  # its x counts rows
np.savez(out, sum=total, images=np.stack(images, -1), com=com)
"""
PYXEM = """
import sys
import numpy as np
import pyxem
data, out = np.load(sys.argv[1]), sys.argv[3]
signal = pyxem.signals.ElectronDiffraction2D(data.copy())
found = np.asarray(signal.get_direct_beam_position(method="center_of_mass").data)
# (x, y), from the middle of the frame, n / 2, and with the sign turned round
com = np.stack([data.shape[2] / 2 - found[..., 1], data.shape[3] / 2 - found[..., 0]], -1)
np.savez(out, sum=np.asarray(signal.sum(axis=(0, 1)).data), com=com)
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The scan, two masks that fit no program's geometry, and what emflow makes of them."""
    import h5py

    folder = tmp_path_factory.mktemp("numbers")
    scan = ExactScan((6, 7), (26, 32), "uint16", seed=4)
    np.save(folder / "scan.npy", scan.frames(0, scan.count).reshape(6, 7, 26, 32))
    masks = np.random.default_rng(5).random((2, 26, 32)) < 0.4
    np.save(folder / "masks.npy", masks)
    images = []
    for i, mask in enumerate(masks):
        np.save(folder / f"mask-{i}.npy", mask)
        parameters = {"shape": "mask", "file": str(folder / f"mask-{i}.npy")}
        images.append(ReductionSpec(use=f"{R}.virtual_image:VirtualImage", name=f"image{i}", parameters=parameters))
    recipe = Recipe(
        name="numbers",
        reductions=(
            ReductionSpec(use=f"{R}.pattern:Pattern", name="pattern"),
            ReductionSpec(use=f"{R}.centre_of_mass:CentreOfMass", name="com"),
            *images,
        ),
    )
    reduce_file(folder / "scan.npy", recipe, folder / "ours.h5")
    with h5py.File(folder / "ours.h5") as file:
        return {
            "folder": np.array(str(folder)),
            "sum": file["/pattern/sum/data"][()],
            "images": np.stack([file[f"/image{i}/image/data"][()] for i in range(2)], -1),
            "com": np.stack([file[f"/com/{axis}/data"][()] for axis in "yx"], -1),
        }


@pytest.mark.timeout(120)
@pytest.mark.parametrize("script", [LIBERTEM, PY4DSTEM, PYXEM], ids=["libertem", "py4dstem", "pyxem"])
def test_others_find_the_same(ours: dict[str, np.ndarray], tmp_path: Path, script: str) -> None:
    folder = Path(str(ours["folder"]))
    environment = os.environ | {"HOME": str(tmp_path), "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore"}
    command = [os.environ["EMFLOW_PEERS_PYTHON"], "-c", script, str(folder / "scan.npy"), str(folder / "masks.npy")]
    done = subprocess.run(
        [*command, str(tmp_path / "theirs.npz")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "theirs.npz")
    np.testing.assert_array_equal(np.round(theirs["sum"], 6), ours["sum"])
    if "images" in theirs:
        np.testing.assert_array_equal(theirs["images"], ours["images"])
    np.testing.assert_allclose(theirs["com"], ours["com"], rtol=0, atol=PIXELS)
