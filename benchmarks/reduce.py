"""Throughput of a fused recipe, memory of a rank against the file's size, and start-up time.

The limit, a plain numpy sum over the same file, runs in the same rounds, in turn with the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import summary
from mpi_kernels import jsonfile
from mpi_kernels.contract import JobSpec, Recipe, ReductionSpec, SourceSpec

REDUCTIONS = (
    ReductionSpec(use="mpi_kernels.reductions.virtual_image:VirtualImage", name="bf"),
    ReductionSpec(use="mpi_kernels.reductions.virtual_image:VirtualImage", name="adf", parameters={"shape": "annulus"}),
    ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern", parameters={"variance": False}),
    ReductionSpec(use="mpi_kernels.reductions.centre_of_mass:CentreOfMass", name="com"),
)
LIMIT = """
import sys, time, numpy
data = numpy.load(sys.argv[1], mmap_mode="r").reshape(-1, int(sys.argv[2]))
start = time.perf_counter()
total = 0
for at in range(0, len(data), 128):
    total += int(data[at:at + 128].sum(dtype=numpy.uint64))
print(time.perf_counter() - start, total)
"""
CHILD = """
import pathlib, re, runpy, sys
sys.argv = ["mpi_kernels", sys.argv[1]]
try:
    runpy.run_module("mpi_kernels", run_name="__main__")
except SystemExit as end:
    # not ru_maxrss: that one goes on from the process that started this one
    peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
    print(int(peak[1]) * 1024, flush=True)
    raise SystemExit(end.code)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scan", type=int, default=128, help="side of the scan (default %(default)s)")
    parser.add_argument("--det", type=int, default=128, help="side of the detector (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default 1 2)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """Medians over the rounds; every round runs the limit and each number of ranks on a warm file."""
    with tempfile.TemporaryDirectory(prefix="emflow-reduce-", dir=args.work) as name:
        base = Path(name)
        files = {scan: _scan(base, scan, args.det) for scan in (max(1, args.scan // 4), args.scan)}
        path = files[args.scan]
        truth = int(np.load(path, mmap_mode="r").sum(dtype=np.uint64))
        times: dict[str, list[float]] = {"numpy sum": [], "empty job": []}
        memory = {}
        for round_ in range(args.rounds):
            times["numpy sum"].append(_limit(path, args.det, truth))
            times["empty job"].append(_job(base, _scan(base, 1, 8), 1, f"empty-{round_}")["wall"])
            for ranks in args.ranks:
                done = _job(base, path, ranks, f"{ranks}-{round_}", truth)
                times.setdefault(f"whole process, {ranks} ranks", []).append(done["wall"])
                times.setdefault(f"read and reduce, {ranks} ranks", []).append(done["kernel"])
        for file in files.values():
            memory[str(file.stat().st_size)] = _job(base, file, 1, f"memory-{file.name}")["memory"]
        size = path.stat().st_size
    rates = {k: round(size / float(np.median(v)) / 1e9, 3) for k, v in times.items() if k != "empty job"}
    return {
        "file_bytes": size,
        "gigabytes_per_second": rates,
        "seconds": {k: summary(v) for k, v in times.items()},
        "start_up_s": round(float(np.median(times["empty job"])), 3),
        "peak_memory_bytes_by_file_bytes": memory,
    }


def _scan(base: Path, side: int, det: int) -> Path:
    path = base / f"scan-{side}-{det}.npy"
    if not path.exists():
        rng = np.random.default_rng(1)
        out = np.lib.format.open_memmap(path, "w+", np.dtype("<u2"), (side, side, det, det))
        for row in out:
            row[...] = rng.poisson(0.8, row.shape)
        del out
    return path


def _limit(path: Path, det: int, truth: int) -> float:
    command = [sys.executable, "-c", LIMIT, str(path), str(det * det)]
    seconds, total = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if int(total) != truth:
        raise RuntimeError(f"the limit sums to {total}, not {truth}")
    return float(seconds)


def _job(base: Path, source: Path, ranks: int, name: str, truth: int | None = None) -> dict[str, float]:
    folder = base / f"run-{name}"
    folder.mkdir()
    spec = JobSpec(
        job="0123456789abcdef-01",
        acquisition="0123456789abcdef",
        trace="benchmark",
        recipe=Recipe(name="fused", reductions=REDUCTIONS),
        source=SourceSpec(path=str(source), format="mpi_kernels.formats.npy:Npy"),
        ranks=ranks,
    )
    jsonfile.publish(folder / "job.json", jsonfile.encode(spec))
    command = [sys.executable, "-c", CHILD, str(folder)]
    if ranks > 1:
        beside = Path(sys.executable).with_name("mpiexec")
        mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
        if mpiexec is None:
            raise RuntimeError("no mpiexec: pip install mpich, or --ranks 1")
        command = [mpiexec, "-n", str(ranks), *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # a rank is one core
    before = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    wall = time.perf_counter() - before
    manifest = json.loads((folder / "result.json").read_text())
    total = manifest["scalars"]["pattern"]["total"]
    if truth is not None and total != truth:
        raise RuntimeError(f"the kernels sum to {total}, not {truth}")
    kernel = manifest["seconds"]["read"] + manifest["seconds"]["reduce"]
    return {"wall": wall, "kernel": kernel, "memory": max(map(int, done.stdout.split()))}
