"""``python -m mpi_kernels --selftest``: known frames on every path that this machine has, against known answers.

No path is compared with another one: the answers come from how the frames were made (`mpi_kernels.exact`).
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from mpi_kernels import plan
from mpi_kernels.compiled import PIXELS
from mpi_kernels.contract import Header, Kernel, Method, Orientation, Reading, Recipe, ReductionSpec
from mpi_kernels.engine import Reduced, reduce
from mpi_kernels.errors import KernelError
from mpi_kernels.exact import ExactScan, disc
from mpi_kernels.exact_files import HEAD_BYTES, DeflatedFrames, EventFrames, header_of, layout_of, records
from mpi_kernels.extension import native
from mpi_kernels.feed import Feed
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Codec
from mpi_kernels.protocols import Block, Labels, Masks, Max, Moments, Output, Reduction, Source, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.weights import sum_dtype

SCAN, DET = (7, 9), (21, 18)
"""Neither square nor a multiple of anything that kernels work in."""

COMPRESSED = ("|u1", "<u2", ">u2", "<u4", "<f4")
EVENTS, GZIP = "events", "gzip"
STORED = ("|u1", "<u2", ">u2", "<i2", "<u4", ">u4", "<f4", ">f4", "<f8", "<i4")
QUADRANTS = np.add.outer(2 * (np.arange(DET[0]) >= 8), np.arange(DET[1]) >= 11).astype(np.int32)
DISC = disc(DET, (9.0, 8.0), 6.0)
WEIGHTS = np.random.default_rng(1).integers(-90, 90, (2, *DET)).astype(np.int16)


class Everything(Reduction):
    """All terms as they are."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """One output for each term."""
        dtype = np.dtype(header.dtype)
        whole, signed = sum_dtype(dtype).name, sum_dtype(dtype, WEIGHTS.dtype).name
        squares = Output(over="frame", shape=(2, *DET), dtype="uint64")
        return {
            "sum": Output(over="frame", shape=DET, dtype=whole),
            "squares": squares if dtype.kind in "iu" else Output(over="frame", shape=DET),
            "max": Output(over="frame", shape=DET, dtype=header.dtype),
            "disc": Output(over="scan", shape=(1,), dtype=whole),
            "weighted": Output(over="scan", shape=(2,), dtype=signed),
            "quadrants": Output(over="scan", shape=(4,), dtype=whole),
            "moments": Output(over="scan", shape=(3,), dtype=whole),
        }

    def terms(self, header: Header) -> Mapping[str, Term]:  # noqa: ARG002
        """One of each kind."""
        return {
            "sum": Sum(),
            "squares": SumSq(),
            "max": Max(),
            "disc": Masks(DISC[None]),
            "weighted": Masks(WEIGHTS),
            "quadrants": Labels(QUADRANTS, 4),
            "moments": Moments(),
        }


class Brightest(Reduction):
    """The largest pixel of each frame, in plain numpy: with it Python sees every block."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """One value for each frame."""
        return {"value": Output(over="scan", dtype=header.dtype)}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        """Look at the block's own frames."""
        out["value"][...] = block.frames.max(axis=(1, 2))


