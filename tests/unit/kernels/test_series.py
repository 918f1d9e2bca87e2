"""Annular series, position-averaged patterns, sectors and mask files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_kernels import plan
from mpi_kernels.contract import Axis, Header, Orientation, Recipe
from mpi_kernels.engine import Visit
from mpi_kernels.errors import RecipeError
from mpi_kernels.ranks import Ranks
from mpi_kernels.reductions import geometry, mask_file
from mpi_kernels.reductions.annular_series import AnnularSeries

SERIES = "mpi_kernels.reductions.annular_series:AnnularSeries"
PACBED = "mpi_kernels.reductions.pacbed:Pacbed"


def header(det_shape: tuple[int, int] = (17, 13), scan_shape: tuple[int, int] = (2, 3), **facts: object) -> Header:
    return Header(
        format="memory",
        kind="4d",
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype="uint8",
        members=(),
        rule="exact",
        **facts,  # type: ignore[arg-type]
    )


def detector(y: float, x: float, unit: str = "mrad") -> tuple[Axis, Axis]:
    return Axis(name="qy", scale=y, offset=-3.0, unit=unit), Axis(name="qx", scale=x, offset=2.0, unit=unit)


# --- annular series


@pytest.mark.parametrize("centre", [None, [3.0, 7.25]])
@pytest.mark.parametrize(("inner", "outer", "rings"), [(0, 6.0, 5), (2.0, 5.0, 3), (0, 4.0, 4), (1.5, 9.0, 7)])
def test_rings_are_the_annuli_and_add_up_to_the_disc(
    kernel: SimpleNamespace, centre: list[float] | None, inner: float, outer: float, rings: int
) -> None:
    data = np.random.default_rng(1).integers(0, 9999, (3, 4, 14, 17)).astype(np.uint16)
    at = {"centre": centre} if centre else {}
    width = (outer - inner) / rings
    singles = [
        kernel.spec(
            "virtual_image", f"a{k}", shape="annulus", inner=inner + k * width, outer=inner + (k + 1) * width, **at
        )
        for k in range(rings)
    ]
    disc = kernel.spec("virtual_image", "disc", radius=outer, **at)
    series = kernel.spec(SERIES, "s", inner=inner, outer=outer, rings=rings, **at)
    found = kernel.reduce(data, series, disc, *singles)
    images, pixels = found.arrays["s"]["images"], found.arrays["s"]["pixels"]
    for k in range(rings):
        np.testing.assert_array_equal(images[..., k], found.arrays[f"a{k}"]["image"])
        assert pixels[k] == found.scalars[f"a{k}"]["pixels"]
    if inner == 0:
        np.testing.assert_array_equal(images.sum(axis=-1), found.arrays["disc"]["image"])
    assert found.scalars["s"] == {"empty_rings": 0}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.floats(0, 5),
    st.floats(0.3, 12),
    st.tuples(st.floats(-3, 20), st.floats(-3, 20)),
    st.sampled_from([(1.0, 1.0), (0.1, 0.1), (0.7, 0.3)]),
)
def test_every_pixel_of_the_ring_is_in_exactly_one(
    rings: int, inner: float, width: float, centre: tuple[float, float], size: tuple[float, float]
) -> None:
    known = header(det_axes=detector(*size))
    edges = np.linspace(inner, inner + width, rings + 1)
    labels = geometry.rings(known, centre, edges, "mrad")
    d2 = geometry.distance2(known, centre, "mrad")
    whole = geometry.within(d2, edges[-1])
    if edges[0] > 0:
        whole &= ~geometry.within(d2, edges[0])
    np.testing.assert_array_equal(labels >= 0, whole)
    assert labels.max() < rings


def test_the_radius_of_each_image_is_on_its_axis() -> None:
    outputs = AnnularSeries(rings=4, inner=1.0, outer=3.0, unit="mrad").outputs(header(det_axes=detector(0.5, 0.25)))
    for output in outputs.values():
        (axis,) = output.axes
        positions = [axis.offset + axis.scale * k for k in range(4)]
        assert (axis.name, axis.unit) == ("radius", "mrad")
        assert positions == pytest.approx([1.25, 1.75, 2.25, 2.75])


def test_default_series_reaches_half_of_the_shorter_side_in_the_unit(kernel: SimpleNamespace) -> None:
    """By hand: 12 x 0.5 mrad = 6 mrad high, 8 x 0.9 mrad = 7.2 mrad wide; half of the shorter side is 3 mrad."""
    facts = {"det_axes": detector(0.5, 0.9)}
    data = np.ones((1, 1, 12, 8), np.uint8)
    found = kernel.reduce(data, kernel.spec(SERIES, "s", rings=2, unit="mrad"), **facts)
    y, x = (np.arange(12) - 5.5) * 0.5, (np.arange(8) - 3.5) * 0.9
    distance = np.hypot(y[:, None], x[None, :])
    assert found.arrays["s"]["images"].ravel().tolist() == [
        np.count_nonzero(distance <= 1.5),
        np.count_nonzero((distance > 1.5) & (distance <= 3.0)),
    ]


@pytest.mark.parametrize(("high", "wide", "radius"), [((12, 0.5), (8, 0.9), 1.5), ((12, 0.9), (8, 0.5), 1.0)])
def test_default_radius_measures_each_side_with_its_own_pixels(
    high: tuple[int, float], wide: tuple[int, float], radius: float
) -> None:
    known = header((high[0], wide[0]), det_axes=detector(high[1], wide[1]))
    assert geometry.default_radius(known, "mrad") == radius
    assert geometry.pixel_size(known, "mrad") == (high[1], wide[1])
    y, x = geometry.offsets(known, (1.0, 2.0), "mrad")
    np.testing.assert_allclose(y[:, 0], (np.arange(high[0]) - 1) * high[1])
    np.testing.assert_allclose(x[0], (np.arange(wide[0]) - 2) * wide[1])


def test_offsets_of_the_files_axes_reach_the_outputs(kernel: SimpleNamespace) -> None:
    scan = (
        Axis(name="scan_y", scale=2.0, offset=-7.0, unit="nm"),
        Axis(name="scan_x", scale=3.0, offset=11.0, unit="nm"),
    )
    known = header(det_axes=detector(0.5, 0.25), scan_axes=scan)
    recipe = Recipe(
        name="r",
        orientation=Orientation(transpose=True),
        reductions=(kernel.spec("pattern"), kernel.spec("virtual_image")),
    )
    made = plan.make(recipe, known)
    pattern, image = (s.outputs[o] for s, o in zip(made.steps, ("sum", "image"), strict=True))
    assert plan.output_axes(image, made.header) == scan
    # transposed: the calibrations go along, the names stay where they are
    assert plan.output_axes(pattern, made.header) == (
        Axis(name="qy", scale=0.25, offset=2.0, unit="mrad"),
        Axis(name="qx", scale=0.5, offset=-3.0, unit="mrad"),
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rings": 0}, "1 to 4096"),
        ({"inner": 5.0, "outer": 5.0}, "no rings between"),
        ({"inner": -1.0}, "no rings between"),
        ({"inner": 90.0, "outer": 99.0}, "hold no pixel"),
    ],
)
def test_series_that_cannot_be(kernel: SimpleNamespace, parameters: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kernel.reduce(np.ones((2, 2, 8, 8), np.uint8), kernel.spec(SERIES, "s", **parameters))


# --- sectors


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 3600), min_size=2, max_size=6, unique=True),
    st.floats(-400, 400),
    st.sampled_from([0, 360, -360, 720]),
    st.sampled_from([(1.0, 1.0), (0.7, 0.3)]),
)
def test_sectors_that_meet_share_no_pixel_and_miss_none(
    tenths: list[int], first: float, whole: int, size: tuple[float, float]
) -> None:
    """At any angle: the edges are written in two ways, a whole turn apart."""
    edges = sorted({first + t / 10 for t in tenths})
    if edges[-1] - edges[0] >= 360 - 1e-6:
        edges.pop()
    if len(edges) < 2:
        return
    directed = geometry.directions(header((9, 9), det_axes=detector(*size)), None, "mrad")
    pairs = zip(edges, [*edges[1:], edges[0] + 360], strict=True)
    covered = sum(geometry.sector(directed, a, b + whole).astype(int) for a, b in pairs)
    assert (covered == 1).all()


@pytest.mark.parametrize("angle", [30.0, 60.0, 120.0, 135.0, 150.0, 210.0, 225.0, 240.0, 300.0, 315.0, 330.0, 360.0])
def test_a_pixel_on_an_edge_belongs_to_the_sector_that_begins_there(angle: float) -> None:
    """Pixels of 1 by sqrt(3) lie on rays of 30 and 60 degrees, which float64 meets with an error in the last bits."""
    known = header((9, 9), det_axes=detector(1.0, 3**0.5))
    for centred in (known, header((9, 9), det_axes=detector(3**0.5, 1.0)), header((9, 9), det_axes=detector(1.0, 1.0))):
        directed = geometry.directions(centred, None, "mrad")
        on = np.abs((directed - angle + 180) % 360 - 180) < 1e-6
        on[4, 4] = False
        assert (geometry.sector(directed, angle, angle + 20)[on]).all()
        assert not (geometry.sector(directed, angle - 20, angle)[on]).any()


def test_a_whole_turn_is_the_whole_circle() -> None:
    directed = geometry.directions(header((5, 5)), None, "px")
    assert geometry.sector(directed, 33.3, 393.3).all()
    with pytest.raises(RecipeError, match="no wedge"):
        geometry.sector(directed, 20.0, 20.0)


# --- position-averaged patterns


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "uint64"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_region_of_the_scan(kernel: SimpleNamespace, dtype: str, ranks: int) -> None:
    data = np.random.default_rng(4).integers(0, 99, (6, 7, 5, 4)).astype(dtype)
    spec = kernel.spec(PACBED, "p", region=[1, 2, 5, 4])
    found = kernel.reduce(data, spec, ranks=ranks, block_bytes=5 * 20 * data.itemsize)
    part = data[1:5, 2:4].astype("float64" if dtype == "float32" else object)
    np.testing.assert_array_equal(
        found.arrays["p"]["sum"], part.sum(axis=(0, 1)).astype(found.arrays["p"]["sum"].dtype)
    )
    np.testing.assert_allclose(found.arrays["p"]["mean"], part.sum(axis=(0, 1)).astype(float) / 8, rtol=1e-15)
    assert found.scalars["p"] == {"positions": 8}


def test_without_a_region_it_is_the_pattern(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(4).integers(0, 99, (3, 4, 5, 6)).astype(np.uint16)
    found = kernel.reduce(data, kernel.spec(PACBED, "p"), kernel.spec("pattern"))
    for name in ("sum", "mean"):
        np.testing.assert_array_equal(found.arrays["p"][name], found.arrays["pattern"][name])


def test_positions_from_a_file(kernel: SimpleNamespace, tmp_path: Path) -> None:
    data = np.random.default_rng(5).integers(0, 99, (4, 5, 3, 3)).astype(np.uint16)
    chosen = np.random.default_rng(6).random((4, 5)) < 0.4
    path = tmp_path / "grain.npy"
    np.save(path, chosen)
    found = kernel.reduce(data, kernel.spec(PACBED, "p", file=str(path)), ranks=2, block_bytes=1)
    np.testing.assert_array_equal(found.arrays["p"]["sum"], data[chosen].sum(axis=0))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.scalars["p"] == {"positions": int(chosen.sum()), "file_sha256": digest}


def test_the_whole_scan_as_a_region_is_the_whole_scan(kernel: SimpleNamespace) -> None:
    """One goes through the shared sum, the other through its own."""
    for dtype in ("uint16", "int32", "float32"):
        data = np.random.default_rng(4).integers(0, 999, (3, 4, 5, 6)).astype(dtype)
        specs = kernel.spec(PACBED, "all"), kernel.spec(PACBED, "region", region=[0, 0, 3, 4])
        found = kernel.reduce(data, *specs, ranks=2, block_bytes=1)
        for name in ("sum", "mean"):
            np.testing.assert_array_equal(found.arrays["all"][name], found.arrays["region"][name])
        assert found.scalars["all"] == found.scalars["region"] == {"positions": 12}


@pytest.mark.parametrize("parameters", [{}, {"region": [0, 0, 2, 2]}])
def test_sums_that_could_wrap_are_refused(kernel: SimpleNamespace, parameters: dict) -> None:
    data = np.full((2, 2, 2, 2), 2**63, np.uint64)
    with pytest.raises(RecipeError, match="more than uint64 holds"):
        kernel.reduce(data, kernel.spec(PACBED, "p", **parameters))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"region": [0, 0, 5, 2]}, "not inside the scan"),
        ({"region": [2, 0, 2, 2]}, "not inside the scan"),
        ({"region": [-1, 0, 2, 2]}, "not inside the scan"),
        ({"region": [0, 0, 1, 1], "file": "a.npy"}, "one of them"),
        ({"file": "ints"}, "not bool"),
        ({"file": "none"}, "no position counts"),
        ({"file": "shape"}, r"the mask has \(5, 4\), the scan has \(4, 5\)"),
    ],
)
def test_regions_that_cannot_be(kernel: SimpleNamespace, tmp_path: Path, parameters: dict, message: str) -> None:
    np.save(tmp_path / "ints.npy", np.ones((4, 5), np.uint8))
    np.save(tmp_path / "none.npy", np.zeros((4, 5), bool))
    np.save(tmp_path / "shape.npy", np.ones((5, 4), bool))
    if parameters.get("file") in ("ints", "none", "shape"):
        parameters = {"file": str(tmp_path / f"{parameters['file']}.npy")}
    with pytest.raises(RecipeError, match=message):
        kernel.reduce(np.ones((4, 5, 3, 3), np.uint8), kernel.spec(PACBED, "p", **parameters))


# --- mask files


def test_a_mask_is_known_by_its_bytes(kernel: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    data, digests = np.ones((2, 2, 4, 5), np.uint8), []
    for value in (1, 2):
        np.save(path, np.full((4, 5), value, np.int16))
        found = kernel.reduce(data, kernel.spec("virtual_image", "v", shape="mask", file=str(path)))
        assert found.arrays["v"]["image"][0, 0] == 20 * value  # a file that changed is read again
        digests.append(found.scalars["v"]["file_sha256"])
        assert digests[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digests[0] != digests[1]


def test_a_mask_that_stays_is_read_once(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.ones((4, 5)))
    first = mask_file.read(str(tmp_path / "m.npy"))
    assert mask_file.read(str(tmp_path / "m.npy")) is first
    assert not first.values.flags.writeable


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.npy", "can't be read"), (".", "no file"), ("text.npy", "can't be read"), ("two.npz", "several arrays")],
)
def test_files_that_are_no_masks(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.npy").write_text("not an array")
    np.savez(tmp_path / "two.npz", a=np.ones(2))
    with pytest.raises(RecipeError, match=message):
        mask_file.read(str(tmp_path / name))


def test_objects_and_complex_numbers_are_no_masks(tmp_path: Path) -> None:
    for number, array in enumerate([np.array([{}], object), np.ones((2, 2), complex), np.array(["a"])]):
        np.save(tmp_path / f"{number}.npy", array, allow_pickle=True)
        with pytest.raises(RecipeError, match=r"can't be read|not numbers"):
            mask_file.read(str(tmp_path / f"{number}.npy"))


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.ones((4, 5)))
    data = (tmp_path / "m.npy").read_bytes()
    (tmp_path / "m.npy").write_bytes(data.replace(b"(4, 5), ", b"(9**9,),")[:100] + data[100:])
    (tmp_path / "n.npy").write_bytes(data.replace(b"(4, 5), }  ", b"(40000, 5), }")[: len(data)])
    for name in ("m.npy", "n.npy"):
        with pytest.raises(RecipeError, match="can't be read"):
            mask_file.read(str(tmp_path / name))


# --- results of some frames only


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_means_of_a_partial_result_are_over_the_frames_that_it_has(kernel: SimpleNamespace, dtype: str) -> None:
    """Frames that were not measured are no zeros: neither in a mean, nor a variance, nor a profile."""
    data, done = np.random.default_rng(8).poisson(5, (6, 7, 20, 24)).astype(dtype), 17
    source = kernel.Memory(data, "4d")
    specs = (
        kernel.spec("pattern", "pattern"),
        kernel.spec("radial_profile", "radial", scan=True),
        kernel.spec(PACBED, "all"),
        kernel.spec(PACBED, "some", region=[1, 0, 4, 5]),
        kernel.spec("centre_of_mass", "com"),
    )
    visit = Visit(plan.make(Recipe(name="r", reductions=specs), source.header), source, Ranks())
    visit.add(0, done)
    found = visit.merged()
    visit.close()
    frames = data.reshape(-1, 20, 24)[:done].astype(np.float64)
    alone = kernel.reduce(data.reshape(-1, 20, 24)[:done], *specs[:2])
    assert found is not None
    arrays = {(s, n): a for s, outputs in found.arrays.items() for n, a in outputs.items()}
    assert arrays["radial", "scan_profile"].shape[:2] == (6, 7)
    np.testing.assert_allclose(arrays["pattern", "mean"], frames.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(arrays["pattern", "variance"], frames.var(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(arrays["pattern", "variance"], alone.arrays["pattern"]["variance"])
    np.testing.assert_array_equal(arrays["radial", "profile"], alone.arrays["radial"]["profile"])
    np.testing.assert_allclose(arrays["all", "mean"], frames.mean(axis=0), rtol=1e-12)
    some = data[1:4, :5].reshape(3, 5, 20, 24).astype(np.float64)
    measured = np.concatenate((some[0], some[1, :3]))  # 17 frames are two rows of seven and three more
    np.testing.assert_allclose(arrays["some", "mean"], measured.mean(axis=0), rtol=1e-12)
    assert (found.scalars["all"]["positions"], found.scalars["some"]["positions"]) == (done, 8)
    assert found.scalars["com"]["frames_without_counts"] == 0
