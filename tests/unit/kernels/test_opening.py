"""What the ranks read through: the layout that rank 0 has sent, or the file where only its format can undo it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import h5py
import hdf5plugin
import numpy as np
import pytest

from mpi_kernels import feed, method, plan
from mpi_kernels.contract import Method, Recipe
from mpi_kernels.opening import open_source
from mpi_kernels.ranks import Ranks

DATA = np.random.default_rng(3).integers(0, 50, (12, 8, 16)).astype(np.uint16)


@pytest.fixture
def job(tmp_path: Path) -> SimpleNamespace:
    """Of a file in chunks of four frames that the compiled readers decode."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=DATA, chunks=(4, 8, 16), **hdf5plugin.Bitshuffle(cname="lz4"))
    source = SimpleNamespace(path=os.fspath(path), format="mpi_kernels.formats.hdf5:Hdf5")
    return SimpleNamespace(source=source, growing=False, method=Method())


@pytest.mark.needs_native
@pytest.mark.parametrize("most", [feed.MAX_RECORD_BYTES, 100], ids=["fits", "too large"])
def test_every_rank_reads_whether_or_not_the_compiled_readers_can(
    kernel: SimpleNamespace, job: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(feed, "MAX_RECORD_BYTES", most)

    def kind_and_frames(ranks: Ranks) -> tuple[str, np.ndarray]:
        source = open_source(job, ranks)
        out = np.empty_like(DATA)
        source.frames(0, len(DATA), out)
        source.close()
        return type(source).__name__, out

    found = kernel.on_ranks(2, kind_and_frames)
    assert [kind for kind, _ in found] == ["ChunkedSource", "Feed" if most > 100 else "ChunkedSource"]
    for _, frames in found:
        np.testing.assert_array_equal(frames, DATA)


@pytest.mark.needs_native
def test_ranks_that_never_saw_the_file_have_as_many_threads(kernel: SimpleNamespace, job: SimpleNamespace) -> None:
    job.method = Method(threads=3)

    def threads(ranks: Ranks) -> int:
        source = open_source(job, ranks)
        made = plan.make(Recipe(name="r", reductions=(kernel.spec("pattern"),)), source.header)
        chosen = method.choose(made, source, ranks, len(DATA), job.method)
        assert chosen.feed is not None
        assert chosen.feed is not source  # whose threads were fixed when it was made
        found = chosen.feed.threads
        chosen.close()
        source.close()
        return found

    assert kernel.on_ranks(2, threads) == [3, 3]
