"""What every registered reduction must hold to, built in or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from emflow import registry
from mpi_kernels import engine, plan
from mpi_kernels.contract import Header, Recipe, ReductionSpec
from mpi_kernels.errors import RecipeError
from mpi_kernels.plugins import make_reduction
from mpi_kernels.protocols import Reduction
from mpi_kernels.ranks import Ranks

NAMES = registry.names("reductions")
SHAPES: dict[str, tuple[int, ...]] = {"image": (12, 10), "stack": (5, 12, 10), "4d": (2, 3, 12, 10)}
DTYPES = ["uint8", "uint16", "int32", "uint32", "float32", "float64"]


class Memory:
    align, layout = 1, None

    def __init__(self, kind: str, dtype: str) -> None:
        shape = SHAPES[kind]
        self.data = np.random.default_rng(1).integers(0, 100, shape).astype(dtype).reshape(-1, *shape[-2:])
        self.header = Header(
            format="memory",
            kind=kind,  # type: ignore[arg-type]
            scan_shape=shape[:-2],
            det_shape=(shape[-2], shape[-1]),
            dtype=dtype,
            members=(),
            rule="exact",
        )

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        out[...] = self.data[start:stop]

    def complete(self) -> None: ...

    def close(self) -> None: ...


def spec(name: str, **parameters: Any) -> ReductionSpec:
    return ReductionSpec(use=registry.target("reductions", name), name="it", parameters=parameters)


def reduce(name: str, kind: str, dtype: str, block_bytes: int) -> engine.Reduced:
    source = Memory(kind, dtype)
    made = plan.make(Recipe(name="r", reductions=(spec(name),)), source.header)
    found = engine.reduce(made, source, Ranks(), block_bytes=block_bytes)
    assert found is not None
    return found


def cases() -> list[Any]:
    made = {n: make_reduction(spec(n)) for n in NAMES}
    return [pytest.param(n, k, id=f"{n}-{k}") for n, r in made.items() for k in SHAPES if k in r.kinds]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_frozen_dataclass_that_works_with_its_defaults(name: str) -> None:
    made = make_reduction(spec(name))
    assert isinstance(made, Reduction)
    assert dataclasses.is_dataclass(made)
    assert type(made).__dataclass_params__.frozen
    assert type(made).__doc__
    assert made.kinds <= SHAPES.keys()
    assert made.kinds


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_refused_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(RecipeError, match="no_such_parameter") as caught:
        make_reduction(spec(name, no_such_parameter=1))
    for field in dataclasses.fields(make_reduction(spec(name))):  # type: ignore[arg-type]
        assert field.name in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), cases())
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_returns_what_it_declares_for_any_block_size(name: str, kind: str, dtype: str) -> None:
    whole, single = (reduce(name, kind, dtype, size) for size in (1 << 20, 1))
    assert whole.arrays["it"]
    for output, array in whole.arrays["it"].items():
        other = single.arrays["it"][output]
        if array.dtype.kind in "iub":
            np.testing.assert_array_equal(array, other)
        else:
            np.testing.assert_allclose(array, other, rtol=1e-12, atol=1e-9)
    assert whole.events.keys() == single.events.keys()
    for kept, events in whole.events.items():
        np.testing.assert_array_equal(events.counts, single.events[kept].counts)
        np.testing.assert_array_equal(events.pixels, single.events[kept].pixels)
    for value in whole.scalars["it"].values():
        assert value is None or isinstance(value, bool | int | float | str)


@pytest.mark.parametrize(("name", "kind"), cases())
def test_names_of_outputs_can_be_told_apart(name: str, kind: str) -> None:
    """HyperSpy stacks maps whose name begins with another map's name."""
    names = list(make_reduction(spec(name)).outputs(Memory(kind, "uint16").header))
    assert all(plan.NAME.fullmatch(n) for n in names)
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]
    assert "scalars" not in names


@pytest.mark.parametrize(("name", "kind"), cases())
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_bad_pixels_and_empty_frames_are_no_error(name: str, kind: str, bad: float) -> None:
    source = Memory(kind, "float32")
    source.data[0] = bad
    made = plan.make(Recipe(name="r", reductions=(spec(name),)), source.header)
    found = engine.reduce(made, source, Ranks())
    assert found is not None
    if bad:
        assert found.quality.not_finite == source.data[0].size
    else:
        assert found.quality.empty_frames == 1


def test_the_catalogue_has_the_built_in_ones() -> None:
    assert {"centre_of_mass", "image", "pattern", "radial_profile", "virtual_image"} <= set(NAMES)
