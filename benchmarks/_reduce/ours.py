"""The kernels in a process that stays alive: ``python -m benchmarks._reduce.ours``, one JSON line for each answer.

A request is ``{"path", "format", "recipe", "method"}``.  What is timed is all that a job does but write: open the file,
plan, read, reduce, merge and finish.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks._reduce.checks import digest
from benchmarks._reduce.recipes import RECIPES
from mpi_kernels import plan
from mpi_kernels.contract import Method, Recipe
from mpi_kernels.engine import Reduced, reduce
from mpi_kernels.plugins import make_format
from mpi_kernels.ranks import Ranks

MASKS = ("bf", "ring", "adf", "all")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Reduce a file."""
    recipe = Recipe(name=request["recipe"], reductions=RECIPES[request["recipe"]][: request.get("most")])
    method = Method(**request.get("method", {}))
    begin, used = time.perf_counter(), time.process_time()
    source = make_format(request["format"]).open(request["path"])
    try:
        planned = plan.make(recipe, source.header)
        opened = time.perf_counter() - begin
        reduced = reduce(planned, source, Ranks(), method=method)
    finally:
        source.close()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    assert reduced is not None
    checks = {name: digest(array) for name, array in outputs(reduced).items()} if request.get("check", True) else {}
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "steps": {"open": opened, **reduced.seconds},
        "method": reduced.method,
        "checks": checks,
    }


def outputs(reduced: Reduced) -> dict[str, np.ndarray]:
    """Arrays of a result by the names that all contestants use."""
    arrays = reduced.arrays
    found: dict[str, np.ndarray] = {}
    if "pattern" in arrays:
        found |= {n: arrays["pattern"][n] for n in ("sum", "max") if n in arrays["pattern"]}
    images = [arrays[n]["image"] for n in MASKS if n in arrays]
    if images:
        found[f"masks {len(images)}"] = np.stack(images, axis=-1)
    if "com" in arrays:
        found["com"] = np.stack([arrays["com"]["y"], arrays["com"]["x"]], axis=-1)
    if "radial" in arrays:
        found["radial"] = arrays["radial"]["scan_profile"]
    return found


def main() -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is not taken for an answer
    for line in sys.stdin:
        try:
            told = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001  the benchmark decides what a failure means
            told = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(told) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
