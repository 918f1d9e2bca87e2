"""Upload once, ask again: the same results as one read, and what is on the card is not sent again."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_kernels import engine, plan
from mpi_kernels.contract import Orientation, Recipe, ReductionSpec
from mpi_kernels.errors import RecipeError
from mpi_kernels.gpu.resident import Resident, _Array
from mpi_kernels.protocols import Block, Output, Reduction
from mpi_kernels.ranks import Ranks

BUILT_IN = (
    ReductionSpec(use="mpi_kernels.reductions.virtual_image:VirtualImage", name="bf"),
    ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern"),
    ReductionSpec(use="mpi_kernels.reductions.centre_of_mass:CentreOfMass", name="com"),
    ReductionSpec(use="mpi_kernels.reductions.radial_profile:RadialProfile", name="rings"),
)
OWN = ReductionSpec(use=f"{__name__}:Corner", name="corner")


class Corner(Reduction):
    """In numpy, on the host."""

    def outputs(self, header: Any) -> Mapping[str, Output]:
        return {"pixel": Output(over="scan", dtype="int64")}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        out["pixel"][...] = block.frames[:, 0, -1]


def recipe(*specs: ReductionSpec, **more: Any) -> Recipe:
    return Recipe(name="test", reductions=specs, **more)


def straight(data: np.ndarray, wanted: Recipe) -> engine.Reduced:
    """One read, on the CPU."""
    source = _Array(data)
    found = engine.reduce(plan.make(wanted, source.header), source, Ranks())
    assert found is not None
    return found


def same(one: engine.Reduced | None, other: engine.Reduced) -> None:
    assert one is not None
    assert one.quality == other.quality
    assert one.scalars.keys() == other.scalars.keys()
    for reduction, outputs in other.arrays.items():
        for name, array in outputs.items():
            np.testing.assert_allclose(one.arrays[reduction][name], array, rtol=1e-12, err_msg=f"{reduction}/{name}")
            if array.dtype.kind in "iu":
                np.testing.assert_array_equal(one.arrays[reduction][name], array)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (11, 12, 6, 8)).astype(np.uint16)


def test_frames_in_the_memory_of_the_host(data: np.ndarray) -> None:
    held = Resident(data, card=(None, "asked for"))
    assert held.method == "132 of 132 frames in the memory of the host (asked for)"
    for specs in ((*BUILT_IN, OWN), BUILT_IN[:1]):
        same(held.reduce(recipe(*specs)), straight(data, recipe(*specs)))


def test_frames_on_the_card_are_sent_once(gpu: SimpleNamespace, data: np.ndarray) -> None:
    card = gpu.card()
    held = Resident(data, card=(card, "for the test"), chunk_bytes=64 * 96)
    assert (held.held, card.copied) == (132, data.nbytes)
    assert held.method == "132 of 132 frames on a CPU (for the test)"
    for specs in (BUILT_IN, BUILT_IN[:1], (*BUILT_IN, OWN)):
        same(held.reduce(recipe(*specs)), straight(data, recipe(*specs)))
    assert card.copied == data.nbytes


def test_what_does_not_fit_is_read_again(gpu: SimpleNamespace, data: np.ndarray) -> None:
    chunk = 64 * 96
    card = gpu.card(capacity=2 * chunk + 1000)  # two chunks; the second makes room for the kernels
    held = Resident(data, card=(card, "for the test"), chunk_bytes=chunk)
    assert held.held == 64
    card._capacity = 1 << 20
    same(held.reduce(recipe(*BUILT_IN, OWN)), straight(data, recipe(*BUILT_IN, OWN)))
    assert card.copied == 2 * chunk + (132 - 64) * 96  # 128 at first, of which 64 stayed; then the rest
    assert (held.card, held.method[:9]) == (card, "64 of 132")


def test_a_card_without_room_leaves_the_frames_to_the_host(gpu: SimpleNamespace, data: np.ndarray) -> None:
    held = Resident(data, card=(gpu.card(capacity=10), "for the test"))
    same(held.reduce(recipe(*BUILT_IN)), straight(data, recipe(*BUILT_IN)))


def test_what_the_kernels_do_not_do_is_done_by_the_host(gpu: SimpleNamespace, data: np.ndarray, tmp_path: Any) -> None:
    big = tmp_path / "mask.npy"
    np.save(big, np.full(data.shape[2:], 2**44, np.int64))
    mask = ReductionSpec(
        use="mpi_kernels.reductions.virtual_image:VirtualImage",
        name="big",
        parameters={"shape": "mask", "file": str(big)},
    )
    held = Resident(data, card=(gpu.card(), "for the test"))
    same(held.reduce(recipe(mask)), straight(data, recipe(mask)))
    assert "the last recipe on the CPU: a weighted sum of a frame can reach" in held.method


@pytest.mark.parametrize("there", [True, False])
def test_frames_are_turned_once(gpu: SimpleNamespace, data: np.ndarray, there: bool) -> None:
    turn = Orientation(transpose=True, flip_y=True)
    held = Resident(data, orientation=turn, card=(gpu.card() if there else None, "for the test"))
    wanted = recipe(*BUILT_IN, OWN, orientation=turn)
    same(held.reduce(wanted), straight(data, wanted))
    with pytest.raises(RecipeError, match="turned"):
        held.reduce(recipe(*BUILT_IN))


def test_an_array_of_one_dimension_is_refused() -> None:
    with pytest.raises(RecipeError, match="no image"):
        Resident(np.zeros(3))


def test_every_rank_holds_its_share(gpu: SimpleNamespace, kernel: SimpleNamespace, data: np.ndarray) -> None:
    def one(ranks: Ranks) -> engine.Reduced | None:
        card = gpu.card() if ranks.rank else None
        held = Resident(data, ranks=ranks, card=(card, "there"), chunk_bytes=64 * 96)
        assert (held.held, held.card) == (held.share[1] - held.share[0], card)
        return held.reduce(recipe(*BUILT_IN, OWN))

    first, *others = kernel.on_ranks(3, one)
    assert others == [None, None]
    same(first, straight(data, recipe(*BUILT_IN, OWN)))
