"""Rows of rates: the kernels in a warm process, against the limit and the peers, container by container."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._reduce.bench import Bench, File
from benchmarks._reduce.peers import NAMES
from benchmarks._reduce.rows import OURS, Asked, Run, duel, rates, rounded

LIMIT = "map limit"
LIBERTEM = NAMES["libertem"]
Row = dict[str, Any]


def row(
    bench: Bench, file: File, recipe: str, name: str, asked: list[Asked], extra: Mapping[str, Run] | None = None
) -> Row:
    """A duel of the kernels, the limit, LiberTEM and others over one file."""
    contestants: dict[str, Run] = {
        OURS: bench.ours(file, recipe, name),
        **({LIMIT: bench.limit(file)} if file.plain else {}),
        **bench.peers.libertem(file.path, recipe, file.truth),
        **(extra or {}),
    }
    contestants[OURS]()  # once, as the peers were
    return fought(bench, file, name, contestants, asked)


def fought(
    bench: Bench, file: File, name: str, contestants: dict[str, Run], asked: list[Asked], *, warm: bool = True
) -> Row:
    """The rounds of a row, and what they gave; ``warm``: the file is read before each, so that it is cached."""
    bench.passes.pop(name, None)
    watch = next((n for n in (LIMIT, LIBERTEM) if n in contestants), OURS) if asked else ""
    times = duel(contestants, bench.rounds, prepare=lambda: bench.warm(file) if warm else None, watch=watch)
    facts = dict(bench.methods[name])
    if LIMIT in times.wall:
        pairs = zip(times.wall[LIMIT], bench.passes[name], strict=True)
        facts["of_the_limit_without_opening_and_finishing"] = rounded(statistics.median(a / b for a, b in pairs))
    return rates(name, file.scan.nbytes, times, asked, **facts)


def raw(bench: Bench) -> Iterator[Row]:
    """Frames one after the other in a .npy file: three types, all recipes."""
    with bench.file("A") as file:
        yield row(bench, file, "fused", "raw uint16, fused", [Asked(LIBERTEM, 8), Asked(LIMIT, 0.85)])
        yield row(bench, file, "sum", "raw uint16, sum", [])
        yield row(bench, file, "mask", "raw uint16, 1 mask", [])
        stempy = bench.peers.other("stempy", file.path, "masks", file.truth)
        yield row(bench, file, "masks", "raw uint16, 3 masks + total", [], stempy)
        yield row(bench, file, "com", "raw uint16, centre of mass", [])
        yield row(bench, file, "radial", "raw uint16, radial 64", [Asked(LIBERTEM, 5)])
        yield kernels(bench, file)
        yield one_core(bench, file)
    with bench.file("C") as file:
        yield row(bench, file, "fused", "raw float32, fused", [Asked(LIBERTEM, 6)])
        yield row(bench, file, "sum", "raw float32, sum", [Asked(LIBERTEM, 1)])
    with bench.file("D") as file:
        yield row(bench, file, "fused", "raw uint8, fused", [Asked(LIBERTEM, 12)])


def kernels(bench: Bench, file: File) -> Row:
    """AVX2 against AVX-512, where the processor has both."""
    name = "raw uint16, fused, AVX2 alone"
    contestants = {
        OURS: bench.ours(file, "fused", name, kernel="avx2"),
        "AVX-512": bench.ours(file, "fused", kernel="avx512"),
        LIMIT: bench.limit(file),
    }
    return fought(bench, file, name, contestants, [Asked("AVX-512", 0.7)])


def one_core(bench: Bench, file: File) -> Row:
    """One thread against one thread's limit."""
    name = "raw uint16, fused, 1 thread"
    contestants = {OURS: bench.ours(file, "fused", name, threads=1), LIMIT: bench.limit(file, threads=1)}
    return fought(bench, file, name, contestants, [Asked(LIMIT, 0.7)])


def hdf5(bench: Bench) -> Iterator[Row]:
    """HDF5 that is not compressed: contiguous, and in chunks of 1 and 32 frames."""
    for chunk, title in ((0, "contiguous"), (1, "chunk 1"), (32, "chunk 32")):
        with bench.file("A", "hdf5", chunk=chunk) as file:
            yield row(bench, file, "fused", f"HDF5 {title}, fused", [Asked(LIBERTEM, 10)], _h5py(bench, file))


def compressed(bench: Bench) -> Iterator[Row]:
    """Compressed HDF5: bitshuffle-LZ4 of counts and of sparse counts, and gzip."""
    for chunk in (1, 32):
        with bench.file("A", "hdf5", chunk=chunk, codec="bitshuffle-lz4") as file:
            for recipe in ("fused", "masks"):
                title = f"bitshuffle-LZ4 chunk {chunk}, {recipe}"
                yield row(bench, file, recipe, title, [Asked(LIBERTEM, 6)], _h5py(bench, file))
    with bench.file("S", "hdf5", chunk=1, codec="bitshuffle-lz4") as file:
        yield row(bench, file, "fused", "bitshuffle-LZ4 sparse, fused", [Asked(LIBERTEM, 10)], _h5py(bench, file))
        yield row(bench, file, "masks", "bitshuffle-LZ4 sparse, masks", [Asked(LIBERTEM, 14)], _h5py(bench, file))
    with bench.file("A", "hdf5", share=0.25, chunk=1, codec="gzip") as file:
        yield row(bench, file, "fused", "gzip chunk 1, fused", [Asked(LIBERTEM, 1.4)], _h5py(bench, file))


def _h5py(bench: Bench, file: File) -> dict[str, Run]:
    return bench.peers.other("h5py", file.path, "read", file.truth, plugins=True)


def slow_peers(bench: Bench) -> Iterator[Row]:
    """py4DSTEM, on a sixteenth of the frames."""
    if bench.peers.python("py4dstem") is None:
        return
    with bench.file("A", share=1 / 16) as file:
        extra = bench.peers.other("py4dstem", file.path, "fused", file.truth)
        yield row(bench, file, "fused", "raw uint16, fused, small", [], extra)
