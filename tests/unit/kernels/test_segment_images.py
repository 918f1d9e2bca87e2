"""Segment images: which pixels belong together, and where each segment looks from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mpi_kernels.contract import Axis
from mpi_kernels.errors import RecipeError

USE = "mpi_kernels.reductions.segment_images:SegmentImages"
RAD = tuple(Axis(name=n, scale=0.5e-3, offset=-4e-3, unit="rad") for n in ("ky", "kx"))
MRAD = tuple(Axis(name=n, scale=s, offset=-4.0, unit="mrad") for n, s in (("ky", 0.5), ("kx", -0.25)))


def frames(det_shape: tuple[int, int], dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(3).integers(0, 50, (4, 5, *det_shape)).astype(dtype)


@pytest.mark.parametrize("det_shape", [(16, 16), (13, 10), (3, 9)])
@pytest.mark.parametrize("across", [1, 4, 8])
def test_segments_are_bins_that_share_no_pixel_and_miss_none(
    kernel: SimpleNamespace, det_shape: tuple[int, int], across: int
) -> None:
    data = frames(det_shape)
    found = kernel.reduce(data, kernel.spec(USE, "s", across=across)).arrays["s"]
    bins = [np.array_split(np.arange(n), min(across, n)) for n in det_shape]
    assert found["images"].shape == (4, 5, len(bins[0]) * len(bins[1]))
    assert found["images"].dtype == np.uint64
    np.testing.assert_array_equal(found["images"].sum(axis=-1), data.sum(axis=(2, 3)))
    assert found["pixels"].sum() == det_shape[0] * det_shape[1]
    sizes = found["pixels"].reshape(len(bins[0]), len(bins[1]))
    heights, widths = (sorted(len(b) for b in side) for side in bins)
    assert sorted(sizes.ravel()) == sorted(h * w for h in heights for w in widths)


def test_one_segment_by_hand(kernel: SimpleNamespace) -> None:
    data = frames((8, 8))
    found = kernel.reduce(data, kernel.spec(USE, "s", across=2), det_axes=RAD)
    corner = data[..., 4:, :4]
    np.testing.assert_array_equal(found.arrays["s"]["images"][..., 2], corner.sum(axis=(2, 3)))
    total = corner.sum(axis=(0, 1)).astype(float)
    y = (total.sum(axis=1) * np.arange(4, 8)).sum() / total.sum()
    x = (total.sum(axis=0) * np.arange(4)).sum() / total.sum()
    np.testing.assert_allclose(found.arrays["s"]["angles"][2], (0.5 * y - 4, 0.5 * x - 4), rtol=1e-12)
    assert found.scalars["s"] == {"segments": 4, "angle_unit": "mrad"}


def test_angles_follow_the_files_calibration_of_each_axis(kernel: SimpleNamespace) -> None:
    data = np.ones((2, 3, 8, 8), np.uint8)
    angles = kernel.reduce(data, kernel.spec(USE, "s", across=2), det_axes=MRAD).arrays["s"]["angles"]
    np.testing.assert_allclose(angles[:, 0], [0.5 * y - 4 for y in (1.5, 1.5, 5.5, 5.5)])
    np.testing.assert_allclose(angles[:, 1], [-0.25 * x - 4 for x in (1.5, 5.5, 1.5, 5.5)])


@pytest.mark.parametrize("axes", [(), tuple(Axis(name=n, scale=0.1, unit="1/nm") for n in ("ky", "kx"))])
def test_without_angles_it_says_px(kernel: SimpleNamespace, axes: tuple[Axis, ...]) -> None:
    found = kernel.reduce(np.ones((2, 3, 8, 8), np.uint8), kernel.spec(USE, "s", across=2), det_axes=axes)
    assert found.scalars["s"]["angle_unit"] == "px"
    np.testing.assert_allclose(found.arrays["s"]["angles"], [(1.5, 1.5), (1.5, 5.5), (5.5, 1.5), (5.5, 5.5)])


def test_reciprocal_lengths_are_angles_once_the_voltage_is_known(kernel: SimpleNamespace) -> None:
    """300 kV: 1.9687 pm, from tables; 1/Å is ten times 1/nm."""
    data = np.ones((2, 3, 8, 8), np.uint8)
    axes = (Axis(name="ky", scale=2.0, offset=-7.0, unit="1/nm"), Axis(name="kx", scale=0.3, offset=1.0, unit="1/Å"))
    facts = {"det_axes": axes, "metadata": {"high_tension_v": 300e3}}
    found = kernel.reduce(data, kernel.spec(USE, "s", across=2), **facts)
    assert found.scalars["s"]["angle_unit"] == "mrad"
    want = [[(2 * y - 7) * 1.9687, (0.3 * x + 1) * 19.687] for y in (1.5, 5.5) for x in (1.5, 5.5)]
    np.testing.assert_allclose(found.arrays["s"]["angles"], want, rtol=3e-5)


def test_a_disc_leaves_out_what_is_outside(kernel: SimpleNamespace) -> None:
    data = frames((16, 16))
    found = kernel.reduce(data, kernel.spec(USE, "s", across=8, radius=4.0)).arrays["s"]
    y, x = np.ogrid[:16, :16]
    inside = (y - 7.5) ** 2 + (x - 7.5) ** 2 <= 16
    np.testing.assert_array_equal(found["images"].sum(axis=-1), data[..., inside].sum(axis=-1))
    assert (found["pixels"] > 0).all()
    assert found["pixels"].sum() == inside.sum()
    assert len(found["pixels"]) < 64


def test_dark_and_broken_pixels_pull_no_centroid(kernel: SimpleNamespace) -> None:
    data = np.zeros((2, 2, 4, 4), np.float32)
    data[..., 2:, :2] = 1.0
    data[..., 3, 1] = np.nan
    data[..., 0, 3] = -5.0
    angles = kernel.reduce(data, kernel.spec(USE, "s", across=2)).arrays["s"]["angles"]
    np.testing.assert_allclose(angles, [(0.5, 0.5), (0.5, 2.5), (7 / 3, 1 / 3), (2.5, 2.5)])


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_ranks_and_blocks_agree(kernel: SimpleNamespace, dtype: str) -> None:
    data = frames((12, 10), dtype)
    wanted = kernel.reduce(data, kernel.spec(USE, "s"), det_axes=RAD)
    for ranks in (2, 3):
        found = kernel.reduce(data, kernel.spec(USE, "s"), det_axes=RAD, ranks=ranks, block_bytes=1)
        kernel.same(wanted.arrays, found.arrays, frames=20, pixels=120)
        assert found.scalars == wanted.scalars


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"across": 0}, "1 to 64"),
        ({"across": 65}, "1 to 64"),
        ({"centre": [1.0, 1.0]}, "give its radius"),
        ({"radius": 0.1}, "no pixel"),
        ({"radius": 3.0, "unit": "mrad"}, "not calibrated in 'mrad'"),
    ],
)
def test_segments_that_cannot_be(kernel: SimpleNamespace, parameters: dict[str, object], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        kernel.reduce(frames((8, 8)), kernel.spec(USE, "s", **parameters))
