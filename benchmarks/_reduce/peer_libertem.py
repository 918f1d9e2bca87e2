"""LiberTEM, kept warm: run in its own environment with this checkout as the current folder, one JSON line per answer.

``python -m benchmarks._reduce.peer_libertem EXECUTOR MASKS.npy RINGS.npy [PATH RESULTS]``.  A request is ``{"path",
"kind", "recipe"}``; data sets stay loaded, so that only ``run_udf`` is timed.  With a path and a file for results it
runs once, and ends.  UDFs as in LiberTEM's documentation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks._reduce.checks import digest

EXECUTORS = ("inline", "pipelined", "dask")


def context(executor: str) -> Any:
    """A context on all cores."""
    from libertem import api

    cores = len(os.sched_getaffinity(0))
    if executor == "inline":
        from libertem.executor.inline import InlineJobExecutor

        return api.Context(executor=InlineJobExecutor(inline_threads=cores))
    if executor == "pipelined":
        from libertem.executor.pipelined import PipelinedExecutor

        spec = PipelinedExecutor.make_spec(cpus=range(cores), cudas=[])
        return api.Context(executor=PipelinedExecutor(spec=spec))
    return api.Context.make_with("dask", cpus=cores, gpus=0)


def udfs(recipe: str, masks: np.ndarray, rings: np.ndarray) -> dict[str, Any]:
    """By the name of what they give."""
    from libertem.udf.com import CoMUDF
    from libertem.udf.masks import ApplyMasksUDF
    from libertem.udf.sum import SumUDF

    def some(stack: np.ndarray, **options: Any) -> Any:
        weights = stack.astype(np.float32)
        return ApplyMasksUDF(mask_factories=lambda: weights, mask_count=len(stack), mask_dtype=np.float32, **options)

    match recipe:
        case "sum":
            return {"sum": SumUDF()}
        case "mask":
            return {"masks 1": some(masks[:1])}
        case "masks":
            return {"masks 4": some(masks)}
        case "com":
            return {"com": CoMUDF()}
        case "fused":
            return {"sum": SumUDF(), "max": largest(), "masks 3": some(masks[:3]), "com": CoMUDF()}
        case "radial":
            bins = np.arange(rings.max() + 1)[:, None, None]
            return {"radial": some(rings == bins, use_sparse="scipy.sparse")}
    raise ValueError(f"no recipe {recipe!r}")


def largest() -> Any:
    """The largest value of each pixel; LiberTEM's documentation shows this one."""
    from libertem.udf import UDF

    class MaxUDF(UDF):  # type: ignore[misc]
        def get_result_buffers(self) -> Any:
            return {"max": self.buffer(kind="sig", dtype=self.meta.input_dtype)}

        def process_tile(self, tile: Any) -> None:
            np.maximum(self.results.max, np.max(tile, axis=0), out=self.results.max)

        def merge(self, dest: Any, src: Any) -> None:
            np.maximum(dest.max, src.max, out=dest.max)

    return MaxUDF()


def array(name: str, result: Any, rings: np.ndarray) -> Any:
    """The output as the other contestants give it."""
    if name == "sum":
        return result["intensity"].data
    if name == "max":
        return result["max"].data
    if name == "com":
        return result["raw_com"].data
    found = result["intensity"].data
    return found / np.bincount(rings[rings >= 0]) if name == "radial" else found


class Peer:
    def __init__(self, executor: str, masks: str, rings: str) -> None:
        self.context = context(executor)
        self.masks, self.rings = np.load(masks), np.load(rings)
        self.loaded: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the UDFs of a recipe in one pass."""
        path = request["path"]
        if path not in self.loaded:
            options = {"ds_path": "/data"} if request["kind"] == "hdf5" else {}
            self.loaded = {path: self.context.load(request["kind"], path=path, **options)}
        wanted = udfs(request["recipe"], self.masks, self.rings)
        begin = time.perf_counter()
        results = self.context.run_udf(dataset=self.loaded[path], udf=list(wanted.values()))
        seconds = time.perf_counter() - begin
        named = zip(wanted, results, strict=True)
        checks = {name: digest(array(name, result, self.rings)) for name, result in named}
        return {"seconds": seconds, "checks": checks}


def write(peer: Peer, path: str, out: str) -> None:
    """The fused recipe once, its results in a file: what a whole process takes."""
    wanted = udfs("fused", peer.masks, peer.rings)
    results = peer.context.run_udf(dataset=peer.context.load("npy", path=path), udf=list(wanted.values()))
    named = zip(wanted, results, strict=True)
    arrays = {name.replace(" ", "_"): array(name, result, peer.rings) for name, result in named}
    np.savez(out, **arrays)
    peer.context.close()


def main() -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is not taken for an answer
    peer = Peer(*sys.argv[1:4])
    if len(sys.argv) > 4:
        write(peer, *sys.argv[4:6])
        return
    for line in sys.stdin:
        try:
            told = peer.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001  the benchmark decides what a failure means
            told = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(told) + "\n")
        out.flush()
    peer.context.close()


if __name__ == "__main__":
    main()
