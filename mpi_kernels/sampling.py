"""Frames that reductions see before the pass, to settle what depends on the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpi_kernels import terms
from mpi_kernels.plan import Plan, Step, oriented
from mpi_kernels.protocols import Source
from mpi_kernels.ranks import Ranks

MOST_BYTES = 256 << 20
"""Of a sample; a larger one is cut to fewer frames, so that memory and one MPI message stay bounded."""


def settled(plan: Plan, source: Source, ranks: Ranks) -> Plan:
    """A plan whose reductions have seen the frames they asked for; every rank calls it, and gets the same.

    Rank 0 reads the frames, and the others get its bytes: two nodes that see different files must not count by
    different thresholds.  They are the first ones of the scan, so that an acquisition which is reduced while it grows
    ends with the same numbers as one that was whole before.
    """
    steps = list(plan.steps)
    for i, step in enumerate(steps):
        count = _count(step, plan)
        if count:
            frames = _frames(plan, source, ranks, count)
            reduction = step.reduction.settled(frames, plan.header)
            wanted = dict(reduction.terms(plan.header))
            terms.check(step.spec.name, wanted, plan.header)
            steps[i] = replace(step, reduction=reduction, terms=wanted)
    return replace(plan, steps=tuple(steps))


def needed(plan: Plan) -> int:
    """Frames, from the first, that must be readable before the pass."""
    return max((_count(step, plan) for step in plan.steps), default=0)


def _count(step: Step, plan: Plan) -> int:
    return min(step.reduction.samples(plan.header), plan.header.frames, _fitting(plan))


def _fitting(plan: Plan) -> int:
    """Frames that fit into the bound; one in any case."""
    size = int(np.prod(plan.header.det_shape)) * np.dtype(plan.header.dtype).itemsize
    return max(1, MOST_BYTES // size)


def _frames(plan: Plan, source: Source, ranks: Ranks, count: int) -> np.ndarray:
    """(count, det_y, det_x), oriented and read-only, in the plan's dtype."""
    shape, dtype = source.header.det_shape, np.dtype(source.header.dtype)
    data = None
    if not ranks.rank:
        buffer = np.empty((count, *shape), dtype)
        source.frames(0, count, buffer)
        data = buffer.tobytes()
    raw = np.frombuffer(ranks.broadcast(data), dtype).reshape(count, *shape)
    return oriented(raw.view(plan.header.dtype), plan.recipe.orientation)
