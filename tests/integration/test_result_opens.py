"""A result opens, calibrated, in HyperSpy, silx and py4DSTEM: the real packages in their own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_kernels import job
from mpi_kernels.ranks import Ranks

HYPERSPY = """
import json, sys, warnings
warnings.simplefilter("ignore")
import hyperspy.api as hs
NX = {"nxdata_only": True, "hardlinks_only": True}
def load(**how):
    found = hs.load(sys.argv[1], **how)
    return [[s.metadata.General.title, s.data.shape, str(s.data.dtype), type(s).__name__, float(s.data.sum()),
             [[a.name, a.scale, a.offset, str(a.units), a.navigate] for a in s.axes_manager._axes]] for s in found]
print(json.dumps({"EMD": load(file_format="EMD"), "Nexus": load(file_format="Nexus", **NX)}))
"""
SILX = """
import json, sys
import silx.io, silx.io.nxdata as nxdata
file = silx.io.open(sys.argv[1])
default = nxdata.get_default(file)
found = {}
def walk(group):
    for key in group:
        node = group[key]
        if node.attrs.get("NX_class") == "NXdata":
            data = nxdata.NXdata(node)
            found[node.name] = [data.is_valid, list(data.issues), list(data.signal.shape), data.interpretation,
                                data.axes_dataset_names, [float(a[1] - a[0]) for a in data.axes if len(a) > 1],
                                [a.attrs["units"] for a in data.axes], data.signal.attrs["units"]]
        elif hasattr(node, "keys"):
            walk(node)
walk(file["entry"])
print(json.dumps({"default": [default.title, list(default.signal.shape)], "all": found}))
"""
PY4DSTEM = """
import json, sys, os
sys.stdout, stdout = open(os.devnull, "w"), sys.stdout
import py4DSTEM
root = py4DSTEM.read(sys.argv[1])
def leaf(path):
    a = root.tree(path)
    return [list(a.data.shape), a.units, list(a.dim_names), list(a.dim_units),
            [float(d[1] - d[0]) for d in a.dims if len(d) > 1], [float(d[0]) for d in a.dims], float(a.data.sum())]
print(json.dumps({p: leaf(p) for p in sys.argv[2:]}), file=stdout)
"""


def peer(script: str, *arguments: str | Path) -> object:
    python = os.environ["EMFLOW_PEERS_PYTHON"]
    done = subprocess.run(
        [python, "-", *map(str, arguments)], input=script, capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=[(5, 7, 12, 16), (1, 4, 9, 6), (6, 8, 8)], ids=["scan", "one row", "stack"])
def result(request: pytest.FixtureRequest, kernels: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of calibrated data, written by HyperSpy's own layout of 4D data."""
    import h5py

    shape = request.param
    base = tmp_path_factory.mktemp("opens")
    data = np.random.default_rng(9).poisson(4, shape).astype(np.uint16)
    axes = [("y", 0.5, "nm"), ("x", 0.25, "nm"), ("qy", 2.0, "mrad"), ("qx", 2.0, "mrad")]
    if len(shape) == 3:
        axes = [("t", 0.1, "s"), *axes[2:]]
    with h5py.File(base / "scan.h5", "w") as file:  # NXdata: the calibrations come from real axes
        entry = file.create_group("entry")
        entry.attrs["NX_class"] = "NXentry"
        group = entry.create_group("data")
        group.attrs["NX_class"], group.attrs["signal"] = "NXdata", "data"
        group.attrs["axes"] = np.array([a[0] for a in axes], h5py.string_dtype())
        group["data"] = data
        for (name, scale, unit), n in zip(axes, shape, strict=True):
            group[name] = scale * np.arange(n)
            group[name].attrs["units"] = unit
    hostile = {"path": "a\nb \x00 \udcff 'q' $(x).h5", "share": "Mikroskop"}
    folder = kernels.folder(base / "run", base / "scan.h5", "mpi_kernels.formats.hdf5:Hdf5", attributes=hostile)
    assert job.run(folder, Ranks()) is not None
    return folder / "result.h5"


def manifest(result: Path) -> list[str]:
    return json.loads(result.with_name("result.json").read_text())["outputs"]


def sums(result: Path) -> dict[str, float]:
    import h5py

    with h5py.File(result) as file:
        return {p: float(file[p]["data"][()].sum()) for p in manifest(result)}


