"""Time against the size of the file, the number of ranks and that of the reductions: a table, and a plot."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._reduce.bench import NPY, Bench
from benchmarks._reduce.peers import timed
from benchmarks._reduce.pipes import Broken
from benchmarks._reduce.processes import command, job
from benchmarks._reduce.recipes import COM, MASKS, PATTERN, RADIAL
from benchmarks._reduce.rows import figure
from benchmarks._reduce.sets import sparse
from mpi_kernels.contract import Method, ReductionSpec

SIZES_GIB = (1, 2, 4, 8, 16)
RUNS = 2
ORDER = (PATTERN, *MASKS, COM, RADIAL)
"""Reductions are added in this order."""


def growth(bench: Bench, plot: Path | None) -> Iterator[dict[str, Any]]:
    """Whole jobs on zeros: sparse files, whose bytes come from no disk."""
    sizes = (0.02, 0.04) if bench.quick else SIZES_GIB
    by_size: dict[str, dict[float, float]] = {}
    for ranks in (1, 2):
        try:
            by_size[f"{ranks} rank(s)"] = {s: _median(bench, s, ranks, (PATTERN, *MASKS, COM)) for s in sizes}
        except Broken as error:
            by_size[f"{ranks} rank(s), {error}"] = {}
    by_count = {n: _median(bench, sizes[1], 1, ORDER[:n]) for n in range(1, len(ORDER) + 1)}
    figures: dict[str, float | None] = {
        f"{n}, {s:g} GiB, s": t for n, found in by_size.items() for s, t in found.items()
    }
    figures |= {f"{n} reduction(s), {sizes[1]:g} GiB, s": t for n, t in by_count.items()}
    slopes = {n: _slope(found) for n, found in by_size.items() if len(found) > 1}
    if plot is not None:
        draw(plot, by_size, by_count, sizes[1])
    yield figure("growth", figures, [], seconds_per_gib=slopes, files="sparse: zeros without a disk")


def _slope(found: dict[float, float]) -> float:
    return float(f"{np.polyfit(list(found), list(found.values()), 1)[0]:.4g}")


def _median(bench: Bench, gib: float, ranks: int, reductions: Sequence[ReductionSpec]) -> float:
    """Seconds of whole processes on a file of zeros."""
    path = sparse(bench.work / "zeros.npy", gib)
    seconds = []
    try:
        for _ in range(1 if bench.quick else RUNS):
            threads = max(1, bench.threads // ranks) if ranks > 1 else 1
            folder = job(
                bench.work / "zeros" / "01", path, NPY, tuple(reductions), ranks=ranks, method=Method(threads=threads)
            )
            wall, _ = timed(command(folder, ranks))
            total = json.loads((folder / "result.json").read_text())["scalars"]["pattern"]["total"]
            if total:
                raise RuntimeError(f"zeros sum to {total}")
            seconds.append(wall)
            shutil.rmtree(folder.parent)
    finally:
        path.unlink()
    return statistics.median(seconds)


def draw(path: Path, by_size: dict[str, dict[float, float]], by_count: dict[int, float], gib: float) -> None:
    """A picture with both."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, found in by_size.items():
        if found:
            left.plot(list(found), list(found.values()), "o-", label=name)
    left.set(xlabel="file, GiB", ylabel="whole process, s", xlim=(0, None), ylim=(0, None))
    left.legend()
    right.plot(list(by_count), list(by_count.values()), "o-")
    right.set(xlabel=f"reductions of the recipe ({gib:g} GiB, 1 rank)", xlim=(0, None), ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure_.savefig(path, dpi=120)
    plt.close(figure_)
