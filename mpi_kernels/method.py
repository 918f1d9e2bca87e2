"""How a plan is computed here: on which device, with which kernels, read in which way, and why not otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from mpi_kernels.compiled import Compiled, NotCompiled
from mpi_kernels.contract import Method
from mpi_kernels.feed import Feed
from mpi_kernels.fused import Fused, Quality
from mpi_kernels.plan import Plan
from mpi_kernels.protocols import Source
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key


class Terms(Protocol):
    """Accumulators of all terms of a recipe: in numpy, compiled, or on a GPU."""

    in_file_order: ClassVar[bool]
    """Whether `add` takes frames as they are in the file, not as the recipe turns them."""
    kernel: str
    group: int
    """Frames that are summed together; shares that begin at multiples of it change no bit of float sums."""

    @property
    def quality(self) -> Quality:
        """What the frames so far were like."""

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add (n, det_y, det_x) frames; the first one is row ``row`` of this rank's share."""

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Arrays per pixel by term on rank 0, None elsewhere; more frames may be added afterwards."""

    def rows(self, used: int) -> Any:
        """Sums of this rank's first ``used`` frames, by term."""


@dataclass(slots=True)
class Chosen:
    """What is used.

    Attributes
    ----------
    terms : Terms
        The accumulators.
    feed : Feed or None
        Compiled readers, where the source's frames lie as they can use them.
    fused : bool
        No reduction wants blocks of its own: readers and kernels do all without Python.
    facts : dict
        For the manifest.
    """

    terms: Terms
    source: Source
    feed: Feed | None
    fused: bool
    facts: dict[str, str | int] = field(default_factory=dict)

    def add(self, start: int, stop: int, row: int, progress: Callable[[int], None] | None) -> None:
        """Read and reduce frames in one go; only where ``fused``."""
        assert self.feed is not None
        assert isinstance(self.terms, Compiled)
        self.feed.add(self.terms.native, start, stop, row, progress)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill a buffer, through the compiled readers where they can."""
        (self.feed or self.source).frames(start, stop, out)

    def close(self) -> None:
        """Give back what was opened beside the source."""
        if self.feed is not None and self.feed is not self.source:
            self.feed.close()


def choose(plan: Plan, source: Source, ranks: Ranks, rows: int, method: Method) -> Chosen:
    """The best of what is asked for and can be had; every rank calls it."""
    threads = method.threads or max(1, cores() // ranks.on_node())
    why: list[str] = []
    terms = _terms(plan, rows, method, threads, why)
    feed = _feed(source, method, threads, why)
    fused = feed is not None and isinstance(terms, Compiled) and all(step.terms for step in plan.steps)
    facts: dict[str, str | int] = {
        "device": "cpu",
        "kernel": terms.kernel,
        "reading": feed.reading if feed else "source",
        "threads": threads,
    }
    if why:
        facts["why"] = "; ".join(why)
    return Chosen(terms, source, feed, fused, facts)


def cores() -> int:
    """Cores that this process may use; OMP_NUM_THREADS, which job scripts set, can only make them fewer."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(allowed, int(asked)) if asked.isdecimal() and int(asked) > 0 else allowed


def _terms(plan: Plan, rows: int, method: Method, threads: int, why: list[str]) -> Terms:
    wanted = [t for step in plan.steps for t in step.terms.values()]
    if method.kernel != "numpy":
        try:
            return Compiled(
                wanted,
                plan.header,
                rows,
                orientation=plan.recipe.orientation,
                kernel=method.kernel,
                threads=threads,
            )
        except NotCompiled as error:
            why.append(str(error))
    return Fused(wanted, plan.header, rows)


def _feed(source: Source, method: Method, threads: int, why: list[str]) -> Feed | None:
    if isinstance(source, Feed):
        return source
    if method.reading == "source" or source.layout is None:
        return None
    refused = Feed.can(source.header, source.layout)
    if refused is not None:
        why.append(refused)
        return None
    return Feed(source.header, source.layout, reading=method.reading, threads=threads)
