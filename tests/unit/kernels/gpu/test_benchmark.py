"""The benchmark of the card computes what it times; no figure is asserted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu as benchmark
from mpi_kernels.gpu.fused import GpuFused


def test_without_a_card_it_says_why() -> None:
    found = benchmark.figures(rounds=0) if benchmark.open_card()[0] is None else {"device": None, "why": "there is one"}
    assert found["device"] is None
    assert found["why"]


def test_what_is_timed_is_right(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHUNK_BYTES", 64 * 128 * 2)
    frames = np.random.default_rng(0).poisson(0.8, (64, 8, 8)).astype(np.uint16)
    terms = benchmark.recipes(8)["fused"]
    run, size = benchmark.streaming(gpu.card(), frames, terms, blocks=4)
    run()
    assert size == 4 * frames.nbytes
    run, size = benchmark.residing(gpu.card(), frames, terms, 70000)
    run()
    assert size == 4 * 2 * frames.nbytes


def test_a_wrong_sum_is_an_error(gpu: SimpleNamespace) -> None:
    frames = np.ones((64, 4, 4), np.uint16)
    terms = benchmark.recipes(4)["sum"]
    fused = GpuFused(terms, gpu.header(frames), 64, gpu.card())
    fused.add(frames, 0)
    with pytest.raises(RuntimeError, match="differ"):
        benchmark._check(fused, frames, 2, terms)