TURNED = Orientation(flip_y=True, flip_x=True)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute: what is stored, how it is reduced, and whether Python sees blocks of turned frames."""

    stored: str
    method: Method
    blocks: bool
    codec: str = ""
    """Of `Layout`, or "gzip", or "events" for counted data."""

    def __str__(self) -> str:
        m = self.method
        how = "blocks of turned frames" if self.blocks else "whole"
        stored = f"{self.stored} {self.codec}".strip()
        return f"{stored} {m.device} {m.kernel} {m.reading} {m.threads} threads, {how}"

    def recipe(self) -> Recipe:
        """All terms; in blocks, a reduction of its own as well."""
        reductions = [ReductionSpec(use="mpi_kernels.selftest:Everything", name="all")]
        if self.blocks:
            reductions.append(ReductionSpec(use="mpi_kernels.selftest:Brightest", name="brightest"))
        return Recipe(
            name="selftest",
            reductions=tuple(reductions),
            orientation=TURNED if self.blocks else Orientation(),
        )


@dataclass(frozen=True, slots=True)
class Checked:
    """A way, what it took, and what was wrong; None if nothing was."""

    path: str
    seconds: float
    wrong: str | None
    used: dict[str, str | int]


def ways() -> Iterator[Way]:
    """Every way that this machine has."""
    kernels: list[Kernel] = ["numpy"]
    readings: list[Reading] = ["source"]
    if native is not None:
        kernels += [k for k in get_args(Kernel) if k in native.kernels()]
        readings += ["mmap", "read", "direct"]
    for stored, kernel, reading, threads in itertools.product(STORED, kernels, readings, (1, 2)):
        if kernel == "numpy" or np.dtype(stored).name in PIXELS:
            yield Way(stored, Method(kernel=kernel, reading=reading, threads=threads), blocks=threads == 1)
    codecs = ("bitshuffle-lz4", "lz4", GZIP) if native is not None else (GZIP,)
    for stored, codec, kernel in itertools.product(COMPRESSED, codecs, kernels):
        undone: tuple[Reading, ...] = ("source",) if codec == GZIP else ("read", "direct")
        for reading in undone:
            method = Method(kernel=kernel, reading=reading, threads=1 + (reading == "direct"))
            yield Way(stored, method, blocks=reading == "source", codec=codec)
    for stored in ("|u1", "<u2", "<u4"):
        for blocks in (False, True):
            yield Way(stored, Method(kernel="numpy", reading="source", threads=1), blocks=blocks, codec=EVENTS)


def run(ranks: Ranks) -> list[Checked]:
    """Try all ways; every rank calls it, and rank 0 gets what was found."""
    with tempfile.TemporaryDirectory(prefix="emflow-selftest-") as name:
        folder = ranks.broadcast(name.encode() if ranks.rank == 0 else None).decode()
        files: dict[tuple[str, str], str] = {}
        for way in ways():
            if (way.stored, way.codec) not in files:
                files[way.stored, way.codec] = path = f"{folder}/{len(files)}"
                if ranks.rank == 0:
                    Path(path).write_bytes(known_bytes(way))
        ranks.broadcast(b"" if ranks.rank == 0 else None)  # the files are there
        found = [_try(way, files[way.stored, way.codec], ranks) for way in ways()]
        ranks.broadcast(b"" if ranks.rank == 0 else None)  # nobody reads them any more
    return [checked for checked in found if checked is not None]


def known_scan(stored: str) -> ExactScan:
    """The scan that is reduced, in the pixels of a file."""
    return ExactScan(SCAN, DET, np.dtype(stored).newbyteorder("=").name, seed=2, empty_every=11)


def _in_file(way: Way) -> Codec:
    return way.codec if way.codec in ("bitshuffle-lz4", "lz4") else ""  # type: ignore[return-value]


@functools.cache
def _records(stored: str, codec: Codec) -> list[bytes]:
    return records(known_scan(stored), stored, codec)


def open_known(way: Way, path: str) -> Source:
    """The source of a way whose frames lie in a file that was written from `known_bytes`."""
    scan, codec = known_scan(way.stored), _in_file(way)
    if way.codec == GZIP:
        return DeflatedFrames(scan, way.stored)
    layout = layout_of(_records(way.stored, codec), path, scan, way.stored, codec)
    if way.codec == EVENTS:
        return EventFrames(scan, layout)
    return Feed(header_of(scan), layout, reading="read") if codec else LayoutSource(header_of(scan), layout)


def known_bytes(way: Way) -> bytes:
    """What the file of a way holds."""
    return bytes(HEAD_BYTES) + b"".join(_records(way.stored, _in_file(way)))


def _try(way: Way, path: str, ranks: Ranks) -> Checked | None:
    before = time.perf_counter()
    reduced: Reduced | None = None
    wrong: str | None = None
    try:
        source = open_known(way, path)
        try:
            planned = plan.make(way.recipe(), source.header)
            reduced = reduce(planned, source, ranks, method=way.method, block_bytes=4096)
        finally:
            source.close()
    except KernelError as error:
        if ranks.size > 1:  # the others are in the middle of something
            raise
        wrong = str(error)
    if ranks.rank:
        return None
    if reduced is not None:
        wrong = _other_than(way, reduced) or compare(way, reduced)
    used = reduced.method if reduced is not None else {}
    return Checked(str(way), round(time.perf_counter() - before, 6), wrong, used)


def _other_than(way: Way, reduced: Reduced) -> str | None:
    """What was used instead of what was asked for: a silent way back to numpy would give the right numbers."""
    kernel = EVENTS if way.codec == EVENTS and not way.blocks else way.method.kernel
    asked = {"kernel": kernel, "reading": way.method.reading}
    used = {name: reduced.method[name] for name in asked}
    return None if used == asked else f"{used} instead of {asked}: {reduced.method.get('why', '')}"


def compare(way: Way, reduced: Reduced) -> str | None:
    """What differs from the answers, in plain words.  All sums are small enough to be exact in float64 too."""
    found = reduced.arrays["all"]
    squares = found["squares"]
    got = found | {"squares": squares[0] * 2**32 + squares[1] if squares.dtype.kind == "u" else squares}
    if way.blocks:
        got |= {"brightest": reduced.arrays["brightest"]["value"]}
    for name, want in _answers(np.dtype(way.stored).name, turned=way.blocks).items():
        if name in got and not np.array_equal(got[name].reshape(want.shape), want):
            return f"{name} is {got[name].ravel()[:3]} ... instead of {want.ravel()[:3]} ..."
    empty = int((known_scan(way.stored).gains() == 0).sum())
    if reduced.quality.empty_frames != empty:
        return f"{reduced.quality.empty_frames} frames are empty instead of {empty}"
    return None


@functools.cache
def _answers(dtype: str, *, turned: bool) -> dict[str, np.ndarray]:
    """What every term must give, made without adding up frames where that can be."""
    scan = known_scan(dtype)
    frames = scan.frames(0, scan.count).astype(np.int64)
    y, x = np.indices(DET)

    def seen(weights: np.ndarray) -> np.ndarray:
        """Sums over weights that lie on the turned frame."""
        return scan.virtual(weights[::-1, ::-1] if turned else weights)

    def shown(image: np.ndarray) -> np.ndarray:
        return image[::-1, ::-1] if turned else image

    return {
        "sum": shown(scan.sum_frame()),
        "max": shown(frames.max(axis=0)),
        "squares": shown((frames * frames).sum(axis=0)),
        "disc": seen(DISC)[:, None],
        "weighted": np.stack([seen(w) for w in WEIGHTS], axis=1),
        "quadrants": np.stack([seen(k == QUADRANTS) for k in range(4)], axis=1),
        "moments": np.stack([scan.totals(), seen(y), seen(x)], axis=1),
        "brightest": frames.max(axis=(1, 2)),
    }
