"""A card that is a CPU: the kernels' own source, compiled by g++ over cuda_on_cpu.h, behind the interface of a card."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_kernels.contract import Header, Method
from mpi_kernels.fused import Fused
from mpi_kernels.gpu.fused import GpuFused, attempt
from mpi_kernels.gpu.program import KERNEL
from mpi_kernels.method import Choose, Chosen
from mpi_kernels.plan import Plan
from mpi_kernels.protocols import Source
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import key

THREADS = 64
GUARD = 256
"""Bytes on both sides of every array that no kernel may touch."""
MARK = 0xA5
ONE_AT_A_TIME = threading.Lock()  # the contexts of cuda_on_cpu.h are global


class CpuCard:
    """Arrays on it are numpy's, between guards; ``capacity`` is its memory in bytes."""

    name = "a CPU"
    threads = THREADS

    def __init__(
        self, build: Callable[..., ctypes.CDLL], *, capacity: int = 1 << 40, backwards: bool = False, arch: int = 800
    ) -> None:
        self._build, self._capacity, self._backwards, self._arch = build, capacity, backwards, arch
        self._arrays: list[np.ndarray] = []
        self.copied = 0
        self.hosts: set[int] = set()

    def host(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.hosts.add(array.ctypes.data)
        return array

    def full(self, shape: tuple[int, ...], dtype: np.dtype, value: float) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        if sum(a.nbytes - 2 * GUARD for a in self._arrays) + size > self._capacity:
            raise MemoryError("the card is full")
        memory = np.full(size + 2 * GUARD, MARK, np.uint8)
        self._arrays.append(memory)
        array = memory[GUARD : GUARD + size].view(dtype).reshape(shape)
        array[...] = value
        return array

    def constant(self, array: np.ndarray) -> np.ndarray:
        found = self.full(array.shape, array.dtype, 0)
        found[...] = array
        return found

    def build(self, options: tuple[str, ...]) -> ctypes.CDLL:
        return self._build(options, self._arch)

    def upload(self, host: np.ndarray, target: np.ndarray) -> None:
        self.copied += host.nbytes
        target[...] = host

    def launch(self, built: Any, name: str, grid: tuple[int, int], threads: int, args: Sequence[Any]) -> None:
        assert threads == THREADS
        held = [ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in args]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(a) for a in held))
        with ONE_AT_A_TIME:
            failed = built.launch(name.encode(), pointers, *grid, self._backwards)
        assert not failed, f"{name}: threads do not meet"
        for memory in self._arrays:
            assert (memory[:GUARD] == MARK).all(), f"{name} writes before an array"
            assert (memory[-GUARD:] == MARK).all(), f"{name} writes behind an array"

    def clear(self, target: np.ndarray) -> None:
        target[...] = 0

    def download(self, source: np.ndarray, host: np.ndarray) -> None:
        host[...] = source

    def mark(self) -> object:
        return object()

    def wait(self, mark: object) -> None: ...

    def trim(self) -> None:
        self._arrays.clear()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, cxx: str) -> Callable[..., ctypes.CDLL]:
    """Compile kernel.cu for the CPU, each set of options once."""
    folder = tmp_path_factory.mktemp("kernels")
    built: dict[tuple[Any, ...], ctypes.CDLL] = {}

    def make(options: tuple[str, ...], arch: int) -> ctypes.CDLL:
        if (options, arch) not in built:
            library = folder / f"{len(built)}.so"
            flags = ["-O0", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror"]
            flags += ["-Wno-unknown-pragmas", "-Wno-tautological-compare", "-Wno-dangling-pointer", "-Wno-unused"]
            shim = Path(__file__).with_name("cuda_on_cpu.h")
            defined = [*options, f"-D__CUDA_ARCH__={arch}", f'-DKERNEL="{KERNEL}"']
            command = [cxx, *flags, *defined, "-x", "c++", str(shim), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            built[options, arch] = ctypes.CDLL(str(library))
        return built[options, arch]

    return make


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


def on_card(card: Any, data: np.ndarray, *terms: Any, step: int = 7, **how: Any) -> tuple[list[np.ndarray], GpuFused]:
    """What a card makes of frames that come ``step`` at a time."""
    found = GpuFused(terms, header(data), len(data), card, **how)
    for start in range(0, len(data), step):
        found.add(data[start : start + step], start)
    return results(found, len(data), *terms), found


def results(found: GpuFused | Fused, used: int, *terms: Any) -> list[np.ndarray]:
    """What accumulators of one rank hold, term by term."""
    merged = found.merge(Ranks())
    assert merged is not None
    whole = {**merged, **found.rows(used)}
    return [whole[key(t)] for t in terms]


def choosing(card: Any, **how: Any) -> Choose:
    """A card for the engine, with blocks of any size."""

    def choose(plan: Plan, source: Source, ranks: Ranks, rows: int, method: Method) -> Chosen:
        wanted = [t for step in plan.steps for t in step.terms.values()]
        made = attempt(wanted, plan.header, rows, card, "", **how)
        assert isinstance(made, GpuFused), made
        return Chosen(made, source, made, facts={"card": made.method})

    return choose


def on_cpu(data: np.ndarray, *terms: Any) -> tuple[list[np.ndarray], Fused]:
    found = Fused(terms, header(data), len(data))
    found.add(data, 0)
    return results(found, len(data), *terms), found


@pytest.fixture(scope="session")
def gpu(build: Callable[..., ctypes.CDLL]) -> SimpleNamespace:
    """What the tests of the card share."""

    def card(**how: Any) -> CpuCard:
        return CpuCard(build, **how)

    return SimpleNamespace(card=card, on_card=on_card, on_cpu=on_cpu, header=header, results=results, choosing=choosing)
