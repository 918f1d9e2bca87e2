"""How soon after its last frame a growing acquisition has its result."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._reduce.bench import NPY, Bench
from benchmarks._reduce.pipes import ROOT, Broken, environment
from benchmarks._reduce.processes import command, job
from benchmarks._reduce.recipes import RECIPES
from benchmarks._reduce.rows import Asked, figure
from benchmarks._reduce.sets import Scan, make
from mpi_kernels.contract import Ready

SLICES = 16
LOOK_S = 0.0002


def growing(bench: Bench) -> Iterator[dict[str, Any]]:
    """From the name of the last ready file to that of the result: medians over runs, by ranks."""
    scan = make("A", min(0.25, bench.gigabytes))
    figures: dict[str, float | None] = {}
    why = {}
    steps: dict[str, Any] = {}
    for ranks in (1, 2):
        try:
            runs = [acquire(bench, scan, ranks) for _ in range(bench.rounds)]
        except Broken as error:
            why[f"{ranks} ranks"] = str(error)
            continue
        figures[f"{ranks} rank(s), ms"] = 1e3 * statistics.median(r[0] for r in runs)
        figures[f"{ranks} rank(s), slowest, ms"] = 1e3 * max(r[0] for r in runs)
        steps[f"{ranks} rank(s)"] = runs[-1][1]
    asked = [Asked("1 rank(s), ms", 50, "at most"), Asked("2 rank(s), ms", 50, "at most")]
    facts = {"bytes": scan.nbytes, "slices": SLICES, "steps_s": steps} | ({"why": why} if why else {})
    yield figure("growing: last frame to result", figures, asked, **facts)


def acquire(bench: Bench, scan: Scan, ranks: int) -> tuple[float, dict[str, float]]:
    """Write a scan in slices while it is reduced: seconds from the last one, and the job's own steps."""
    folder = bench.work / "growing"
    folder.mkdir()
    path = folder / "scan.npy"
    pieces = np.array_split(scan.order, SLICES)
    try:
        with path.open("wb", buffering=0) as file:
            header = {"descr": scan.groups.dtype.str, "fortran_order": False, "shape": scan.shape}
            np.lib.format.write_array_header_1_0(file, header)
            run = job(folder / "01", path, NPY, RECIPES["fused"], ranks=ranks, growing=True)
            with subprocess.Popen(command(run, ranks), env=environment(), cwd=ROOT) as process:
                done = 0
                for number, piece in enumerate(pieces, 1):
                    for group in piece:
                        file.write(scan.groups[group].data)
                    done += len(piece) * scan.groups.shape[1]
                    time.sleep(0.05)
                    say(folder, number, done, complete=number == SLICES)
                begin = time.perf_counter()
                while not (run / "result.json").exists():
                    if process.poll() not in (None, 0):
                        raise Broken(f"the job ended with {process.returncode}")
                    time.sleep(LOOK_S)
                seconds = time.perf_counter() - begin
        manifest = json.loads((run / "result.json").read_text())
        total = manifest["scalars"]["pattern"]["total"]
        wanted = sum(int(scan.groups[g].sum(dtype="u8")) for g in scan.order)
        if total != wanted:
            raise RuntimeError(f"the growing acquisition sums to {total}, not {wanted}")
        return seconds, manifest["seconds"]
    finally:
        shutil.rmtree(folder)


def say(folder: Path, number: int, frames: int, *, complete: bool) -> None:
    """Publish a ready file."""
    ready = Ready(frames=frames, complete=complete, digest="0" * 32 if complete else None)
    temporary = folder / ".ready"
    temporary.write_text(json.dumps(asdict(ready)))
    os.replace(temporary, folder / f"ready-{number}.json")  # noqa: PTH105
