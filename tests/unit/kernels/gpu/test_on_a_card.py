"""On a real card: the same bits as on the CPU, less memory than is asked for, and an acquisition that stays there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_kernels import engine, plan
from mpi_kernels.contract import Method, Recipe, ReductionSpec
from mpi_kernels.gpu.card import Card, open_card
from mpi_kernels.gpu.resident import Resident, _Array
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq
from mpi_kernels.ranks import Ranks

pytestmark = pytest.mark.needs_gpu

SHAPES = [(1, 1, 1), (300, 23, 31), (130, 128, 128), (5, 515, 513)]
RECIPE = Recipe(
    name="card",
    reductions=(
        ReductionSpec(use="mpi_kernels.reductions.virtual_image:VirtualImage", name="bf"),
        ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern"),
        ReductionSpec(use="mpi_kernels.reductions.centre_of_mass:CentreOfMass", name="com"),
        ReductionSpec(use="mpi_kernels.reductions.radial_profile:RadialProfile", name="rings"),
    ),
)


@pytest.fixture(scope="module")
def card() -> Card:
    found, why = open_card()
    assert found is not None, why
    return found


def terms(det: tuple[int, ...]) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    masks = rng.random((11, *det)) < 0.5
    labels = rng.integers(-1, 20, det).astype(np.int32)
    return Sum(), SumSq(), Max(), Moments(), Masks(masks), Masks(rng.integers(-99, 99, (2, *det))), Labels(labels, 20)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16"])
def test_integers_are_those_of_the_cpu_to_the_bit(
    gpu: SimpleNamespace, card: Card, dtype: str, shape: tuple[int, int, int]
) -> None:
    limits = np.iinfo(dtype)
    data = np.random.default_rng(0).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    wanted = terms(shape[1:])
    found, on_card = gpu.on_card(card, data, *wanted, block_bytes=1 << 20)
    expected, on_cpu = gpu.on_cpu(data, *wanted)
    for term, one, other in zip(wanted, found, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=str(term))
    assert on_card.quality == on_cpu.quality


@pytest.mark.parametrize("shape", SHAPES)
def test_floats_are_close_and_the_same_every_time(
    gpu: SimpleNamespace, card: Card, shape: tuple[int, int, int]
) -> None:
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    data[0, 0, 0] = np.nan
    masks = np.random.default_rng(1).random((2, *shape[1:])) < 0.5
    masks[0, 0, 0] = False
    wanted = (Sum(), Max(), Masks(masks), SumSq(np.random.default_rng(2).normal(size=shape[1:])))
    found, on_card = gpu.on_card(card, data, *wanted)
    expected, on_cpu = gpu.on_cpu(data, *wanted)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert on_card.quality == on_cpu.quality
    again, _ = gpu.on_card(card, data, *wanted, step=1, block_bytes=1 << 18)
    for one, other in zip(found, again, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_full_card_gets_smaller_blocks(gpu: SimpleNamespace, card: Card) -> None:
    cupy = pytest.importorskip("cupy")
    data = np.random.default_rng(0).integers(0, 9, (4096, 64, 64), np.uint16)
    pool = cupy.get_default_memory_pool()
    card.trim()
    pool.set_limit(size=pool.total_bytes() + (16 << 20))
    try:
        (total,), on_card = gpu.on_card(card, data, Sum(), step=512)
    finally:
        pool.set_limit(size=0)
    assert on_card.frames < 4096
    assert "out of memory" in on_card.method
    np.testing.assert_array_equal(total, data.sum(axis=0))


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 256 << 20])
def test_an_acquisition_stays_on_the_card(card: Card, chunk_bytes: int) -> None:
    data = np.random.default_rng(0).poisson(1.0, (20, 30, 64, 64)).astype(np.uint16)
    held = Resident(data, card=(card, "there"), chunk_bytes=chunk_bytes)
    assert held.held == 600
    source = _Array(data)
    expected = engine.reduce(plan.make(RECIPE, source.header), source, Ranks())
    assert expected is not None
    for _ in range(2):
        found = held.reduce(RECIPE)
        assert found is not None
        for name, outputs in expected.arrays.items():
            for output, array in outputs.items():
                np.testing.assert_allclose(found.arrays[name][output], array, rtol=1e-12)


def test_reading_into_the_buffers(gpu: SimpleNamespace, card: Card) -> None:
    data = np.random.default_rng(0).integers(0, 65535, (500, 32, 32), np.uint16)
    source = _Array(data)
    choosing = gpu.choosing(card, block_bytes=64 * 2048)
    found = engine.reduce(plan.make(RECIPE, source.header), source, Ranks(), choosing=choosing)
    assert found is not None
    assert "blocks of 64 frames" in str(found.method["card"])
    np.testing.assert_array_equal(found.arrays["pattern"]["sum"], data.sum(axis=0))


def test_the_engine_takes_the_card_that_there_is() -> None:
    data = np.random.default_rng(0).normal(1e6, 1.0, (300, 32, 48)).astype(np.float32)
    source = _Array(data)
    found = engine.reduce(plan.make(RECIPE, source.header), source, Ranks(), method=Method(device="gpu"))
    assert found is not None
    assert found.method["device"] == "gpu"
    want = data.astype(np.longdouble).var(axis=0).astype(float)
    np.testing.assert_allclose(found.arrays["pattern"]["variance"], want, rtol=1e-8)
