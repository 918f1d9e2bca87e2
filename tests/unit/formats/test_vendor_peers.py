"""Makers' files that our own writers make, read by rosettasciio and tifffile: a second opinion on both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emflow.synthetic import ExactScan
from emflow.synthetic_vendor import write_de, write_dm, write_mrc, write_ser, write_tiff, write_tvips

rsciio = pytest.importorskip("rsciio")

STACK = ExactScan((6,), (5, 7), "int16", seed=4)
WORDS = ExactScan((6,), (5, 7), "uint16", seed=4)


def peer(module: str, path: Path, **options: Any) -> np.ndarray:
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signals = importlib.import_module(f"rsciio.{module}").file_reader(os.fspath(path), **options)
    return np.asarray(max(signals, key=lambda s: np.asarray(s["data"]).size)["data"])


@pytest.mark.parametrize(
    ("module", "scan", "write"),
    [
        ("tvips", WORDS, lambda f: write_tvips(WORDS, f / "a_000.tvips", parts=(2, 5))),
        ("mrc", STACK, lambda f: write_mrc(STACK, f / "a.mrc", extended=32)),
        ("tia", STACK, lambda f: write_ser(STACK, f / "a_1.ser")),
        ("tia", WORDS, lambda f: write_ser(WORDS, f / "a_1.ser", wide=False)),
        ("digitalmicrograph", STACK, lambda f: write_dm(STACK, f / "a.dm3", version=3, swapped=None)),
        ("digitalmicrograph", WORDS, lambda f: write_dm(WORDS, f / "a.dm4", version=4)),
        ("tiff", WORDS, lambda f: write_tiff(WORDS, f / "a.tif", strips=2)),
        ("tiff", STACK, lambda f: write_tiff(STACK, f / "a.tif", order=">", big=True)),
    ],
)
def test_rosettasciio_reads_the_same(
    module: str, scan: ExactScan, write: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = peer(module, write(tmp_path))
    np.testing.assert_array_equal(found.reshape(-1, *scan.det_shape), scan.frames(0, scan.count))


def test_the_raster_of_a_direct_electron_movie(tmp_path: Path) -> None:
    scan = ExactScan((2, 3), (5, 7), "uint16")
    path = write_de(scan, tmp_path / "20240101_00001_movie.mrc")
    np.testing.assert_array_equal(peer("mrc", path).reshape(-1, 5, 7), scan.frames(0, 6))
