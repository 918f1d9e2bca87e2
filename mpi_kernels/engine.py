"""One read of the data: this rank's frames to all terms and to every reduction, and the merge on rank 0."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from mpi_kernels import electrons
from mpi_kernels.agreement import together
from mpi_kernels.contract import AUTO, Method, Orientation, Scalar
from mpi_kernels.fused import Quality
from mpi_kernels.gpu.fused import GpuFused
from mpi_kernels.merging import Range, accumulators, covered, end, gather, places, read_only
from mpi_kernels.method import Choose, Chosen, choose
from mpi_kernels.plan import Plan, Step, oriented
from mpi_kernels.protocols import Block, Events, Source
from mpi_kernels.ranks import Ranks
from mpi_kernels.sampling import settled
from mpi_kernels.terms import key

CHUNK_BYTES = 64 << 20
"""A block grows up to here to hold one whole chunk of the file, so that no chunk is decompressed twice."""

Progress = Callable[[int, int], None]
"""Called now and then with the frames of this rank that are done, and all of them."""


@dataclass(slots=True)
class Reduced:
    """What rank 0 holds after a merge.

    Attributes
    ----------
    arrays, scalars : dict
        By reduction, then by output.
    quality : Quality
        What the frames were like.
    seconds : dict
        By step, the slowest rank's.
    covered : ndarray of bool
        Over the scan: which frames are in it.
    method : dict
        How it was computed.
    events : dict
        By reduction, of those that keep events.
    """

    arrays: dict[str, dict[str, np.ndarray]]
    scalars: dict[str, dict[str, Scalar]]
    quality: Quality
    seconds: dict[str, float] = field(default_factory=dict)
    covered: np.ndarray = field(default_factory=lambda: np.ones((), np.bool_))
    method: dict[str, str | int] = field(default_factory=dict)
    events: dict[str, Events] = field(default_factory=dict)


def block_frames(frame_bytes: int, align: int, block_bytes: int) -> int:
    """Frames of a block: whole chunks of the file where they fit."""
    fit = max(1, block_bytes // frame_bytes)
    if fit >= align:
        return fit - fit % align
    return align if align * frame_bytes <= CHUNK_BYTES else fit


def reduce(
    plan: Plan,
    source: Source,
    ranks: Ranks,
    *,
    method: Method = AUTO,
    block_bytes: int = 4 << 20,
    progress: Progress | None = None,
    choosing: Choose = choose,
) -> Reduced | None:
    """Compute a plan; every rank calls it, rank 0 gets the result, the others None.

    Raises
    ------
    KernelError
        What the source or a reduction raises.
    """
    frames = plan.header.frames
    visit = Visit(plan, source, ranks, method=method, block_bytes=block_bytes, choosing=choosing)
    try:
        visit.add(*ranks.share(frames, visit.align), progress)
        return visit.merged(last=True)
    finally:
        visit.close()


class Visit:
    """One rank's way through the data.  Frames may be added, and all merged, as often as one likes.

    Parameters
    ----------
    plan : Plan
    source : Source
        Of this rank; stays the caller's.
    ranks : Ranks
    method : Method
        What is asked for; what is used in the end is in the result.
    block_bytes : int
        Size of the blocks that reductions of their own see.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        ranks: Ranks,
        *,
        method: Method = AUTO,
        block_bytes: int = 4 << 20,
        choosing: Choose = choose,
    ) -> None:
        self.plan, self.ranks = settled(plan, source, ranks), ranks
        self._source, self._block_bytes = source, block_bytes
        self._rows = plan.header.frames  # any of them may come to this rank; pages that are not touched cost nothing
        self._ranges: list[Range] = []
        self._used = 0
        self._chosen: Chosen = choosing(self.plan, source, ranks, self._rows, method)
        self._own = {s.spec.name: accumulators(s, self._rows) for s in self.plan.steps if not s.terms}
        self._events: dict[str, list[Events]] = {s.spec.name: [] for s in self.plan.steps if s.reduction.sparse}
        self._seconds = {"read": 0.0, "reduce": 0.0}

    @property
    def align(self) -> int:
        """Shares that begin at multiples of it read nothing twice, and change no bit of float sums."""
        align = self._chosen.feed.align if self._chosen.feed else self._source.align
        return math.lcm(align, self._chosen.terms.group)

    def add(self, start: int, stop: int, progress: Progress | None = None) -> None:
        """Visit frames ``start:stop`` of the scan, which nobody has visited before."""
        row, chosen = self._used, self._chosen
        if chosen.whole is not None:
            begin = time.perf_counter()
            chosen.whole(start, stop, row, None if progress is None else lambda done: progress(done, stop - start))
            self._seconds["reduce"] += time.perf_counter() - begin
        elif start < stop:
            self._add_blocks(start, stop, row, progress)
        self._ranges.append((start, stop))
        self._used += stop - start

    def _add_blocks(self, first: int, last: int, row: int, progress: Progress | None) -> None:
        size, buffer = self._buffer(last - first)
        for start in range(first, last, size):
            stop = min(start + size, last)
            begin = time.perf_counter()
            raw = buffer()[: stop - start].view(self._source.header.dtype)
            self._chosen.read(start, stop, raw)
            middle = time.perf_counter()
            self._block(raw, start, row + start - first)
            self._seconds["read"] += middle - begin
            self._seconds["reduce"] += time.perf_counter() - middle
            if progress is not None:
                progress(stop - first, last - first)

    def _buffer(self, most: int) -> tuple[int, Callable[[], np.ndarray]]:
        """Frames of a block, and what gives the memory for the next one: the card's own where frames are not turned."""
        header, terms = self._source.header, self._chosen.dense
        if isinstance(terms, GpuFused) and self.plan.recipe.orientation == Orientation():
            return terms.frames, terms.buffer
        shape, dtype = header.det_shape, np.dtype(header.dtype)
        size = block_frames(math.prod(shape) * dtype.itemsize, self._source.align, self._block_bytes)
        buffer = np.empty((min(size, most), *shape), dtype)
        return size, lambda: buffer

    def _block(self, raw: np.ndarray, start: int, row: int) -> None:
        raw = raw.view(self.plan.header.dtype)
        frames = oriented(raw, self.plan.recipe.orientation)
        frames.flags.writeable = False
        terms = self._chosen.dense
        assert terms is not None
        terms.add(raw if terms.in_file_order else frames, row)
        rows = slice(row, row + len(frames))
        for step in self.plan.steps:
            if not step.terms:
                arrays = self._own[step.spec.name]
                out = {n: a[rows] if step.outputs[n].over == "scan" else a for n, a in arrays.items()}
                events = step.reduction.reduce(Block(frames, start, self.plan.header), out)
                if events is not None:
                    self._events[step.spec.name].append(events)

    def merged(self, *, last: bool = False) -> Reduced | None:
        """All that the ranks have so far, finished, on rank 0; None elsewhere.  Every rank calls it.

        Parameters
        ----------
        last : bool
            Nothing is added afterwards, so that ``end`` may have the accumulators themselves and needs no copies.
        """
        before = time.perf_counter()
        ranks, frames = self.ranks, self.plan.header.frames
        where = places(ranks, self._ranges)
        terms = self._chosen.terms
        arrays = terms.merge(ranks) or {}
        for term, rows in terms.rows(self._used).items():
            whole = gather(ranks, rows, where, frames)
            if whole is not None:
                arrays[term] = whole.reshape((*self.plan.header.scan_shape, *whole.shape[1:]))
        own = {s.spec.name: self._merged(s, where, last=last) for s in self.plan.steps if not s.terms}
        events = {n: electrons.collected(p, self._ranges, where, ranks, frames) for n, p in self._events.items()}
        seconds = self._seconds | {"merge": time.perf_counter() - before}
        reports = ranks.gather_json({"seconds": seconds, "quality": asdict(terms.quality)})

        def finished() -> Reduced | None:
            if reports is None or where is None:
                return None
            slowest = {k: max(r["seconds"][k] for r in reports) for k in seconds}
            found = Reduced({}, {}, Quality(), slowest, method=self._chosen.facts)
            for report in reports:
                found.quality.add(report["quality"])
            begin = time.perf_counter()
            mask = covered(where, frames)
            for step in self.plan.steps:
                name = step.spec.name
                parts = {k: read_only(arrays[key(t)]) for k, t in step.terms.items()} if step.terms else own[name]
                found.arrays[name], found.scalars[name] = end(step, parts, self.plan, int(mask.sum()))
            found.seconds["end"] = time.perf_counter() - begin
            found.covered = mask.reshape(self.plan.header.scan_shape)
            found.events = {name: whole for name, whole in events.items() if whole is not None}
            return found

        return together(ranks, finished)

    def _merged(self, step: Step, where: list[Range] | None, *, last: bool) -> dict[str, np.ndarray]:
        """Outputs of a reduction of its own, merged between ranks; ``end`` may write into them."""
        found = {}
        for name, array in self._own[step.spec.name].items():
            output = step.outputs[name]
            if output.over == "scan":
                whole = gather(self.ranks, array[: self._used], where, self.plan.header.frames)
            else:
                whole = self.ranks.reduce(array, output.merge)
            if whole is not None:
                # one rank merges nothing: without a copy, `end` would write into what further frames are added to
                found[name] = whole if last or not np.may_share_memory(whole, array) else whole.copy()
        return found

    def close(self) -> None:
        """Give back what was opened beside the source."""
        self._chosen.close()
