"""The engine with a card: frames are read where the card takes them, and all ranks have one or none uses it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_kernels import engine, plan
from mpi_kernels.contract import Header, Method, Orientation, Recipe
from mpi_kernels.method import choose
from mpi_kernels.protocols import Block, Output, Reduction
from mpi_kernels.ranks import Ranks

BLOCK = 64 * 96
"""Bytes of 64 frames of uint16."""


class Witness(Reduction):
    """What a reduction of its own is shown on the host."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        return {n: Output(over="scan", dtype="int64") for n in ("corner", "start", "frames")}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        assert not block.frames.flags.writeable
        out["corner"][...] = block.frames[:, 0, -1]
        out["start"][...] = block.start
        out["frames"][...] = len(block.frames)


def recipe(kernel: SimpleNamespace, *, own: bool = True, turn: Orientation | None = None) -> Recipe:
    names = ["virtual_image", "pattern", "centre_of_mass", "radial_profile"] + [f"{__name__}:Witness"] * own
    specs = tuple(kernel.spec(n, n.rpartition(":")[2]) for n in names)
    return Recipe(name="card", reductions=specs, orientation=turn or Orientation())


def straight(kernel: SimpleNamespace, data: np.ndarray, wanted: Recipe) -> engine.Reduced:
    """One read, in numpy."""
    source = kernel.Memory(data, "4d")
    found = engine.reduce(plan.make(wanted, source.header), source, Ranks(), method=Method(kernel="numpy"))
    assert found is not None
    return found


def same(kernel: SimpleNamespace, one: engine.Reduced | None, other: engine.Reduced) -> None:
    """All but what depends on the size of a block."""
    assert one is not None
    assert one.quality == other.quality
    assert one.scalars.keys() == other.scalars.keys()
    for arrays in (one.arrays, other.arrays):
        if "Witness" in arrays:
            arrays["Witness"] = {"corner": arrays["Witness"]["corner"]}
    kernel.same(other.arrays, one.arrays, frames=132, pixels=48)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (11, 12, 6, 8)).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "float32"])
def test_it_reduces_on_a_card(gpu: SimpleNamespace, kernel: SimpleNamespace, data: np.ndarray, dtype: str) -> None:
    typed = data.astype(dtype)
    source, wanted = kernel.Memory(typed, "4d"), recipe(kernel)
    choosing = gpu.choosing(gpu.card(), block_bytes=64 * typed[0, 0].nbytes)
    found = engine.reduce(plan.make(wanted, source.header), source, Ranks(), choosing=choosing)
    assert found is not None
    assert found.method == {"card": "a CPU, blocks of 64 frames"}
    same(kernel, found, straight(kernel, typed, wanted))


def test_frames_are_read_into_the_buffers_of_the_card(
    gpu: SimpleNamespace, kernel: SimpleNamespace, data: np.ndarray
) -> None:
    card, into = gpu.card(), []

    class Noting(kernel.Memory):  # type: ignore[misc, name-defined]
        def frames(self, start: int, stop: int, out: np.ndarray) -> None:
            into.append(out.ctypes.data)
            super().frames(start, stop, out)

    source = Noting(data, "4d")
    visit = engine.Visit(
        plan.make(recipe(kernel), source.header), source, Ranks(), choosing=gpu.choosing(card, block_bytes=BLOCK)
    )
    visit.add(20, 120)
    found = visit.merged()
    assert found is not None
    flat = data.reshape(132, 6, 8)
    assert len(set(into)) == 2
    assert set(into) <= card.hosts
    seen = {k: a.ravel()[20:120] for k, a in found.arrays["Witness"].items()}
    assert list(zip(seen["start"], seen["frames"], strict=True)) == [(20, 64)] * 64 + [(84, 36)] * 36
    np.testing.assert_array_equal(seen["corner"], flat[20:120, 0, -1])
    np.testing.assert_array_equal(found.arrays["pattern"]["sum"], flat[20:120].sum(axis=0))
    assert found.covered.ravel().tolist() == [False] * 20 + [True] * 100 + [False] * 12


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_turned_frames_are_copied_to_the_card(
    gpu: SimpleNamespace, kernel: SimpleNamespace, data: np.ndarray, dtype: str
) -> None:
    typed = data.astype(dtype)
    source, wanted = kernel.Memory(typed, "4d"), recipe(kernel, turn=Orientation(transpose=True, flip_x=True))
    choosing = gpu.choosing(gpu.card(), block_bytes=64 * typed[0, 0].nbytes)
    found = engine.reduce(
        plan.make(wanted, source.header), source, Ranks(), block_bytes=7 * typed[0, 0].nbytes, choosing=choosing
    )
    same(kernel, found, straight(kernel, typed, wanted))


def test_a_visit_that_grows_merges_what_is_there(
    gpu: SimpleNamespace, kernel: SimpleNamespace, data: np.ndarray
) -> None:
    source, wanted = kernel.Memory(data, "4d"), recipe(kernel)
    made = plan.make(wanted, source.header)
    visit = engine.Visit(made, source, Ranks(), choosing=gpu.choosing(gpu.card(), block_bytes=BLOCK))
    for start, stop in ((0, 70), (70, 71), (71, 71), (71, 132)):
        visit.add(start, stop)
        found = visit.merged()
        assert found is not None
        np.testing.assert_array_equal(found.arrays["pattern"]["sum"], data.reshape(132, 6, 8)[:stop].sum(axis=0))
    same(kernel, found, straight(kernel, data, wanted))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("without", [{0}, {1, 2}, set()])
def test_all_ranks_have_a_card_or_none_uses_one(
    gpu: SimpleNamespace, kernel: SimpleNamespace, data: np.ndarray, dtype: str, without: set[int]
) -> None:
    typed = data.astype(dtype)
    wanted = recipe(kernel)

    def one(ranks: Ranks) -> engine.Reduced | None:
        source = kernel.Memory(typed, "4d")

        def opening() -> tuple[Any, str]:
            return (None, "no device here") if ranks.rank in without else (gpu.card(), "device 0")

        return engine.reduce(
            plan.make(wanted, source.header),
            source,
            ranks,
            method=Method(device="gpu"),
            choosing=functools.partial(choose, opening=opening),
        )

    found, *others = kernel.on_ranks(3, one)
    assert others == [None, None]
    assert found.method["device"] == ("cpu" if without else "gpu")
    if without:
        reason = "no device here" if 0 in without else "another rank has no card that can do this"
        assert str(found.method["why"]).startswith(reason)
        assert "card" not in found.method
    else:
        assert found.method["card"] == "a CPU, blocks of 192 frames"
        assert "why" not in found.method
    same(kernel, found, straight(kernel, typed, wanted))
