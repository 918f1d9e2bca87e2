"""Electron counting: planted electrons come back, whatever noise and x-rays lie around them; others read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mpi_kernels import counting, electrons, plan, sampling
from mpi_kernels.contract import Header, Orientation, Recipe
from mpi_kernels.errors import KernelError, RecipeError
from mpi_kernels.protocols import Events, Output, Reduction
from mpi_kernels.ranks import Ranks

USE = "mpi_kernels.reductions.count_electrons:CountElectrons"


def by_hand(frame: np.ndarray, background: float, x_ray: float) -> list[int]:
    """The rule as loops: the pixel is in between, and no neighbour is larger, or equal and earlier."""
    height, width = frame.shape
    found = []
    for y in range(height):
        for x in range(width):
            value = frame[y, x]
            around = [
                (frame[v, u], (v, u) < (y, x))
                for v in range(max(0, y - 1), min(height, y + 2))
                for u in range(max(0, x - 1), min(width, x + 2))
                if (v, u) != (y, x)
            ]
            beaten = any(other > value or (other == value and earlier) for other, earlier in around)
            if background < value < x_ray and not beaten:
                found.append(y * width + x)
    return found


def lists(counts: np.ndarray, pixels: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(pixels, np.cumsum(counts)[:-1])]


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    """Dark level by pixel, Poisson noise, electrons of 60 with a skirt, x-rays of 4000 with a skirt; seeded."""
    rng = np.random.default_rng(11)
    scan, det = (5, 6), (48, 40)
    dark = 100 + 5 * rng.random(det)
    frames = rng.poisson(dark, (*scan, *det)).astype(np.int64)
    truth = []
    for at in np.ndindex(scan):
        cells = rng.permutation(12 * 10)  # one event at most in each cell of 4 x 4, never on its border
        spots = [(4 * (c // 10) + 1, 4 * (c % 10) + 1) for c in cells[:14]]
        for y, x in spots[:10]:
            frames[(*at, slice(y - 1, y + 2), slice(x - 1, x + 2))] += np.array([[5, 20, 5], [20, 170, 20], [5, 20, 5]])
        for y, x in spots[10:]:
            frames[(*at, slice(y - 1, y + 2), slice(x - 1, x + 2))] += np.array(
                [[9, 200, 9], [200, 4000, 200], [9, 200, 9]]
            )
        truth.append(sorted(y * det[1] + x for y, x in spots[:10]))
    return SimpleNamespace(frames=frames.astype(np.uint16), dark=dark, truth=truth, scan=scan, det=det)


@settings(max_examples=150, deadline=None)
@given(
    arrays(
        st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
        elements=st.integers(0, 6),
    ),
    st.integers(-1, 6),
    st.integers(0, 8),
)
def test_the_rule_is_what_it_says(frames: np.ndarray, background: int, x_ray: int) -> None:
    found = lists(*counting.events(frames, background, x_ray))
    assert found == [by_hand(frame, background, x_ray) for frame in frames]


@settings(max_examples=100, deadline=None)
@given(
    arrays(
        st.sampled_from([np.uint8, np.int16, np.uint64, np.float32]),
        st.tuples(st.integers(1, 3), st.just(4), st.just(5)),
        elements=st.integers(0, 6),
    ),
    arrays(np.float64, (4, 5), elements=st.integers(-16, 32).map(lambda n: n / 8)),
    st.integers(-80, 60).map(lambda n: n / 8),
    st.integers(-8, 80).map(lambda n: n / 8),
    st.sampled_from([0, 100, 2**40]),
)
def test_the_rule_with_a_dark_level(
    frames: np.ndarray, dark: np.ndarray, background: float, x_ray: float, pedestal: int
) -> None:
    """At the edge of the comparison, on any pedestal: eighths are exact in float64."""
    if frames.dtype.itemsize == 8:
        frames, dark = frames + np.uint64(pedestal), dark + pedestal
    found = lists(*counting.events(frames, background, x_ray, dark))
    assert found == [by_hand(frame.astype(float) - dark, background, x_ray) for frame in frames]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "uint64", "float32"])
def test_thresholds_beyond_what_the_pixels_can_hold(dtype: str) -> None:
    frames = np.zeros((1, 1, 3), dtype)
    kind = np.dtype(dtype)
    frames[0, 0, 1] = np.iinfo(kind).max if kind.kind in "iu" else 3e38
    for background in (1e30 if kind.kind != "f" else np.inf, np.inf):
        assert counting.events(frames, background, np.inf)[1].tolist() == []
    assert counting.events(frames, -1e30, np.inf)[1].tolist() == [1]
    dark = np.array([[np.nan, 0.0, 0.0]])  # a NaN masks a pixel
    assert counting.events(frames, -1.0, 1e39, dark)[1].tolist() == [1]


def test_neighbours_are_eight_and_equal_ones_count_once() -> None:
    for dy, dx in counting.NEIGHBOURS:
        frame = np.zeros((1, 5, 5), np.uint8)
        frame[0, 2, 2] = frame[0, 2 + dy, 2 + dx] = 9
        counts, pixels = counting.events(frame, 5, 100)
        assert counts.tolist() == [1]
        assert pixels.tolist() == [min(12, 12 + 5 * dy + dx)]
        frame[0, 2 + dy, 2 + dx] = 10
        assert counting.events(frame, 5, 100)[1].tolist() == [12 + 5 * dy + dx]
    apart = np.zeros((1, 5, 5), np.uint8)
    apart[0, 2, 1] = apart[0, 2, 3] = 9
    assert counting.events(apart, 5, 100)[1].tolist() == [11, 13]


def test_the_edge_of_the_frame_is_not_beside_the_opposite_one() -> None:
    frame = np.zeros((1, 4, 5), np.uint8)
    frame[0, 1, 0], frame[0, 1, 4], frame[0, 0, 2], frame[0, 3, 2], frame[0, 0, 4] = 9, 7, 8, 6, 5
    assert counting.events(frame, 4, 100)[1].tolist() == [2, 5, 9, 17]  # (0, 4) is beside (1, 4), which is larger


def test_nan_is_nothing_and_infinity_an_x_ray() -> None:
    frame = np.zeros((1, 3, 5), np.float32)
    frame[0, 1] = [np.nan, 9, np.nan, 8, np.inf]
    assert counting.events(frame, 5, 100)[1].tolist() == [6]


@pytest.mark.parametrize("given", [True, False])
def test_planted_electrons_come_back(
    kernel: SimpleNamespace, planted: SimpleNamespace, tmp_path: Path, given: bool
) -> None:
    np.save(tmp_path / "dark.npy", planted.dark)
    limits = {"background": 60.0, "x_ray": 1000.0} if given else {"x_ray": 1000.0, "background_sigma": 6}
    spec = kernel.spec(USE, "e", dark=str(tmp_path / "dark.npy"), **limits)
    found = kernel.reduce(planted.frames, spec)
    assert lists(found.events["e"].counts, found.events["e"].pixels) == planted.truth
    assert (found.arrays["e"]["electrons"] == 10).all()
    pattern = np.bincount(np.concatenate(planted.truth), minlength=48 * 40).reshape(48, 40)
    np.testing.assert_array_equal(found.arrays["e"]["pattern"], pattern)
    scalars = found.scalars["e"]
    assert scalars["electrons"] == 300
    assert scalars["thresholds"] == ("given" if given else "gaussian")
    assert scalars["dark_sha256"] == hashlib.sha256((tmp_path / "dark.npy").read_bytes()).hexdigest()
    assert 1000 == scalars["x_ray"] > scalars["background"] > 50


def test_events_are_the_same_for_every_split(kernel: SimpleNamespace, planted: SimpleNamespace) -> None:
    whole = kernel.reduce(planted.frames, kernel.spec(USE, "e"))
    assert whole.events["e"].counts.sum() > 0
    for ranks, block_bytes in ((1, 1), (2, 40000), (3, 1), (40, 1)):  # more ranks than frames as well
        other = kernel.reduce(planted.frames, kernel.spec(USE, "e"), ranks=ranks, block_bytes=block_bytes)
        for name in ("counts", "pixels"):
            one, two = getattr(whole.events["e"], name), getattr(other.events["e"], name)
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        assert other.scalars == whole.scalars
        for name, array in whole.arrays["e"].items():
            np.testing.assert_array_equal(array, other.arrays["e"][name])


@pytest.mark.parametrize(("mean", "sigma"), [(0.0, 1.2), (400.3, 7.0), (30000.0, 31.0), (-80.5, 150.0)])
@pytest.mark.parametrize("kind", ["whole", "dark", "float"])
def test_noise_is_found_under_electrons(mean: float, sigma: float, kind: str) -> None:
    """Gaussian noise under 5 % of electrons, whose tail pulls the mean and the deviation of all pixels far up."""
    rng = np.random.default_rng(7)
    values = rng.normal(mean, sigma, (4, 100, 100))
    hit = rng.random(values.shape) < 0.05
    values[hit] += rng.exponential(20 * sigma, values.shape)[hit]
    dark = np.full((100, 100), 0.25) if kind == "dark" else None
    frames = values if kind == "float" else np.rint(values + (0.25 if kind == "dark" else 0)).astype(np.int32)
    found = counting.thresholds(frames, dark, background_sigma=4, x_ray_sigma=10)
    assert found.method == "gaussian"
    assert found.noise_mean == pytest.approx(mean, abs=0.08 * sigma)
    assert found.noise_sigma == pytest.approx(np.hypot(sigma, 0 if kind == "float" else 12**-0.5), rel=0.06)
    assert found.background == pytest.approx(found.noise_mean + 4 * found.noise_sigma)
    less = frames - (0.25 if kind == "dark" else 0)
    assert found.x_ray == pytest.approx(less.mean() + 10 * less.std())
    assert values.std() > 2 * sigma


def test_what_is_no_peak_is_told(kernel: SimpleNamespace) -> None:
    found = kernel.reduce(np.tile(np.float32([3, 3, 3, 9]), (2, 3, 8, 2)), kernel.spec(USE, "e"))
    assert found.scalars["e"]["thresholds"] == "quantiles"
    assert found.scalars["e"]["background"] == 3.0
    nothing = counting.thresholds(np.full((1, 4, 4), np.nan), None, background_sigma=4, x_ray_sigma=10)
    assert (nothing.background, nothing.method) == (np.inf, "quantiles")
    flat = counting.thresholds(np.ones((1, 4, 4)), None, background_sigma=4, x_ray_sigma=10)
    assert (flat.background, flat.noise_sigma, flat.method) == (1.0, 0.0, "quantiles")


def test_frames_without_noise_count_what_is_there(kernel: SimpleNamespace) -> None:
    data = np.zeros((2, 3, 8, 8), np.uint8)
    data[0, 1, 3, 3] = data[1, 2, 0, 7] = 1
    found = kernel.reduce(data, kernel.spec(USE, "e", sample=1, x_ray=100))
    assert found.events["e"].pixels.tolist() == [27, 7]
    assert found.events["e"].counts.tolist() == [0, 1, 0, 0, 0, 1]


def test_the_sample_is_the_first_frames_oriented(kernel: SimpleNamespace) -> None:
    data = np.arange(30 * 6, dtype=np.int32).reshape(5, 6, 2, 3)
    recipe = Recipe(
        name="r",
        reductions=(kernel.spec(f"{__name__}:Sees", "s"),),
        orientation=Orientation(transpose=True, flip_x=True),
    )
    source = kernel.Memory(data, "4d")
    made = sampling.settled(plan.make(recipe, source.header), source, Ranks())
    wanted = data.reshape(30, 2, 3)[:4].swapaxes(1, 2)[:, :, ::-1]
    np.testing.assert_array_equal(made.steps[0].reduction.frames, wanted)


def test_a_sample_is_bounded(kernel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_BYTES", 50)  # two frames of 24 bytes
    source = kernel.Memory(np.zeros((5, 6, 2, 3), np.int32), "4d")
    recipe = Recipe(name="r", reductions=(kernel.spec(f"{__name__}:Sees", "s"),))
    made = sampling.settled(plan.make(recipe, source.header), source, Ranks())
    assert made.steps[0].reduction.frames.shape == (2, 2, 3)


@dataclass(frozen=True)
class Sees(Reduction):
    """Keeps its sample."""

    frames: np.ndarray | None = None

    def outputs(self, header: Header) -> dict[str, Output]:
        return {"it": Output(over="scan")}

    def samples(self, header: Header) -> int:
        return 4

    def settled(self, frames: np.ndarray, header: Header) -> Reduction:
        return Sees(frames)


def write(path: Path, found: Events, det: tuple[int, int], scan: tuple[int, ...]) -> None:
    kind = "4d" if len(scan) == 2 else "stack"
    header = Header(
        format="m",
        kind=kind,
        scan_shape=scan,
        det_shape=det,
        dtype="uint8",
        members=(),
        rule="exact",  # type: ignore[arg-type]
    )
    electrons.write_file(str(path), found, header)


def test_the_file_has_stempys_layout(tmp_path: Path) -> None:
    counts = np.array([2, 0, 1, 3, 0, 1])
    pixels = np.array([0, 34, 5, 7, 8, 9, 11], np.uint32)
    write(tmp_path / "e.h5", Events(0, counts, pixels), (5, 7), (2, 3))
    with h5py.File(tmp_path / "e.h5") as file:
        frames, positions = file["electron_events/frames"], file["electron_events/scan_positions"]
        assert file.attrs["version"] == 3
        assert h5py.check_vlen_dtype(frames.dtype) == np.uint32
        assert [f.tolist() for f in frames[()]] == lists(counts, pixels)
        assert (frames.attrs["Nx"], frames.attrs["Ny"]) == (5, 7)  # stempy's frame shape: rows, columns
        assert (positions.attrs["Nx"], positions.attrs["Ny"]) == (3, 2)  # its scan: width, height
        assert positions[()].tolist() == list(range(6))
        points = file["events/data"]
        assert points.shape == (2, 3)
        assert [(int(p["qx"]), int(p["qy"])) for p in points[1, 0]] == [(1, 0), (1, 1), (1, 2)]
        assert file["events"].attrs["emd_group_type"] == "pointlistarray"
    write(tmp_path / "stack.h5", Events(0, counts, pixels), (5, 7), (6,))
    with h5py.File(tmp_path / "stack.h5") as file:
        assert dict(file["electron_events/scan_positions"].attrs) == {"Nx": 6, "Ny": 1}
    with pytest.raises(FileExistsError):
        write(tmp_path / "e.h5", Events(0, counts, pixels), (5, 7), (2, 3))


def test_events_of_one_length_and_none_at_all(tmp_path: Path) -> None:
    """numpy would make a table of lists of one length."""
    write(tmp_path / "two.h5", Events(0, np.array([2, 2]), np.array([1, 2, 3, 4], np.uint32)), (3, 3), (1, 2))
    write(tmp_path / "none.h5", Events(0, np.zeros(4, np.int64), np.empty(0, np.uint32)), (3, 3), (2, 2))
    with h5py.File(tmp_path / "two.h5") as two, h5py.File(tmp_path / "none.h5") as none:
        assert [f.tolist() for f in two["electron_events/frames"][()]] == [[1, 2], [3, 4]]
        assert [f.size for f in none["electron_events/frames"][()]] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, [1]), (2, [1])], "other frames"),
        ([(0, [1, 1])], "other frames"),
        ([(1, [1, 1])], "other frames"),
        ([], "other frames"),
    ],
)
def test_a_frame_without_events_that_was_never_counted_is_told(parts: list, message: str) -> None:
    made = [Events(s, np.array(c), np.zeros(sum(c), np.uint32)) for s, c in parts]
    with pytest.raises(KernelError, match=message):
        electrons.collected(made, [(0, 3)], [(0, 3)], Ranks(), 3)


def test_fewer_pixels_than_the_counts_say_are_told() -> None:
    made = [Events(0, np.array([1, 2]), np.zeros(2, np.uint32))]
    with pytest.raises(KernelError, match="as many pixels"):
        electrons.collected(made, [(0, 2)], [(0, 2)], Ranks(), 2)


def test_blocks_may_come_in_any_order() -> None:
    parts = [
        Events(5, np.array([1]), np.array([9], np.uint32)),
        Events(3, np.array([0, 2]), np.array([4, 6], np.uint32)),
    ]
    found = electrons.collected(parts, [(3, 6)], [(3, 6)], Ranks(), 7)
    assert found is not None
    assert (found.counts.tolist(), found.pixels.tolist()) == ([0, 0, 0, 0, 2, 1, 0], [4, 6, 9])


def test_ranges_of_several_ranks_come_in_scan_order() -> None:
    parts = [
        Events(0, np.array([1, 0]), np.array([3], np.uint32)),
        Events(4, np.array([2]), np.array([5, 6], np.uint32)),
    ]

    class Two(Ranks):
        """Rank 0, beside one that has seen frames 2 and 3."""

        def gather_rows(self, rows: np.ndarray) -> np.ndarray:
            return np.concatenate([rows, np.array([1, 1] if rows.dtype == np.int64 else [7, 8], rows.dtype)])

    found = electrons.collected(parts, [(0, 2), (4, 5)], [(0, 2), (4, 5), (2, 4)], Two(), 5)
    assert found is not None
    assert (found.counts.tolist(), found.pixels.tolist()) == ([1, 0, 1, 1, 2], [3, 7, 8, 5, 6])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"background": 5.0, "x_ray": 5.0}, "no electron is above"),
        ({"background": float("nan")}, "no number"),
        ({"sample": 0}, "1 to 1000"),
        ({"dark": "absent.npy"}, "can't be read"),
    ],
)
def test_counting_that_cannot_be(kernel: SimpleNamespace, parameters: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kernel.reduce(np.ones((2, 2, 8, 8), np.uint8), kernel.spec(USE, "e", **parameters))


def test_a_dark_reference_that_does_not_fit_is_refused(kernel: SimpleNamespace, tmp_path: Path) -> None:
    np.save(tmp_path / "dark.npy", np.full((8, 8), -np.inf))
    with pytest.raises(RecipeError, match="dark frame holds infinities"):
        kernel.reduce(np.ones((2, 2, 8, 8), np.uint8), kernel.spec(USE, "e", dark=str(tmp_path / "dark.npy")))
    np.save(tmp_path / "dark.npy", np.ones((8, 9)))
    with pytest.raises(RecipeError, match=r"the mask has \(8, 9\), the frames have \(8, 8\)"):
        kernel.reduce(np.ones((2, 2, 8, 8), np.uint8), kernel.spec(USE, "e", dark=str(tmp_path / "dark.npy")))
