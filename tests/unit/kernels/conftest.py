"""Sources in memory, ranks as threads, and the engine over both."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_kernels import engine, plan
from mpi_kernels.contract import Axis, Header, Orientation, Recipe, ReductionSpec
from mpi_kernels.ranks import Merge, Ranks, add_pairs

USE = {
    "virtual_image": "mpi_kernels.reductions.virtual_image:VirtualImage",
    "pattern": "mpi_kernels.reductions.pattern:Pattern",
    "centre_of_mass": "mpi_kernels.reductions.centre_of_mass:CentreOfMass",
    "radial_profile": "mpi_kernels.reductions.radial_profile:RadialProfile",
    "image": "mpi_kernels.reductions.image:Image",
}


class Memory:
    """An array as a source: a whole implementation of the protocol."""

    layout = None

    def __init__(self, data: np.ndarray, kind: str, align: int = 1, **facts: Any) -> None:
        self._frames = data.reshape(-1, *data.shape[-2:])
        self.align = align
        self.header = Header(
            format="memory",
            kind=kind,
            scan_shape=data.shape[:-2],
            det_shape=data.shape[-2:],
            dtype=data.dtype.name,
            members=(),
            rule="exact",
            **facts,
        )

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        out[...] = self._frames[start:stop]

    def complete(self) -> None: ...

    def close(self) -> None: ...


class Threads(Ranks):
    """Ranks as threads of one process."""

    def __init__(self, rank: int, size: int, shared: SimpleNamespace) -> None:
        super().__init__()
        self.rank, self.size, self._shared = rank, size, shared

    def _all(self, value: Any) -> list[Any]:
        self._shared.slots[self.rank] = value
        self._shared.barrier.wait()
        found = list(self._shared.slots)
        self._shared.barrier.wait()
        return found

    def broadcast(self, data: bytes | None) -> bytes:
        return self._all(data)[0]

    def reduce(self, array: np.ndarray, how: Merge) -> np.ndarray | None:
        stacked = np.stack(self._all(array))
        merged = {"sum": stacked.sum(axis=0, dtype=array.dtype), "max": stacked.max(axis=0), "min": stacked.min(axis=0)}
        return None if self.rank else merged[how]

    def reduce_pairs(self, pairs: np.ndarray) -> np.ndarray | None:
        merged = functools.reduce(add_pairs, (p.reshape(2, -1) for p in self._all(pairs)))
        return None if self.rank else merged.reshape(pairs.shape)

    def all(self, flag: bool) -> bool:
        return all(self._all(flag))

    def on_node(self) -> int:
        return self.size

    def gather_rows(self, rows: np.ndarray) -> np.ndarray | None:
        joined = np.concatenate(self._all(rows))
        return None if self.rank else joined

    def gather_json(self, value: Any) -> list[Any] | None:
        found = self._all(value)
        return None if self.rank else found


def on_ranks(size: int, run: Callable[[Ranks], Any]) -> list[Any]:
    """What ``run`` returns on each of some ranks."""
    shared = SimpleNamespace(barrier=threading.Barrier(size), slots=[None] * size)

    def one(rank: int) -> Any:
        try:
            return run(Threads(rank, size, shared))
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def spec(use: str, name: str | None = None, **parameters: Any) -> ReductionSpec:
    return ReductionSpec(use=USE.get(use, use), name=name or use, parameters=parameters)


def reduce(
    data: np.ndarray,
    *specs: ReductionSpec,
    kind: str | None = None,
    ranks: int = 1,
    align: int = 1,
    block_bytes: int = 4 << 20,
    orientation: Orientation | None = None,
    scan_shape: tuple[int, ...] | None = None,
    **facts: Any,
) -> engine.Reduced:
    kind = kind or {2: "image", 3: "stack", 4: "4d"}[data.ndim]
    recipe = Recipe(name="test", reductions=specs, orientation=orientation or Orientation(), scan_shape=scan_shape)
    shared = SimpleNamespace(barrier=threading.Barrier(ranks), slots=[None] * ranks)

    def one(rank: int) -> engine.Reduced | None:
        source = Memory(data, kind, align, **facts)
        world = Ranks() if ranks == 1 else Threads(rank, ranks, shared)
        try:
            return engine.reduce(plan.make(recipe, source.header), source, world, block_bytes=block_bytes)
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(one, range(ranks)))
    assert all(f is None for f in found[1:])
    assert found[0] is not None
    return found[0]


def same(first: Mapping[str, Any], second: Mapping[str, Any], *, frames: int, pixels: int) -> None:
    """Integers equal to the bit, floats within the bound that mpi_kernels.fused states (times a few for divisions)."""
    for reduction, outputs in first.items():
        for name, array in outputs.items():
            other = second[reduction][name]
            assert (array.shape, array.dtype) == (other.shape, other.dtype), (reduction, name)
            if array.dtype.kind in "iub":
                np.testing.assert_array_equal(array, other, err_msg=f"{reduction}/{name}")
            else:
                scale = np.nanmax(np.abs(array), initial=0.0)
                bound = 16 * (frames + pixels) * 2.0**-52
                np.testing.assert_allclose(array, other, rtol=bound, atol=bound * scale, err_msg=f"{reduction}/{name}")


@pytest.fixture(scope="session")
def kernel() -> SimpleNamespace:
    """What the tests of the kernels share."""
    return SimpleNamespace(
        reduce=reduce,
        spec=spec,
        same=same,
        Memory=Memory,
        use=USE,
        Axis=Axis,
        Orientation=Orientation,
        on_ranks=on_ranks,
    )
