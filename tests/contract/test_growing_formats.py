"""Formats that can be read while they grow: the header is known at once, and no frame before its bytes are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emflow import registry
from emflow.synthetic import write_empad, write_merlin, write_npy, write_raw
from mpi_kernels.errors import Incomplete, MissingData
from mpi_kernels.exact import ExactScan
from mpi_kernels.protocols import GrowingFormat

SMALL = ExactScan((3, 5), (6, 8), "uint16", seed=1, empty_every=7)
EMPAD = ExactScan((2, 3), (128, 128), "float32", seed=2)
SAMPLES: dict[str, tuple[ExactScan, Callable[[Path], Path]]] = {
    "npy": (SMALL, lambda f: write_npy(SMALL, f / "a.npy", byte_order=">")),
    "raw": (SMALL, lambda f: write_raw(SMALL, f / "a.raw")),
    "merlin": (SMALL, lambda f: write_merlin(SMALL, f / "a.mib")),
    "empad": (EMPAD, lambda f: write_empad(EMPAD, f / "scan_x3_y2.raw")),
}
GROWING = [n for n in registry.names("formats") if isinstance(registry.load("formats", n)(), GrowingFormat)]


def test_every_format_that_grows_has_a_sample() -> None:
    assert sorted(GROWING) == sorted(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_frames_appear_one_after_the_other(name: str, tmp_path: Path) -> None:
    scan, write = SAMPLES[name]
    known = registry.load("formats", name)()
    path = write(tmp_path)
    whole = path.read_bytes()
    header = known.probe(os.fspath(path))
    record = (len(whole) - known.open(os.fspath(path)).layout.first) // scan.count
    start = len(whole) - record * scan.count
    wanted = scan.frames(0, scan.count)
    path.write_bytes(whole[: start + record])
    grown = known.probe_growing(os.fspath(path))
    assert (grown.scan_shape, grown.det_shape, grown.dtype) == (header.scan_shape, header.det_shape, header.dtype)
    source = known.open_growing(os.fspath(path))
    for there in range(1, scan.count + 1):
        with path.open("ab") as file:
            file.write(whole[path.stat().st_size : start + there * record])
        out = np.full((there, *header.det_shape), 77, header.dtype)
        source.frames(0, there, out)
        np.testing.assert_array_equal(out, wanted[:there])
        if there < scan.count:
            with pytest.raises(MissingData) as caught:
                source.frames(there, there + 1, out[:1])
            assert caught.value.frame == there
            with pytest.raises(Incomplete):
                known.probe(os.fspath(path))
    source.close()
    assert known.probe(os.fspath(path)).frames == scan.count


@pytest.mark.parametrize("name", ["npy", "raw"])
def test_fortran_order_has_no_frame_before_the_last_byte(name: str, tmp_path: Path) -> None:
    write = {"npy": write_npy, "raw": write_raw}[name]
    suffix = {"npy": ".npy", "raw": ".raw"}[name]
    path = write(SMALL, tmp_path / f"a{suffix}", fortran=True)
    os.truncate(path, path.stat().st_size - 1)
    for ask in ("probe_growing", "open_growing"):
        with pytest.raises(Incomplete, match="Fortran"):
            getattr(registry.load("formats", name)(), ask)(os.fspath(path))


def test_a_merlin_file_without_its_number_of_frames_waits(tmp_path: Path) -> None:
    path = write_merlin(SMALL, tmp_path / "a.mib")
    path.with_suffix(".hdr").unlink()
    with pytest.raises(Incomplete, match="how many frames"):
        registry.load("formats", "merlin")().open_growing(os.fspath(path))