@pytest.mark.needs_peers
def test_hyperspy(result: Path) -> None:
    found = peer(HYPERSPY, result)
    want = sums(result)
    for reader in ("EMD", "Nexus"):
        signals = found[reader]
        assert sorted(s[0] for s in signals) == sorted(p.rpartition("/")[2] for p in want)
        assert sorted(s[4] for s in signals) == pytest.approx(sorted(want.values()), nan_ok=True)
        by_title = {s[0]: s for s in signals}
        pattern = by_title["variance"]
        assert pattern[3] == "Signal2D"
        assert [a[:4] for a in pattern[5]] == [["det_y", 2.0, 0.0, "mrad"], ["det_x", 2.0, 0.0, "mrad"]]
        total = by_title["total"]
        if len(total[5]) == 2:
            assert total[3] == "Signal2D"
            if total[1][0] > 1:
                assert total[5][0][:4] == ["scan_y", 0.5, 0.0, "nm"]
            elif reader == "EMD":  # NXdata of one row says nothing of its step; EMD's two positions do
                assert total[5][0][:4] == ["scan_y", 1.0, 0.0, "px"]
            assert total[5][1][:4] == ["scan_x", 0.25, 0.0, "nm"]
        else:
            assert total[5][0][1:4] == pytest.approx([0.1, 0.0, "s"])
        profile = by_title["profile"]
        assert profile[5][0][:4] == ["radius", 2.0, 1.0, "mrad"]
    scans = {s[0]: s for s in found["Nexus"]}["scan_profile"]
    assert [a[4] for a in scans[5]] == [True] * (len(scans[5]) - 1) + [False]  # spectra over the scan


@pytest.mark.needs_peers
def test_silx(result: Path) -> None:
    found = peer(SILX, result)
    outputs = manifest(result)
    assert sorted(found["all"]) == sorted(f"/entry{p}" for p in outputs)
    for path, (valid, issues, shape, interpretation, *_) in found["all"].items():
        assert (valid, issues) == (True, []), path
        assert interpretation == ("image" if len(shape) == 2 and "scan_profile" not in path else "spectrum"), path
    assert found["all"]["/entry/pattern/sum"][4:] == [["det_y", "det_x"], [2.0, 2.0], ["mrad", "mrad"], "counts"]
    assert found["default"][0] == "bf: sum over disc (counts)"


@pytest.mark.needs_peers
def test_py4dstem(result: Path) -> None:
    paths = [p.removeprefix("/") for p in manifest(result)]
    found = peer(PY4DSTEM, result, *paths)
    want = sums(result)
    for path in paths:
        assert found[path][6] == pytest.approx(want[f"/{path}"], nan_ok=True)
    assert found["pattern/sum"][1:6] == ["counts", ["det_y", "det_x"], ["mrad", "mrad"], [2.0, 2.0], [0.0, 0.0]]
    total = found["com/total"]
    assert total[3][-1] == ("nm" if len(total[0]) == 2 else "s")
    if total[0][0] == 5:
        assert total[1:6] == ["counts", ["scan_y", "scan_x"], ["nm", "nm"], [0.5, 0.25], [0.0, 0.0]]


def test_h5py_finds_everything_that_the_design_promises(result: Path) -> None:
    import h5py

    with h5py.File(result) as file:
        assert dict(file.attrs)["NX_class"] == "NXroot"
        assert (file.attrs["default"], file.attrs["emd_group_type"]) == ("entry", "file")
        assert (file.attrs["version_major"], file.attrs["version_minor"]) == (1, 0)
        for path in manifest(result):
            group = file[path]
            assert group.attrs["NX_class"] == "NXdata"
            assert group.attrs["emd_group_type"] == "array"
            for i, n in enumerate(group["data"].shape):
                assert len(group[group.attrs["axes"][i]]) == n
                assert group[f"dim{i}"].attrs["units"] == group[group.attrs["axes"][i]].attrs["units"]
        process = file["/entry/process"]
        assert process.attrs["NX_class"] == "NXprocess"
        assert process["source_digest"].asstr()[()] == "0" * 32
        parameters = json.loads(process["parameters"].asstr()[()])
        assert parameters["adf"]["shape"] == "annulus"
        assert parameters["com"]["remove_descan"] is False
        assert json.loads(process["orientation"].asstr()[()]) == {"transpose": False, "flip_y": False, "flip_x": False}
        assert process["source"].attrs["path"] == r"a\nb \x00 \udcff 'q' $(x).h5"
