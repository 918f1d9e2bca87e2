"""The exact generator: what it says of its frames is what adding them up gives; it writes as slowly as asked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emflow.synthetic import (
    ExactScan,
    Pace,
    disc,
    write_emd,
    write_empad,
    write_hspy,
    write_merlin,
    write_nion_h5,
    write_npy,
    write_nxdata,
    write_raw,
)

TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64", "float32", "float64"]
DETECTORS = [(16, 20), (20, 9), (5, 4), (2, 3), (1, 1), (1, 8), (64, 64)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("det_shape", DETECTORS)
def test_truths_by_brute_force(dtype: str, det_shape: tuple[int, int]) -> None:
    scan = ExactScan((5, 7), det_shape, dtype, seed=3, empty_every=6)
    stored = scan.frames(0, scan.count)
    assert stored.dtype == np.dtype(dtype)
    frames = stored.astype(np.int64)
    limit = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 2**24
    assert frames.min() >= 0
    assert frames.max() <= limit
    np.testing.assert_array_equal(frames.sum(axis=(1, 2)), scan.totals())
    np.testing.assert_array_equal(frames.sum(axis=0), scan.sum_frame())
    mask = disc(det_shape, (det_shape[0] / 2, det_shape[1] / 3), max(det_shape) / 3)
    np.testing.assert_array_equal(frames[:, mask].sum(axis=1), scan.virtual(mask))
    y, x = np.indices(det_shape)
    total = np.where(scan.totals() == 0, np.nan, scan.totals())
    centre = np.stack([(frames * y).sum(axis=(1, 2)) / total, (frames * x).sum(axis=(1, 2)) / total], axis=1)
    np.testing.assert_allclose(centre, scan.centre_of_mass(), rtol=0, atol=1e-12)
    assert np.isnan(scan.centre_of_mass()[5]).all()
    assert scan.totals()[5] == 0


@pytest.mark.parametrize("scan_shape", [(), (1,), (6,), (1, 1), (1, 9), (9, 1), (4, 5)])
def test_any_frame_alone_is_the_one_of_the_whole(scan_shape: tuple[int, ...]) -> None:
    scan = ExactScan(scan_shape, (9, 12))
    whole = scan.frames(0, scan.count)
    assert len(whole) == scan.count
    for i in reversed(range(scan.count)):
        np.testing.assert_array_equal(scan.frame(i), whole[i])


def test_float32_accumulators_would_be_caught() -> None:
    assert ExactScan((2, 2), (256, 256)).totals().min() > 2**24


def test_disc_includes_its_edge() -> None:
    assert disc((21, 21), (10, 10), 5).sum() == 81


SLOW: list[tuple[str, Callable[..., Path], ExactScan]] = [
    ("npy", write_npy, ExactScan((4, 3), (8, 6))),
    ("raw", write_raw, ExactScan((4, 3), (8, 6))),
    ("mib", write_merlin, ExactScan((4, 3), (8, 6))),
    ("raw", write_empad, ExactScan((4, 3), (128, 128), "float32")),
    ("h5", write_nion_h5, ExactScan((4, 3), (8, 6))),
    ("emd", write_emd, ExactScan((4, 3), (8, 6))),
    ("hspy", write_hspy, ExactScan((4, 3), (8, 6))),
    ("nxs", write_nxdata, ExactScan((4, 3), (8, 6))),
]


@pytest.mark.parametrize(("suffix", "write", "scan"), SLOW, ids=[w.__name__ for _, w, _ in SLOW])
def test_files_grow_row_by_row(suffix: str, write: Callable[..., Path], scan: ExactScan, tmp_path: Path) -> None:
    path, slow = tmp_path / f"slow.{suffix}", tmp_path / f"fast.{suffix}"
    steps: list[tuple[int, int, int]] = []

    def step(frames: int) -> None:
        steps.append((frames, path.stat().st_size, len(list(tmp_path.iterdir()))))

    before = time.monotonic()
    write(scan, path, pace=Pace(rows_per_step=1, pause_s=0.01, step=step))
    assert time.monotonic() - before >= 0.03
    assert [frames for frames, _, _ in steps] == [3, 6, 9, 12]
    sizes = [size for _, size, _ in steps]
    if suffix in ("npy", "raw", "mib"):
        record = {"write_merlin": 384 + 96, "write_empad": 66560}.get(write.__name__, 96)
        assert [b - a for a, b in itertools.pairwise(sizes)] == [3 * record] * 3
    elif suffix in ("h5", "emd", "nxs"):
        assert len(set(sizes[1:])) == 1, "a contiguous array has its full size from its first row on"
    write(scan, slow)
    assert slow.stat().st_size == path.stat().st_size


def test_a_writer_that_is_stopped_leaves_what_it_wrote(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def step(frames: int) -> None:
        if frames == 6:
            raise Stop

    scan = ExactScan((4, 3), (8, 6))
    with pytest.raises(Stop):
        write_raw(scan, tmp_path / "a.raw", pace=Pace(rows_per_step=1, step=step))
    assert (tmp_path / "a.raw").stat().st_size == 6 * 96
    assert not (tmp_path / "a.json").exists()


def test_merlin_and_empad_take_what_their_detectors_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Merlin"):
        write_merlin(ExactScan((2,), (8, 8), "float32"), tmp_path / "a.mib")
    with pytest.raises(ValueError, match="EMPAD"):
        write_empad(ExactScan((2,), (8, 8), "float32"), tmp_path / "a.raw")
