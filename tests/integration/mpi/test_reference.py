"""Real microscope files, reduced by one, two and three ranks, against the independent reference."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from emflow import registry
from mpi_kernels.contract import Header, ReductionSpec
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.choose import choose
from mpi_kernels.protocols import Format

pytestmark = [pytest.mark.needs_data, pytest.mark.needs_mpi]
FEWEST = 55
"""Sets in formats that emflow reads; fewer would mean that a format has stopped knowing its files."""
RADIUS_PX_INTEGER = 1e-9
RELATIVE_FLOAT = 1e-6


@pytest.fixture(scope="module")
def formats() -> dict[str, Format]:
    return {name: registry.load("formats", name)() for name in registry.names("formats")}


@pytest.fixture(scope="module")
def sets(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format]
) -> dict[str, tuple[str, Header]]:
    """Datasets in scope, by id."""
    found = {}
    for name, truth in reference.items():
        path = real_data / truth["files"][0]
        try:
            chosen, header = choose(os.fspath(path), formats)
        except (FormatError, Incomplete):
            continue
        if header.frames == truth["n_frames"] and list(header.det_shape) == truth["det_shape"]:
            found[name] = (chosen, header)
    assert len(found) >= FEWEST
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_sets_equal_the_reference(
    ranks: int,
    sets: dict[str, tuple[str, Header]],
    reference: dict[str, dict[str, Any]],
    real_data: Path,
    formats: dict[str, Format],
    kernels: SimpleNamespace,
    mpiexec: str,
    tmp_path: Path,
) -> None:
    folders = {}
    for i, (name, (chosen, header)) in enumerate(sets.items()):
        truth = reference[name]
        shape = tuple(truth["scan_shape"] or [header.frames])
        folders[name] = kernels.folder(
            tmp_path / str(i),
            real_data / truth["files"][0],
            registry.target("formats", chosen),
            ranks=ranks,
            reductions=reductions_for(truth, kernels.standard),
            scan_shape=shape,
            block_bytes=3 * int(np.prod(header.det_shape)),
        )
    done = kernels.launch(mpiexec, ranks, kernels.here / "mpi" / "many.py", *folders.values())
    assert done.returncode == 0, done.stderr
    for name, folder in folders.items():
        path = real_data / reference[name]["files"][0]
        check(name, folder, reference[name], frames_of(formats[sets[name][0]], path))


def reductions_for(truth: dict[str, Any], standard: tuple[ReductionSpec, ...]) -> list[ReductionSpec]:
    """The standard ones; where the reference's radius is below our smallest, its annulus, and not its empty disc."""
    chosen = list(standard)
    radius = truth["geometry"]["r"]
    if radius < 0.75:
        ring = {"shape": "annulus", "inner": radius, "outer": 2 * radius}
        chosen = [replace(r, parameters=ring) if r.name == "adf" else r for r in standard if r.name != "bf"]
    return [*chosen, ReductionSpec(use="frame_max:FrameMax", name="peak")]


def frames_of(known: Format, path: Path) -> np.ndarray:
    """All frames: only for the size of the bound, sum|x|."""
    source = known.open(os.fspath(path))
    out = np.empty((source.header.frames, *source.header.det_shape), source.header.dtype)
    source.frames(0, len(out), out)
    source.close()
    return out


def check(name: str, folder: Path, truth: dict[str, Any], frames: np.ndarray) -> None:
    manifest = json.loads((folder / "result.json").read_text())
    assert manifest["frames"] == truth["n_frames"], name
    with h5py.File(folder / "result.h5") as file:
        found = {path: file[path]["data"][()] for path in manifest["outputs"]}
    per_frame = truth["per_frame"]
    maps = {"/com/total": "total", "/bf/image": "bf", "/adf/image": "annulus", "/peak/map": "frame_max"}
    if "/bf/image" not in found:
        assert not any(per_frame["bf"])
        del maps["/bf/image"]
    total = found["/pattern/sum"]
    weighted = total.astype(object) * (np.arange(total.size).reshape(total.shape) + 1)
    if np.dtype(truth["dtype"]).kind in "iu":
        for path, key in maps.items():
            assert found[path].ravel().tolist() == per_frame[key], (name, path)
        assert int(weighted.sum()) == truth["sum_frame"]["weighted"], name
        assert int(total.sum()) == truth["stats"]["sum"], name
        assert hashlib.sha256(total.astype("<f8").tobytes()).hexdigest() == truth["sum_frame"]["sha256_f8"], name
        for axis in "yx":
            want = np.array(per_frame[f"com_{axis}"], np.float64)  # null is NaN: no counts
            got = found[f"/com/{axis}"].ravel()
            np.testing.assert_allclose(got, want, rtol=0, atol=RADIUS_PX_INTEGER, err_msg=name)
        return
    size = np.abs(frames.astype(np.float64)).sum(axis=(1, 2))
    for path, key in maps.items():
        assert (np.abs(found[path].ravel() - np.array(per_frame[key])) <= RELATIVE_FLOAT * size).all(), (name, path)
    assert abs(float(weighted.sum()) - truth["sum_frame"]["weighted"]) <= RELATIVE_FLOAT * size.sum() * total.size, name
    for axis, n in zip("yx", frames.shape[1:], strict=True):
        want, got = np.array(per_frame[f"com_{axis}"], np.float64), found[f"/com/{axis}"].ravel()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        bound = 2 * RELATIVE_FLOAT * n * size / np.maximum(np.abs(np.array(per_frame["total"])), 1e-300)
        assert (np.abs(got - want) <= bound)[~np.isnan(want)].all(), (name, axis)
    assert float(np.max(found["/pattern/max"])) == truth["stats"]["max"], name
