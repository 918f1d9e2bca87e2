"""Every term against a dense oracle in Python's integers or float64, for all splits into blocks and ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_kernels import engine, plan
from mpi_kernels.contract import Header, Orientation, Recipe
from mpi_kernels.errors import KernelError, MissingData, RecipeError
from mpi_kernels.fused import Fused
from mpi_kernels.protocols import Block, Labels, Masks, Max, Moments, Output, Reduction, Sum, SumSq
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import key

INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32"]
FLOATS = ["float16", "float32", "float64"]


def header(data: np.ndarray) -> Header:
    return Header(
        format="memory",
        kind="stack",
        scan_shape=data.shape[:1],
        det_shape=data.shape[1:],
        dtype=data.dtype.name,
        members=(),
        rule="exact",
    )


def fused(data: np.ndarray, *terms: object, step: int = 3) -> list[np.ndarray]:
    found = Fused(terms, header(data), len(data))
    for start in range(0, len(data), step):
        found.add(data[start : start + step], start)
    merged = found.merge(Ranks())
    assert merged is not None
    merged |= found.rows(len(data))
    return [merged[key(t)] for t in terms]


@st.composite
def stacks(draw: st.DrawFn, dtypes: list[str]) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = draw(st.sampled_from([(limits.min, limits.max), (0, 3), (limits.max - 2, limits.max)]))
    return rng.integers(low, high, shape, dtype, endpoint=True)


@settings(max_examples=60, deadline=None)
@given(stacks(INTEGERS), st.integers(1, 7))
def test_integer_terms_are_exact(data: np.ndarray, step: int) -> None:
    rng = np.random.default_rng(1)
    mask = rng.random(data.shape[1:]) < 0.5
    weights = rng.integers(-40000, 40000, (2, *data.shape[1:]))
    labels = rng.integers(-1, 3, data.shape[1:]).astype(np.int32)
    big = data.astype(object)
    total, squares, top, masked, weighted, rings, moments = fused(
        data, Sum(), SumSq(), Max(), Masks(mask[None]), Masks(weights), Labels(labels, 4), Moments(), step=step
    )
    assert total.tolist() == big.sum(axis=0).tolist()
    assert (squares[0].astype(object) * 2**32 + squares[1]).tolist() == (big * big).sum(axis=0).tolist()
    assert (squares[1] < 2**32).all()
    np.testing.assert_array_equal(top, data.max(axis=0))
    assert masked[:, 0].tolist() == [int(sum(f[mask], 0)) for f in big]
    assert weighted.tolist() == [[int((f * w).sum()) for w in weights.astype(object)] for f in big]
    assert rings.tolist() == [[int(sum(f[labels == k], 0)) for k in range(4)] for f in big]
    y, x = (a.astype(object) for a in np.indices(data.shape[1:]))
    assert moments.tolist() == [[int(f.sum()), int((y * f).sum()), int((x * f).sum())] for f in big]


@pytest.mark.parametrize("dtype", ["uint64", "int64"])
def test_values_beyond_float64_are_exact(dtype: str) -> None:
    data = np.array([[[2**60 + 1, 3]], [[2**60 + 3, 5]]], dtype)
    total, masked, moments, rings = fused(
        data, Sum(), Masks(np.array([[[True, True]]])), Moments(), Labels(np.array([[0, 0]], np.int32), 1)
    )
    assert total.tolist() == [[2**61 + 4, 8]]
    assert masked.tolist() == [[2**60 + 4], [2**60 + 8]]
    assert moments.tolist() == [[2**60 + 4, 0, 3], [2**60 + 8, 0, 5]]
    assert rings.tolist() == [[2**60 + 4], [2**60 + 8]]


def test_what_64_bits_cannot_hold_is_refused() -> None:
    full = np.full((2, 1, 1), 2**64 - 1, np.uint64)
    with pytest.raises(RecipeError, match="36893488147419103230"):
        fused(full, Sum())
    with pytest.raises(RecipeError, match="squared"):
        fused(full, SumSq())
    with pytest.raises(RecipeError, match="weighted sum"):
        fused(full, Masks(np.full((1, 1, 1), 2, np.uint8)))
    with pytest.raises(RecipeError, match="region"):
        fused(np.full((1, 1, 2), 2**64 - 1, np.uint64), Labels(np.zeros((1, 2), np.int32), 1))


@settings(max_examples=40, deadline=None)
@given(stacks(FLOATS), st.integers(1, 7))
def test_float_terms_are_within_the_stated_bound(data: np.ndarray, step: int) -> None:
    weights = np.random.default_rng(2).normal(size=(2, *data.shape[1:]))
    total, weighted, moments = fused(data, Sum(), Masks(weights), Moments(), step=step)
    exact = data.astype(np.longdouble)
    n, pixels = len(data), data[0].size
    assert (np.abs(total - exact.sum(axis=0)) <= n * 2.0**-52 * np.abs(exact).sum(axis=0)).all()
    products = exact[:, None] * weights
    error = np.abs(weighted - products.sum(axis=(2, 3)))
    assert (error <= pixels * 2.0**-52 * np.abs(products).sum(axis=(2, 3))).all()
    assert (np.abs(moments[:, 0] - exact.sum(axis=(1, 2))) <= pixels * 2.0**-52 * np.abs(exact).sum(axis=(1, 2))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pixel_of_weight_zero_does_not_count_whatever_its_value(bad: float) -> None:
    data = np.ones((3, 2, 2), np.float32)
    data[1, 0, 0] = bad
    outside, inside = np.array([[[False, True], [True, True]]]), np.array([[[True, True], [True, True]]])
    away, hit, total, top = fused(data, Masks(outside), Masks(inside), Sum(), Max(), step=2)
    assert away.ravel().tolist() == [3, 3, 3]
    assert np.isfinite(hit.ravel()).tolist() == [True, False, True]
    assert np.isfinite(total).tolist() == [[False, True], [True, True]]
    np.testing.assert_array_equal(top[0, 0], np.max([1, bad]))


def test_equal_terms_are_computed_once() -> None:
    data = np.zeros((1, 4, 4), np.uint8)
    mask = np.eye(4, dtype=bool)[None]
    found = Fused([Sum(), Sum(), Masks(mask), Masks(mask.copy()), Moments(), Moments(None), Max()], header(data), 1)
    assert len(found.terms) == 4


def test_large_frames_go_in_tiles() -> None:
    data = np.random.default_rng(3).integers(0, 65535, (2, 700, 800)).astype(np.uint16)  # more than one tile of pixels
    mask = np.random.default_rng(4).random((1, 700, 800)) < 0.3
    total, squares, masked = fused(data, Sum(), SumSq(), Masks(mask))
    np.testing.assert_array_equal(total, data.sum(axis=0, dtype=np.uint64))
    np.testing.assert_array_equal((squares[0] << np.uint64(32)) + squares[1], (data.astype(np.uint64) ** 2).sum(axis=0))
    assert masked.ravel().tolist() == [int(f[mask[0]].sum(dtype=np.uint64)) for f in data]


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(["uint8", "uint16", "int32", "uint32", "float32", "float64", "bool"]),
    ranks=st.integers(1, 4),
    align=st.integers(1, 5),
    frames_per_block=st.integers(1, 9),
)
def test_same_numbers_for_every_split(
    kernel: SimpleNamespace, data: st.DataObject, dtype: str, ranks: int, align: int, frames_per_block: int
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.integers(2, 7)))
    array = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 200, shape).astype(dtype)
    specs = [kernel.spec(n) for n in kernel.use] + [kernel.spec("radial_profile", "rings", scan=True)]
    whole = kernel.reduce(array, *specs)
    block_bytes = frames_per_block * array[0, 0].nbytes
    split = kernel.reduce(array, *specs, ranks=ranks, align=align, block_bytes=block_bytes)
    frames, pixels = shape[0] * shape[1], shape[2] * shape[3]
    kernel.same(whole.arrays, split.arrays, frames=frames, pixels=pixels)
    assert whole.quality == split.quality


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("flip_x", [False, True])
def test_orientation_is_transpose_then_flips(
    kernel: SimpleNamespace, transpose: bool, flip_y: bool, flip_x: bool
) -> None:
    data = np.random.default_rng(5).integers(0, 99, (2, 3, 4, 6)).astype(np.uint16)
    turned = np.swapaxes(data, 2, 3) if transpose else data
    turned = np.flip(turned, [a for a, f in ((2, flip_y), (3, flip_x)) if f])
    specs = kernel.spec("pattern"), kernel.spec("centre_of_mass"), kernel.spec("virtual_image", centre=[1, 2], radius=1)
    how = Orientation(transpose=transpose, flip_y=flip_y, flip_x=flip_x)
    kernel.same(
        kernel.reduce(data, *specs, orientation=how).arrays, kernel.reduce(turned, *specs).arrays, frames=6, pixels=24
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Brightest(Reduction):
    """A reduction of its own: position of the brightest pixel, and limits of each pixel."""

    offset: int = 0

    def outputs(self, header: Header) -> Mapping[str, Output]:
        return {
            "where": Output(over="scan", dtype="int64"),
            "low": Output(over="frame", shape=header.det_shape, dtype=header.dtype, merge="min"),
            "high": Output(over="frame", shape=header.det_shape, dtype=header.dtype, merge="max"),
            "count": Output(over="frame", shape=(), dtype="int64"),
        }

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        with pytest.raises(ValueError, match="read-only"):
            block.frames[...] = 0
        out["where"][...] = block.frames.reshape(len(block.frames), -1).argmax(axis=1) + self.offset
        np.minimum(out["low"], block.frames.min(axis=0), out=out["low"])
        np.maximum(out["high"], block.frames.max(axis=0), out=out["high"])
        out["count"][...] += len(block.frames)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_a_reduction_of_its_own_is_merged_as_it_declares(kernel: SimpleNamespace, dtype: str, ranks: int) -> None:
    data = np.random.default_rng(6).integers(0, 99, (7, 3, 4)).astype(dtype)
    found = kernel.reduce(data, kernel.spec(f"{__name__}:Brightest", "own", offset=1), ranks=ranks, block_bytes=1)
    own = found.arrays["own"]
    np.testing.assert_array_equal(own["where"], data.reshape(7, -1).argmax(axis=1) + 1)
    np.testing.assert_array_equal(own["low"], data.min(axis=0))
    np.testing.assert_array_equal(own["high"], data.max(axis=0))
    assert own["count"] == 7


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace(Reduction):
    """Divides where it stands, as one does in numpy."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        return {"mean": Output(over="frame", shape=header.det_shape), "total": Output(over="scan")}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        out["mean"][...] += block.frames.sum(axis=0)
        out["total"][...] = block.frames.sum(axis=(1, 2))

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, float]]:
        for array in arrays.values():
            np.divide(array, header.frames, out=array)
        return arrays, {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_end_that_writes_in_place_harms_no_later_result(kernel: SimpleNamespace, ranks: int) -> None:
    data = np.random.default_rng(4).integers(0, 99, (8, 3, 4)).astype(np.uint16)

    def twice(which: Ranks) -> engine.Reduced | None:
        source = kernel.Memory(data, "stack")
        recipe = Recipe(name="r", reductions=(kernel.spec(f"{__name__}:InPlace", "own"),))
        visit = engine.Visit(plan.make(recipe, source.header), source, which)
        for start in (0, 4):
            visit.add(*which.share_of(start, start + 4))
            found = visit.merged()
        return found

    found = twice(Ranks()) if ranks == 1 else kernel.on_ranks(ranks, twice)[0]
    own = found.arrays["own"]
    np.testing.assert_array_equal(own["mean"], data.sum(axis=0) / 8)
    np.testing.assert_array_equal(own["total"], data.sum(axis=(1, 2)) / 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Liar(Reduction):
    """Declares another dtype than it returns."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        return {"sum": Output(over="frame", shape=header.det_shape, dtype="int8")}

    def terms(self, header: Header) -> Mapping[str, Sum]:
        return {"sum": Sum()}


def test_a_reduction_is_held_to_what_it_declared(kernel: SimpleNamespace) -> None:
    with pytest.raises(KernelError, match=r"own/sum: declared .*int8"):
        kernel.reduce(np.zeros((2, 3, 4), np.uint8), kernel.spec(f"{__name__}:Liar", "own"))


def test_a_source_that_lacks_a_frame_ends_it(kernel: SimpleNamespace) -> None:
    data = np.zeros((6, 2, 2), np.uint8)

    class Short(kernel.Memory):  # type: ignore[misc, name-defined]
        def frames(self, start: int, stop: int, out: np.ndarray) -> None:
            if stop > 4:
                raise MissingData("ends early", path="x.npy", frame=max(start, 4))
            super().frames(start, stop, out)

    source = Short(data, "stack")
    made = plan.make(Recipe(name="r", reductions=(kernel.spec("pattern"),)), source.header)
    with pytest.raises(MissingData, match=r"x.npy: ends early \(frame 4\)"):
        engine.reduce(made, source, Ranks(), block_bytes=8)


def test_blocks_hold_whole_chunks_where_they_fit() -> None:
    assert engine.block_frames(100, 1, 1000) == 10
    assert engine.block_frames(100, 3, 1000) == 9
    assert engine.block_frames(100, 32, 1000) == 32  # one chunk is more than a block: still read once
    assert engine.block_frames(engine.CHUNK_BYTES, 32, 1000) == 1  # but never without bound
    assert engine.block_frames(10**9, 1, 1000) == 1


@pytest.mark.parametrize(("frames", "align", "size"), [(10, 1, 3), (10, 4, 3), (1, 1, 4), (7, 7, 2), (100, 32, 5)])
def test_shares_cover_all_frames_on_chunk_bounds(frames: int, align: int, size: int) -> None:
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        shares.append(ranks.share(frames, align))
    assert shares[0][0] == 0
    assert shares[-1][1] == frames
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
    assert all(start % align == 0 or start == frames for start, _ in shares)
