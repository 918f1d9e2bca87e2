"""The built-in reductions against plain formulas, and the geometry they count in."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mpi_kernels.contract import Axis, Header
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Output, Reduction, SumSq, Term
from mpi_kernels.reductions.fields import phase

MRAD = (Axis(name="qy", scale=0.5, offset=-4, unit="mrad"), Axis(name="qx", scale=0.5, offset=-4, unit="mrad"))


def weights(
    kernel: SimpleNamespace, det_shape: tuple[int, int], facts: dict | None = None, **parameters: object
) -> np.ndarray:
    """The region, found by asking for the image of each single pixel."""
    pixels = det_shape[0] * det_shape[1]
    deltas = np.eye(pixels, dtype=np.uint8).reshape(pixels, *det_shape)
    found = kernel.reduce(deltas, kernel.spec("virtual_image", "v", **parameters), **(facts or {}))
    return found.arrays["v"]["image"].reshape(det_shape)


def test_a_disc_of_radius_5_holds_its_edge(kernel: SimpleNamespace) -> None:
    assert weights(kernel, (21, 21), radius=5.0).sum() == 81  # 69 without the edge


def test_default_disc_and_annulus_are_the_references(kernel: SimpleNamespace) -> None:
    height, width = 12, 17
    y, x = np.ogrid[:height, :width]
    d2, r = (y - 5.5) ** 2 + (x - 8) ** 2, 3.0
    np.testing.assert_array_equal(weights(kernel, (height, width)), d2 <= r * r)
    np.testing.assert_array_equal(weights(kernel, (height, width), shape="annulus"), (d2 > r * r) & (d2 <= 4 * r * r))


def test_radii_in_the_detectors_unit(kernel: SimpleNamespace) -> None:
    in_pixels = weights(kernel, (16, 16), shape="annulus", inner=2, outer=6.0)
    in_mrad = weights(kernel, (16, 16), {"det_axes": MRAD}, shape="annulus", inner=1, outer=3.0, unit="mrad")
    np.testing.assert_array_equal(in_pixels, in_mrad)
    with pytest.raises(RecipeError, match="not calibrated in 'mrad'; its units: none"):
        weights(kernel, (16, 16), radius=2.0, unit="mrad")


@pytest.mark.parametrize("scale", [0.1, 0.2, 0.02, 0.7, 1 / 3])
@pytest.mark.parametrize("radius", range(1, 10))
def test_an_edge_is_not_lost_to_rounding_in_a_unit(kernel: SimpleNamespace, scale: float, radius: int) -> None:
    axes = {"det_axes": tuple(Axis(name=n, scale=scale, unit="mrad") for n in ("qy", "qx"))}
    for shape in ({"radius": radius}, {"shape": "annulus", "inner": radius, "outer": radius + 1.0}):
        scaled = {name: value if name == "shape" else value * scale for name, value in shape.items()}
        wanted = weights(kernel, (21, 21), **{k: v if k == "shape" else float(v) for k, v in shape.items()})
        np.testing.assert_array_equal(weights(kernel, (21, 21), axes, unit="mrad", **scaled), wanted)


@pytest.mark.parametrize(
    ("of_file", "asked", "factor"),
    [("rad", "mrad", 1e3), ("mrad", "rad", 1e-3), ("1/Å", "1/A", 1.0), ("1/A", "1/nm", 10.0), ("1/nm", "1/Å", 0.1)],
)
def test_units_of_one_kind_are_converted(kernel: SimpleNamespace, of_file: str, asked: str, factor: float) -> None:
    axes = tuple(Axis(name=n, scale=0.25, unit=of_file) for n in ("qy", "qx"))
    wanted = weights(kernel, (16, 16), radius=5.0)
    given = weights(kernel, (16, 16), {"det_axes": axes}, radius=5.0 * 0.25 * factor, unit=asked)
    np.testing.assert_array_equal(given, wanted)


@pytest.mark.parametrize("shape", [(8, 8), (9, 7)])
def test_four_wedges_share_no_pixel_and_miss_none(kernel: SimpleNamespace, shape: tuple[int, int]) -> None:
    quarters = [weights(kernel, shape, shape="wedge", angles=[a, a + 90.0]) for a in (-45, 45, 135, 225)]
    assert (sum(quarters) == 1).all()
    right = quarters[0]
    assert right[shape[0] // 2, -1] == 1  # +x is at 0 degrees
    assert quarters[1][-1, shape[1] // 2] == 1  # +y at 90


def test_mask_from_a_file(kernel: SimpleNamespace, tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 99, (5, 4, 6)).astype(np.uint8)
    for dtype, want in (("bool", "uint64"), ("int16", "int64"), (">i4", "int64"), ("float32", "float64")):
        mask = np.random.default_rng(2).integers(-2, 3, (4, 6)).astype(dtype)
        np.save(tmp_path / "m.npy", mask)
        found = kernel.reduce(data, kernel.spec("virtual_image", "v", shape="mask", file=str(tmp_path / "m.npy")))
        image = found.arrays["v"]["image"]
        assert image.dtype == want
        np.testing.assert_array_equal(image, (data.astype(np.int64) * mask).sum(axis=(1, 2)))
    with pytest.raises(RecipeError, match=r"\(4, 6\), the frames have \(4, 5\)"):
        kernel.reduce(data[..., 1:], kernel.spec("virtual_image", "v", shape="mask", file=str(tmp_path / "m.npy")))
    with pytest.raises(RecipeError, match=r"none\.npy"):
        kernel.reduce(data, kernel.spec("virtual_image", "v", shape="mask", file=str(tmp_path / "none.npy")))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shape": "disc", "outer": 3.0}, "outer: not for shape 'disc'"),
        ({"shape": "wedge"}, "needs 'angles'"),
        ({"shape": "mask"}, "needs 'file'"),
        ({"shape": "annulus", "inner": 4.0, "outer": 2.0}, "no ring between"),
        ({"shape": "wedge", "angles": [10.0, 10.0]}, "no wedge"),
        ({"radius": 0.1}, "holds no pixel"),
        ({"radius": -1.0}, "not a length"),
        ({"centre": [float("nan"), 1.0]}, "not a point"),
    ],
)
def test_regions_that_cannot_be(kernel: SimpleNamespace, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        weights(kernel, (8, 8), **parameters)


@settings(max_examples=30, deadline=None)
@given(
    arrays(
        st.sampled_from([np.uint8, np.uint16, np.uint32, np.int32]),
        st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
        elements=st.sampled_from([0, 1, 2, 100]) | st.sampled_from([125, 126, 127]),
    ),
    st.sampled_from([0, 2**31 - 200]),
)
def test_variance_of_integers_does_not_cancel(kernel: SimpleNamespace, data: np.ndarray, pedestal: int) -> None:
    if data.dtype.itemsize == 4:
        data = data + data.dtype.type(pedestal)
    found = kernel.reduce(data, kernel.spec("pattern"), kind="stack").arrays["pattern"]
    n = len(data)
    for index in np.ndindex(data.shape[1:]):
        values = [int(v) for v in data[(slice(None), *index)]]
        exact = Fraction(sum(v * v for v in values), n) - Fraction(sum(values), n) ** 2
        assert found["variance"][index] == pytest.approx(float(exact), rel=4e-16, abs=0)
        assert found["mean"][index] == sum(values) / n
        assert found["max"][index] == max(values)
        assert found["sum"][index] == sum(values)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("blank", [None, 0, 1])
def test_a_pedestal_does_not_cost_the_variance_of_floats(
    kernel: SimpleNamespace, dtype: str, ranks: int, blank: int | None
) -> None:
    """At a mean of 1e6 and a sigma of 1 squares need 12 digits before the first that counts."""
    data = np.random.default_rng(8).normal(1e6, 1.0, (300, 5, 6)).astype(dtype)
    if blank is not None:
        data[blank * 100] = 0 if blank else np.nan  # a sampled frame
        data[blank * 100, 0, 0] = 1e6
    found = kernel.reduce(data, kernel.spec("pattern"), kind="stack", ranks=ranks, block_bytes=1200)
    values = data.astype(np.longdouble)
    want = np.square(values - values.mean(axis=0)).mean(axis=0)
    rest = np.isfinite(want)
    np.testing.assert_allclose(found.arrays["pattern"]["variance"][rest], want[rest].astype(float), rtol=1e-8)
    assert np.isnan(found.arrays["pattern"]["variance"][~rest]).all()
    assert rest.any()


@dataclass(frozen=True)
class Squares(Reduction):
    """The plain sum of squares, or one less a level."""

    level: float | None = None

    def outputs(self, header: Header) -> dict[str, Output]:
        return {"it": Output(over="frame", shape=header.det_shape)}

    def terms(self, header: Header) -> dict[str, Term]:
        return {"it": SumSq(None if self.level is None else np.full(header.det_shape, self.level))}


def test_squares_less_different_levels_are_different_terms(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(8).normal(3, 1, (20, 5, 6)).astype(np.float32)
    levels = {"a": None, "b": 3.0, "c": -4.5, "d": None}
    specs = [kernel.spec(f"{__name__}:Squares", n, **({} if v is None else {"level": v})) for n, v in levels.items()]
    found = kernel.reduce(data, *specs, kernel.spec("pattern"), ranks=2, block_bytes=1)
    for name, level in levels.items():
        want = np.square(data.astype(float) - (level or 0.0)).sum(axis=0)
        np.testing.assert_allclose(found.arrays[name]["it"], want, rtol=1e-13)
    np.testing.assert_allclose(found.arrays["pattern"]["variance"], data.astype(float).var(axis=0), rtol=1e-12)


@pytest.mark.parametrize(("dtype", "level"), [("uint16", 1.0), ("float32", float("nan"))])
def test_a_level_is_finite_and_for_floats(kernel: SimpleNamespace, dtype: str, level: float) -> None:
    with pytest.raises(RecipeError, match="a shift is finite float64 and for floats"):
        kernel.reduce(np.ones((4, 5, 6), dtype), kernel.spec(f"{__name__}:Squares", "s", level=level))


def test_centre_of_mass_by_its_definition(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(3).integers(0, 5000, (3, 4, 7, 9)).astype(np.uint16)
    data[1, 2] = 0
    found = kernel.reduce(data, kernel.spec("centre_of_mass", "com"))
    com = found.arrays["com"]
    assert np.isnan(com["y"][1, 2])
    assert np.isnan(com["x"][1, 2])
    assert com["total"][1, 2] == 0
    for i in np.ndindex(3, 4):
        if i != (1, 2):
            frame = [[int(v) for v in row] for row in data[i]]
            total = sum(map(sum, frame))
            assert com["y"][i] == sum(y * sum(row) for y, row in enumerate(frame)) / total
            assert com["x"][i] == sum(x * v for row in frame for x, v in enumerate(row)) / total
    assert found.scalars["com"]["frames_without_counts"] == 1
    assert np.isfinite(com["phase"]).all()


def test_descan_is_measured_and_only_removed_when_asked(kernel: SimpleNamespace) -> None:
    data = np.zeros((6, 5, 40, 40), np.uint16)
    for y, x in np.ndindex(6, 5):
        data[y, x, 10 + 2 * y + x, 20 - x] = 7
    left = kernel.reduce(data, kernel.spec("centre_of_mass", "com"))
    scalars = left.scalars["com"]
    slopes = [scalars[f"descan_{c}_per_scan_{a}"] for c in "yx" for a in "yx"]
    assert slopes == pytest.approx([2, 1, 0, -1], abs=1e-9)
    np.testing.assert_allclose(left.arrays["com"]["y"], 10 + 2 * np.arange(6)[:, None] + np.arange(5), atol=1e-12)
    removed = kernel.reduce(data, kernel.spec("centre_of_mass", "com", remove_descan=True)).arrays["com"]
    np.testing.assert_allclose(removed["y"], left.arrays["com"]["y"].mean(), atol=1e-9)
    np.testing.assert_allclose(removed["x"], left.arrays["com"]["x"].mean(), atol=1e-9)


@pytest.mark.parametrize("shape", [(16, 24), (15, 9), (1, 32), (32, 1)])
def test_phase_is_the_integral_of_its_gradient(shape: tuple[int, int]) -> None:
    y, x = (2 * np.pi * np.arange(n) / n for n in shape)
    y, x = y[:, None], x[None, :]
    truth = 3 * np.cos(y) * (shape[0] > 1) + np.sin(2 * x + 0.3) * (shape[1] > 1) + 0 * y * x
    dy = -3 * np.sin(y) * 2 * np.pi / shape[0] * (shape[0] > 1) + 0 * x
    dx = 2 * np.cos(2 * x + 0.3) * 2 * np.pi / shape[1] * (shape[1] > 1) + 0 * y
    np.testing.assert_allclose(phase(dy + 5.0, dx - 2.0), truth, atol=1e-12)


def test_phase_without_any_vector_is_nan() -> None:
    assert np.isnan(phase(np.full((2, 3), np.nan), np.zeros((2, 3)))).all()


def test_centre_of_mass_inside_a_radius(kernel: SimpleNamespace) -> None:
    data = np.zeros((2, 9, 9), np.uint8)
    data[:, 4, 5], data[:, 0, 0] = 10, 200
    com = kernel.reduce(data, kernel.spec("centre_of_mass", "com", radius=2.0)).arrays["com"]
    assert com["y"].tolist() == [4.0, 4.0]
    assert com["x"].tolist() == [5.0, 5.0]
    assert "phase" not in com  # a stack has no scan to integrate over


def test_radial_profile_by_its_definition(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(4).integers(0, 99, (3, 2, 8, 11)).astype(np.uint16)
    spec = kernel.spec("radial_profile", "r", centre=[3.0, 4.5], width=1.5, bins=5, scan=True)
    found = kernel.reduce(data, spec).arrays["r"]
    y, x = np.ogrid[:8, :11]
    ring = np.floor(np.hypot(y - 3.0, x - 4.5) / 1.5)
    for k in range(5):
        assert found["profile"][k] == pytest.approx(data[..., ring == k].mean(), rel=1e-14)
        np.testing.assert_allclose(found["scan_profile"][..., k], data[..., ring == k].mean(axis=-1), rtol=1e-14)


def test_a_ring_without_pixels_is_nan(kernel: SimpleNamespace) -> None:
    found = kernel.reduce(np.ones((2, 4, 4), np.uint8), kernel.spec("radial_profile", "r", bins=9, scan=True))
    assert np.isnan(found.arrays["r"]["profile"][5:]).all()
    assert found.scalars["r"]["empty_rings"] == 6  # ring 2 is the last that holds pixels (2.12 px)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint64", "float32", "float64"])
def test_an_image_passes_unchanged(kernel: SimpleNamespace, dtype: str) -> None:
    data = np.random.default_rng(5).integers(0, 100, (6, 9)).astype(dtype)
    if dtype.startswith("float"):
        data[0, 0], data[1, 1] = -0.0, np.nan
    found = kernel.reduce(data, kernel.spec("image"), ranks=2)
    assert found.arrays["image"]["image"].tobytes() == data.tobytes()
    good = data[np.isfinite(data)].astype(np.float64)
    want = {"min": good.min(), "max": good.max(), "mean": good.mean(), "std": good.std(), "sum": good.sum()}
    assert {k: found.scalars["image"][k] for k in want} == pytest.approx(want, rel=1e-12)
    assert found.scalars["image"]["not_finite"] == data.size - good.size


def test_pixels_need_not_be_square(kernel: SimpleNamespace) -> None:
    axes = {"det_axes": (Axis(name="qy", scale=0.5, unit="mrad"), Axis(name="qx", scale=1.0, unit="mrad"))}
    region = weights(kernel, (17, 17), axes, radius=3.0, unit="mrad")
    assert (region[:, 8].sum(), region[8].sum()) == (13, 7)  # 6 pixels of 0.5 mrad up and down, 3 of 1 mrad sideways
