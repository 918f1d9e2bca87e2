"""The self-test: all ways of this machine are tried, and a wrong number or another way than asked for is told."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from mpi_kernels import plan, selftest
from mpi_kernels.contract import Kernel, Method
from mpi_kernels.engine import Reduced, reduce
from mpi_kernels.extension import native
from mpi_kernels.formats.npy import Npy
from mpi_kernels.ranks import Ranks


@pytest.mark.needs_mpi
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_way_gives_the_known_answers(kernels: SimpleNamespace, mpiexec: str, ranks: int) -> None:
    done = kernels.launch(mpiexec, ranks, "-m", "mpi_kernels", "--selftest", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["wrong"]) == (ranks, 0)
    assert len(found["paths"]) == len(list(selftest.ways()))
    used = {way["used"]["kernel"] for way in found["paths"]}
    known = set(native.kernels()) if native is not None else set()
    assert used == {"numpy", "events", *(k for k in get_args(Kernel) if k in known)}


@pytest.fixture
def reduced(tmp_path) -> tuple[selftest.Way, Reduced]:
    way = selftest.Way("<u2", Method(kernel="numpy", reading="source", threads=1), blocks=True)
    scan = selftest.known_scan("<u2")
    np.save(tmp_path / "a.npy", scan.frames(0, scan.count).reshape(*selftest.SCAN, *selftest.DET))
    source = Npy().open(str(tmp_path / "a.npy"))
    found = reduce(plan.make(way.recipe(), source.header), source, Ranks(), method=way.method)
    source.close()
    assert found is not None
    return way, found


def test_one_wrong_number_is_told(reduced: tuple[selftest.Way, Reduced]) -> None:
    way, found = reduced
    assert selftest.compare(way, found) is None
    for name, outputs in found.arrays.items():
        for output, array in outputs.items():
            changed = array.copy()
            changed.flat[changed.size // 2] += 1
            other = found.arrays | {name: outputs | {output: changed}}
            told = selftest.compare(way, replace(found, arrays=other))
            assert told is not None, output
            assert (output if name == "all" else name) in told


def test_another_way_than_asked_for_is_told(reduced: tuple[selftest.Way, Reduced]) -> None:
    way, found = reduced
    assert selftest._other_than(way, found) is None
    asked = replace(way, method=replace(way.method, kernel="avx2", reading="mmap"))
    told = selftest._other_than(asked, found)
    assert told is not None
    assert "avx2" in told
