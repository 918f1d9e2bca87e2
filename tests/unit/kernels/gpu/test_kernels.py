"""The kernels' own source, run on the CPU, against `mpi_kernels.fused` and against sums written another way."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_kernels.errors import KernelError
from mpi_kernels.gpu.card import CardError
from mpi_kernels.gpu.fused import GpuFused
from mpi_kernels.gpu.program import Unsuited, group_frames
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq

INTEGERS = ["uint8", "uint16", "uint32", "int16"]
SHAPES = [(1, 1, 1), (3, 1, 37), (70, 5, 7), (9, 23, 31)]  # 23 * 31 pixels: two tiles of 64 threads


def stack(dtype: str, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    limits = np.iinfo(dtype)
    data = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    data[rng.random(shape) < 0.2] = limits.max
    data[rng.random(shape) < 0.2] = limits.min
    data[:: max(2, shape[0] // 2)] = 0  # empty frames
    return data


def terms(shape: tuple[int, int, int]) -> tuple[object, ...]:
    rng = np.random.default_rng(1)
    det = shape[1:]
    labels = rng.integers(-1, 5, det).astype(np.int32)
    return (
        Sum(),
        SumSq(),
        Max(),
        Moments(),
        Moments(rng.random(det) < 0.5),
        Masks(rng.random((2, *det)) < 0.5),
        Masks(rng.integers(-40000, 40000, (2, *det))),
        Labels(labels, 7),  # two of them without any pixel
    )


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_those_of_the_cpu_to_the_bit(
    gpu: SimpleNamespace, dtype: str, shape: tuple[int, int, int], backwards: bool
) -> None:
    data, wanted = stack(dtype, shape), terms(shape)
    found, card = gpu.on_card(gpu.card(backwards=backwards), data, *wanted)
    expected, cpu = gpu.on_cpu(data, *wanted)
    for term, one, other in zip(wanted, found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), term
        np.testing.assert_array_equal(one, other, err_msg=str(term))
    assert card.quality == cpu.quality
    assert (card.quality.saturated > 0) == (data == np.iinfo(dtype).max).any()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.tuples(st.integers(1, 150), st.integers(1, 9), st.integers(1, 70)),
    st.integers(1, 150),
    st.integers(1, 1 << 16),
)
def test_any_shape_in_any_blocks(
    gpu: SimpleNamespace, dtype: str, shape: tuple[int, int, int], step: int, block_bytes: int
) -> None:
    data, wanted = stack(dtype, shape), (Sum(), Max(), Moments(), Labels(np.indices(shape[1:])[1] % 5, 5))
    found, card = gpu.on_card(gpu.card(), data, *wanted, step=step, block_bytes=block_bytes)
    expected, cpu = gpu.on_cpu(data, *wanted)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert card.quality == cpu.quality


@pytest.mark.parametrize("arch", [700, 800])
def test_narrow_sums_are_exact_on_both_ways_through_a_warp(gpu: SimpleNamespace, arch: int) -> None:
    data = np.full((5, 9, 11), 65535, np.uint16)
    masks = np.ones((1, 9, 11), np.bool_)
    card = gpu.card(arch=arch)
    (sums, moments), _ = gpu.on_card(card, data, Masks(masks), Moments())
    assert sums.tolist() == [[65535 * 99]] * 5
    y, x = np.indices((9, 11))
    assert moments.tolist() == [[65535 * 99, 65535 * int(y.sum()), 65535 * int(x.sum())]] * 5


@pytest.mark.parametrize(("dtype", "weight"), [("uint16", 255), ("uint16", -127), ("int16", 255), ("uint32", 1)])
def test_sums_of_a_warp_at_the_edge_of_32_bits(gpu: SimpleNamespace, dtype: str, weight: int) -> None:
    edge = np.iinfo(dtype).min or np.iinfo(dtype).max
    data = np.full((2, 32, 64), edge, dtype)
    weights = np.full((1, 32, 64), weight, np.int16 if weight < 0 else np.uint8)
    (sums,), card = gpu.on_card(gpu.card(), data, Masks(weights))
    assert ("-DNARROW" in card._program.passes[0].options) == (dtype != "uint32")
    assert sums.tolist() == [[int(edge) * weight * 2048]] * 2


def test_squares_go_beyond_64_bits(gpu: SimpleNamespace) -> None:
    data = np.full((70, 1, 3), 2**32 - 1, np.uint32)
    (squares,), _ = gpu.on_card(gpu.card(), data, SumSq())
    assert (squares[0].astype(object) * 2**32 + squares[1]).tolist() == [[70 * (2**32 - 1) ** 2] * 3]
    assert (squares[1] < 2**32).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_floats_are_within_the_stated_bound(gpu: SimpleNamespace, shape: tuple[int, int, int]) -> None:
    data = stack("float32", shape)
    weights = np.random.default_rng(2).normal(size=(2, *shape[1:]))
    labels = np.random.default_rng(3).integers(0, 2, shape[1:]).astype(np.int32)
    wanted = (Sum(), SumSq(), Max(), Masks(weights), Moments(), Labels(labels, 2))
    (total, squares, top, weighted, moments, rings), card = gpu.on_card(gpu.card(), data, *wanted)
    exact = data.astype(np.longdouble)
    n, pixels = len(data), data[0].size
    assert (np.abs(total - exact.sum(axis=0)) <= n * 2.0**-52 * np.abs(exact).sum(axis=0)).all()
    assert (np.abs(squares - (exact**2).sum(axis=0)) <= 2 * n * 2.0**-52 * (exact**2).sum(axis=0)).all()
    np.testing.assert_array_equal(top, data.max(axis=0))
    y, x = np.indices(shape[1:])
    columns = [(weighted[:, i], weights[i]) for i in range(2)]
    columns += [(moments[:, i], w) for i, w in enumerate((np.ones(shape[1:]), y, x))]
    columns += [(rings[:, i], labels == i) for i in range(2)]
    for sums, weight in columns:
        products = exact * weight
        assert (np.abs(sums - products.sum(axis=(1, 2))) <= pixels * 2.0**-52 * np.abs(products).sum(axis=(1, 2))).all()
    assert card.quality.not_finite == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backwards", [False, True])
def test_squares_about_a_level_keep_the_digits_of_a_pedestal(
    gpu: SimpleNamespace, shape: tuple[int, int, int], backwards: bool
) -> None:
    data = np.random.default_rng(8).normal(1e6, 1.0, shape).astype(np.float32)
    level = np.random.default_rng(9).normal(1e6, 0.3, shape[1:])
    many = Masks(np.ones((11, *shape[1:])))  # two visits, of which one squares
    wanted = (Sum(), SumSq(level), many)
    (total, squares, _), _ = gpu.on_card(gpu.card(backwards=backwards), data, *wanted)
    exact = data.astype(np.longdouble)
    n, want = len(data), ((exact - level) ** 2).sum(axis=0)
    np.testing.assert_allclose(squares, want.astype(float), rtol=2 * (n + 2) * 2.0**-52)
    variance = squares / n - (total / n - level) ** 2
    np.testing.assert_allclose(variance, exact.var(axis=0).astype(float), rtol=1e-8, atol=1e-9)


def test_float_weights_over_integers(gpu: SimpleNamespace) -> None:
    data = stack("uint16", (6, 23, 31))
    weights = np.random.default_rng(2).normal(size=(1, 23, 31))
    mask = weights > 0
    (weighted, counted), _ = gpu.on_card(gpu.card(), data, Masks(weights), Masks(mask))
    products = data * weights.astype(np.longdouble)
    assert weighted.dtype == np.float64
    error = np.abs(weighted[:, 0] - products.sum(axis=(1, 2)))
    assert (error <= weights.size * 2.0**-52 * np.abs(products).sum(axis=(1, 2))).all()
    assert counted[:, 0].tolist() == (data * mask).sum(axis=(1, 2), dtype=np.uint64).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_only_where_it_has_weight(gpu: SimpleNamespace, bad: float) -> None:
    data = stack("float32", (5, 4, 6))
    data[1, 2, 3] = data[3, 0, 0] = bad
    data[4] = 0
    weights = np.random.default_rng(2).normal(size=(2, 4, 6))
    weights[0, 2, 3] = weights[1, 0, 0] = 0
    labels = np.zeros((4, 6), np.int32)
    labels[2, 3] = -1
    mask = np.ones((4, 6), np.bool_)
    mask[0, 0] = False
    wanted = (Sum(), Max(), Masks(weights), Labels(labels, 1), Moments(mask))
    found, card = gpu.on_card(gpu.card(), data, *wanted)
    expected, cpu = gpu.on_cpu(data, *wanted)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    assert card.quality == cpu.quality
    assert (card.quality.not_finite, card.quality.empty_frames) == (2, 1)
    finite = np.isfinite(found[2])
    assert finite.tolist() == [[True, True], [True, False], [True, True], [False, True], [True, True]]


def test_many_masks_take_several_visits(gpu: SimpleNamespace) -> None:
    data = stack("uint8", (5, 6, 7))
    masks = np.random.default_rng(4).random((19, 6, 7)) < 0.5
    weights = np.random.default_rng(4).normal(size=(3, 6, 7))
    wanted = (Masks(weights), Masks(masks), Sum())
    (weighted, counted, total), card = gpu.on_card(gpu.card(), data, *wanted)
    expected, cpu = gpu.on_cpu(data, *wanted)
    np.testing.assert_array_equal(counted, expected[1])
    np.testing.assert_array_equal(total, expected[2])
    np.testing.assert_allclose(weighted, expected[0], rtol=1e-13)
    assert card.quality == cpu.quality


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_neither_blocks_nor_the_order_of_threads_change_a_bit(gpu: SimpleNamespace, dtype: str) -> None:
    data = stack(dtype, (200, 5, 6))
    weights = np.random.default_rng(2).normal(size=(1, 5, 6))
    level = np.full((5, 6), 0.3) if dtype == "float32" else None
    wanted = (Sum(), SumSq(level), Masks(weights), Moments())
    frame = data[0].nbytes
    first, _ = gpu.on_card(gpu.card(), data, *wanted)
    for step, block, backwards in ((200, 64, False), (1, 128, True), (67, 192, False)):
        again, _ = gpu.on_card(gpu.card(backwards=backwards), data, *wanted, step=step, block_bytes=block * frame)
        for one, other in zip(first, again, strict=True):
            assert one.tobytes() == other.tobytes()


def test_what_the_kernels_cannot_do_exactly_is_refused(gpu: SimpleNamespace) -> None:
    data = np.zeros((1, 2, 2), np.uint32)
    with pytest.raises(Unsuited, match="can reach"):
        gpu.on_card(gpu.card(), data, Masks(np.full((1, 2, 2), 2**40)))
    with pytest.raises(Unsuited, match="float64"):
        gpu.on_card(gpu.card(), data.astype(np.float64), Sum())
    with pytest.raises(Unsuited, match="squares about 2 different levels"):
        gpu.on_card(gpu.card(), data.astype(np.float32), SumSq(), SumSq(np.ones((2, 2))))


def test_a_group_of_frames_always_fits_a_buffer() -> None:
    assert [group_frames(n) for n in (1, 1 << 19, (1 << 19) + 1, 1 << 25, 1 << 30)] == [64, 64, 32, 1, 1]


def test_a_card_with_little_memory_gets_smaller_blocks(gpu: SimpleNamespace) -> None:
    data = stack("uint16", (300, 8, 8))
    (roomy,), one = gpu.on_card(gpu.card(), data, Sum())
    (tight,), other = gpu.on_card(gpu.card(capacity=3 * 64 * 128 * 2), data, Sum())
    np.testing.assert_array_equal(roomy, tight)
    assert (one.frames, other.frames) == (320, 64)
    assert "blocks of 64 frames instead of 320: out of memory" in other.method
    with pytest.raises(MemoryError, match="no room for 64 frames"):
        gpu.on_card(gpu.card(capacity=1000), data, Sum())


def test_a_gap_between_frames_is_no_shift(gpu: SimpleNamespace) -> None:
    data = stack("uint8", (10, 2, 3))
    term = Masks(np.ones((1, 2, 3), np.bool_))
    found = GpuFused([term], gpu.header(data), 10, gpu.card())
    found.add(data[6:], 6)
    found.add(data[:6], 0)
    (sums,) = gpu.results(found, 10, term)
    assert sums[:, 0].tolist() == data.sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("cuts", [(70, 71, 200), (64, 128, 200), (1, 3, 150, 150, 200)])
def test_frames_that_come_after_a_merge(gpu: SimpleNamespace, dtype: str, block: int, cuts: tuple[int, ...]) -> None:
    """Groups of 64 frames are cut by some of these; each merge holds what is there so far, and all at once the same."""
    data = stack(dtype, (200, 5, 7))
    wanted = terms(data.shape)
    grown = GpuFused(wanted, gpu.header(data), 200, gpu.card(), block_bytes=block * data[0].nbytes)
    start = 0
    for stop in cuts:
        grown.add(data[start:stop], start)
        expected, cpu = gpu.on_cpu(data[:stop], *wanted)
        for _ in range(2):
            for term, one, other in zip(wanted, gpu.results(grown, stop, *wanted), expected, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=str(term))
            assert grown.quality == cpu.quality
        start = stop


def test_held_frames_and_frames_in_a_buffer(gpu: SimpleNamespace) -> None:
    """Frames that wait for a block to fill are neither lost nor overwritten by those that come in another way."""
    data = stack("uint16", (90, 3, 4))
    wanted, card = terms(data.shape), gpu.card()
    found = GpuFused(wanted, gpu.header(data), 90, card, block_bytes=64 * data[0].nbytes)
    found.add(data[:20], 0)
    buffer = found.buffer()
    buffer[:50] = data[20:70]
    found.add(buffer[:50], 20)
    found.add(data[70:73], 70)
    found.visit(card.constant(data[73:80].reshape(-1)), 7, 73)
    found.add(data[80:], 80)
    expected, cpu = gpu.on_cpu(data, *wanted)
    for one, other in zip(gpu.results(found, 90, *wanted), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found.quality == cpu.quality


def test_errors_of_the_card_are_kernel_errors() -> None:
    assert issubclass(CardError, KernelError)
