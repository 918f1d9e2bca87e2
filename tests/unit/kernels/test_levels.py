"""Squares about a level through the engine: by every kernel, on any number of ranks, however the detector is turned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from mpi_kernels import engine, plan
from mpi_kernels.compiled import Compiled, NotCompiled
from mpi_kernels.contract import Header, Kernel, Method, Orientation, Recipe, ReductionSpec
from mpi_kernels.extension import native
from mpi_kernels.fused import Fused
from mpi_kernels.protocols import Output, Reduction, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import key

KERNELS = ["numpy", *(k for k in get_args(Kernel) if native is not None and k in native.kernels())]
TURNS = [Orientation(transpose=t, flip_y=y, flip_x=x) for t, y, x in itertools.product((False, True), repeat=3)]


@dataclass(frozen=True, slots=True, kw_only=True)
class About(Reduction):
    """Squares about a level that differs from pixel to pixel of the turned frame."""

    shift: float = 0.0

    def outputs(self, header: Header) -> Mapping[str, Output]:
        return {"it": Output(over="frame", shape=header.det_shape)}

    def terms(self, header: Header) -> Mapping[str, Term]:
        return {"it": SumSq(slope(header.det_shape) + self.shift)}


def slope(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(shape[0] * shape[1], dtype=np.float64).reshape(shape) / 7


def turned(data: np.ndarray, how: Orientation) -> np.ndarray:
    data = np.swapaxes(data, -1, -2) if how.transpose else data
    return np.flip(data, [a for a, f in ((-2, how.flip_y), (-1, how.flip_x)) if f])


def reduced(
    kernel: SimpleNamespace, data: np.ndarray, recipe: Recipe, method: Method, ranks: int = 1
) -> engine.Reduced:
    def one(world: Ranks) -> engine.Reduced | None:
        source = kernel.Memory(data, "stack")
        return engine.reduce(plan.make(recipe, source.header), source, world, method=method, block_bytes=1000)

    found = kernel.on_ranks(ranks, one)[0]
    assert found is not None
    assert found.method["kernel"] == method.kernel
    return found


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("how", TURNS, ids=str)
def test_the_level_lies_on_the_turned_frame(
    kernel: SimpleNamespace, how: Orientation, name: Kernel, ranks: int
) -> None:
    data = np.random.default_rng(5).normal(3.0, 2.0, (150, 5, 9)).astype(np.float32)
    specs = (kernel.spec(f"{__name__}:About", "about"),)
    wanted = Recipe(name="r", reductions=specs, orientation=how)
    found = reduced(kernel, data, wanted, Method(kernel=name, threads=2), ranks)
    frames = turned(data, how).astype(np.longdouble)
    want = np.square(frames - slope(frames.shape[1:])).sum(axis=0).astype(float)
    np.testing.assert_allclose(found.arrays["about"]["it"], want, rtol=160 * 2.0**-52)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("how", [TURNS[0], TURNS[5]], ids=str)
def test_a_pedestal_does_not_cost_the_variance(
    kernel: SimpleNamespace, how: Orientation, name: Kernel, ranks: int
) -> None:
    data = np.random.default_rng(8).normal(1e6, 1.0, (300, 5, 9)).astype(np.float32)
    wanted = Recipe(name="r", reductions=(kernel.spec("pattern"),), orientation=how)
    found = reduced(kernel, data, wanted, Method(kernel=name, threads=2), ranks).arrays["pattern"]
    frames = turned(data, how).astype(np.longdouble)
    np.testing.assert_allclose(found["variance"], frames.var(axis=0).astype(float), rtol=1e-8)
    np.testing.assert_allclose(found["mean"], frames.mean(axis=0).astype(float), rtol=1e-14)


@pytest.mark.needs_native
def test_two_levels_are_done_in_numpy_and_it_is_said(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(5).normal(3.0, 2.0, (20, 5, 9)).astype(np.float32)
    use = f"{__name__}:About"
    specs = (ReductionSpec(use=use, name="a"), ReductionSpec(use=use, name="b", parameters={"shift": 1.0}))
    source = kernel.Memory(data, "stack")
    recipe = Recipe(name="r", reductions=specs)
    found = engine.reduce(plan.make(recipe, source.header), source, Ranks())
    assert found is not None
    assert found.method["kernel"] == "numpy"
    assert "squares about 2 different levels" in str(found.method["why"])
    for name, shift in (("a", 0.0), ("b", 1.0)):
        want = np.square(data - slope((5, 9)) - shift).sum(axis=0)
        np.testing.assert_allclose(found.arrays[name]["it"], want, rtol=1e-13)


@pytest.mark.needs_native
def test_equal_levels_are_one(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(5).normal(3.0, 2.0, (20, 5, 9)).astype(np.float32)
    header = kernel.Memory(data, "stack").header
    level = slope((5, 9))
    compiled = Compiled([SumSq(level), SumSq(level.copy())], header, 20, orientation=Orientation())
    numpy = Fused([SumSq(level)], header, 20)
    for terms in (compiled, numpy):
        terms.add(data, 0)
    found, want = compiled.merge(Ranks()), numpy.merge(Ranks())
    assert found is not None
    assert want is not None
    term = key(SumSq(level))
    assert list(found) == [term]
    np.testing.assert_allclose(found[term], want[term], rtol=1e-13)
    with pytest.raises(NotCompiled, match="2 different levels"):
        Compiled([SumSq(level), SumSq()], header, 20, orientation=Orientation())
