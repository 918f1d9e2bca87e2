"""How a plan is computed here: on which device, with which kernels, read in which way, and why not otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from mpi_kernels.compiled import Compiled, NotCompiled
from mpi_kernels.contract import Method
from mpi_kernels.feed import Feed
from mpi_kernels.fused import Fused, Quality
from mpi_kernels.gpu.card import Card, open_card
from mpi_kernels.gpu.fused import GpuFused, attempt
from mpi_kernels.plan import Plan
from mpi_kernels.protocols import Source, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.sparse import SparseFused, SparseSource, oriented
from mpi_kernels.terms import Key

EVENT_FRAMES = 1024
"""Frames whose events are asked for at a time."""


class Terms(Protocol):
    """Accumulators of all terms of a recipe: in numpy, compiled, on a card, or from events."""

    in_file_order: ClassVar[bool]
    """Whether `add` takes frames as they are in the file, not as the recipe turns them."""
    kernel: str
    group: int
    """Frames that are summed together; shares that begin at multiples of it change no bit of float sums."""

    @property
    def quality(self) -> Quality:
        """What the frames so far were like."""

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Arrays per pixel by term on rank 0, None elsewhere; more frames may be added afterwards."""

    def rows(self, used: int) -> Mapping[Key, np.ndarray]:
        """Sums of this rank's first ``used`` frames, by term."""


class DenseTerms(Terms, Protocol):
    """Those that take frames."""

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add (n, det_y, det_x) frames; the first one is row ``row`` of this rank's share."""


Whole = Callable[[int, int, int, Callable[[int], None] | None], None]
"""``(start, stop, row, progress)``: read and reduce frames in one go, without blocks that Python sees."""


@dataclass(slots=True)
class Chosen:
    """What is used.

    Attributes
    ----------
    terms : Terms
        The accumulators.
    dense : DenseTerms or None
        The same, where they take frames.
    source : Source or Feed
        What fills buffers with frames.
    feed : Feed or None
        Compiled readers, where the source's frames lie as they can use them.
    whole : callable or None
        Where no reduction wants blocks of its own.
    facts : dict
        For the manifest.
    """

    terms: Terms
    source: Source
    dense: DenseTerms | None = None
    feed: Feed | None = None
    whole: Whole | None = None
    facts: dict[str, str | int] = field(default_factory=dict)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill a buffer, through the compiled readers where they can."""
        (self.feed or self.source).frames(start, stop, out)

    def close(self) -> None:
        """Give back what was opened beside the source."""
        if self.feed is not None and self.feed is not self.source:
            self.feed.close()


Choose = Callable[[Plan, Source, Ranks, int, Method], Chosen]
Opening = Callable[[], tuple[Card | None, str]]


def choose(
    plan: Plan, source: Source, ranks: Ranks, rows: int, method: Method, *, opening: Opening = open_card
) -> Chosen:
    """The best of what is asked for and can be had on all ranks; every rank calls it.

    Parameters
    ----------
    opening : callable
        Gives this rank's card, where one is asked for, or None and why.
    """
    threads = method.threads or max(1, cores() // ranks.on_node())
    if hasattr(source, "threads"):
        source.threads = threads
    wanted = [t for step in plan.steps for t in step.terms.values()]
    only_terms = all(step.terms for step in plan.steps)
    if isinstance(source, SparseSource) and only_terms:
        return _events(plan, source, SparseFused(wanted, plan.header, rows))
    why: list[str] = []
    terms = _on_card(plan, wanted, source, ranks, rows, opening, why) if method.device == "gpu" else None
    terms = terms or _on_cpu(plan, wanted, ranks, rows, method, threads, why)
    feed = _feed(source, method, threads, why)
    whole = None
    if feed is not None and isinstance(terms, Compiled) and only_terms:
        reader, native = feed, terms.native

        def whole(start: int, stop: int, row: int, progress: Callable[[int], None] | None) -> None:
            reader.add(native, start, stop, row, progress)

    facts: dict[str, str | int] = {
        "device": "gpu" if isinstance(terms, GpuFused) else "cpu",
        "kernel": terms.kernel,
        "reading": feed.reading if feed else "source",
        "threads": threads,
    }
    if isinstance(terms, GpuFused):
        facts["card"] = terms.method
    if why:
        facts["why"] = "; ".join(why)
    return Chosen(terms, source, terms, feed, whole, facts)


def cores() -> int:
    """Cores that this process may use; OMP_NUM_THREADS, which job scripts set, can only make them fewer."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(allowed, int(asked)) if asked.isdecimal() and int(asked) > 0 else allowed


def _events(plan: Plan, source: SparseSource, terms: SparseFused) -> Chosen:
    """Counted data: no frame is ever made."""

    def whole(start: int, stop: int, row: int, progress: Callable[[int], None] | None) -> None:
        for a in range(start, stop, EVENT_FRAMES):
            b = min(a + EVENT_FRAMES, stop)
            terms.add(oriented(source.events(a, b), source.header.det_shape, plan.recipe.orientation), row + a - start)
            if progress is not None:
                progress(b - start)

    facts: dict[str, str | int] = {"device": "cpu", "kernel": terms.kernel, "reading": "source", "threads": 1}
    return Chosen(terms, source, whole=whole, facts=facts)


def _on_card(
    plan: Plan, wanted: list[Term], source: Source, ranks: Ranks, rows: int, opening: Opening, why: list[str]
) -> DenseTerms | None:
    """Accumulators on the cards of all ranks, or None: what is on a card merges with its like only."""
    made = attempt(wanted, plan.header, rows, *opening(), align=source.align)
    if ranks.all(isinstance(made, GpuFused)):
        assert isinstance(made, GpuFused)
        return made
    why.append(made if isinstance(made, str) else "another rank has no card that can do this")
    return None


def _on_cpu(
    plan: Plan, wanted: list[Term], ranks: Ranks, rows: int, method: Method, threads: int, why: list[str]
) -> DenseTerms:
    """Accumulators of the same kind on every rank, since each kind merges in its own way."""
    if method.kernel != "numpy":
        compiled: Compiled | None = None
        try:
            compiled = Compiled(
                wanted,
                plan.header,
                rows,
                orientation=plan.recipe.orientation,
                kernel=method.kernel,
                threads=threads,
            )
        except NotCompiled as error:
            why.append(str(error))
        if ranks.all(compiled is not None):
            assert compiled is not None
            return compiled
        if compiled is not None:
            why.append("another rank has no compiled kernels")
    return Fused(wanted, plan.header, rows)


def _feed(source: Source, method: Method, threads: int, why: list[str]) -> Feed | None:
    if method.reading == "source" or source.layout is None:
        return None
    refused = Feed.can(source.header, source.layout)
    if refused is not None:
        why.append(refused)
        return None
    return Feed(source.header, source.layout, reading=method.reading, threads=threads)
