"""Stop between two slices of a job, so that the frames that are done become a partial result.

A request comes by SIGUSR1 (Slurm's ``--signal=USR1@60``: the time limit is near), from the clock (a limit that the
job script names, or that a pool sets for each of its tasks), or by `request`.  What rank 0 knows counts, and all
ranks hear of it at the end of a slice.  SIGTERM and SIGINT are another thing: they end a rank at once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType

import numpy as np

from mpi_kernels.agreement import agreed, known_to_all, together
from mpi_kernels.contract import JobSpec
from mpi_kernels.engine import Progress, Reduced, Visit
from mpi_kernels.errors import KernelError
from mpi_kernels.plan import Plan
from mpi_kernels.protocols import Source
from mpi_kernels.ranks import Ranks

SLICE_S = 1.0
"""Work between two places where a job may stop; each costs a reader that runs dry once, some milliseconds."""

FIRST_BYTES = 256 << 20
"""First slice, before the speed is known: 0.05 s at 5 GB/s, 2.5 s at 100 MB/s.  Shorter jobs have no second one."""

GROWTH = 8
"""A slice is at most so many times the one before: the first ones are the slowest, and may mislead."""

LIMIT = "EMFLOW_TIME_LIMIT_S"
"""After so many seconds the job script ends the job."""

SHORTEST_LIMIT_S = 30.0
"""Shorter limits are for tests and trials: nothing is kept of what they end."""

LEAD_S, LEAD_SHARE = 5.0, 0.05
"""Time before a limit that a job needs to publish what it has: so many seconds, or this share of the limit."""


class StoppedEarly(KernelError):
    """Somebody asked the job to stop; the frames that were done are a partial result."""

    code = "stopped"
    retryable = True


class TimeLimit(StoppedEarly):
    """The job's time was nearly up; the frames that were done are a partial result."""

    code = "time-limit"


@dataclass(frozen=True, slots=True)
class Request:
    """Why to stop, which job (empty: whichever runs), and whether its time limit is the reason."""

    why: str
    job: str = ""
    limit: bool = False


class _Asked:
    """The request that stands, and when the job script's limit is met; of this process."""

    request: Request | None = None
    deadline: float | None = None
    at_deadline: Request = Request("the time limit is near", limit=True)


_ASKED = _Asked()


def request(why: str, *, job: str = "", limit: bool = False) -> None:
    """Ask for a stop; from any thread, or a signal handler.

    Parameters
    ----------
    why : str
        Ends up in ``error.json``.
    job : str
        Name of the job that is meant, so that a late request never stops the next one; empty: whichever runs.
    limit : bool
        Whether the time limit is the reason: such an attempt is counted, since another one would meet it again.
    """
    _ASKED.request = Request(why, job, limit)


def clear() -> None:
    """Forget what was asked for: the next job is not meant."""
    _ASKED.request = None


def requested(job: str, ahead_s: float = 0.0) -> Request | None:
    """The request that concerns a job, if there is one.

    Parameters
    ----------
    ahead_s : float
        Time until the next look: what would come before it counts now.
    """
    asked = _ASKED.request
    if asked is not None and asked.job in ("", job):
        return asked
    if _ASKED.deadline is not None and time.monotonic() + ahead_s > _ASKED.deadline:
        return _ASKED.at_deadline
    return None


def listen(environment: Mapping[str, str] = os.environ) -> None:
    """Take SIGUSR1 for a request, and the job script's time limit for another; called first, in the main thread."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, _near_limit)
    if limited(environment):
        expire(_seconds(environment[LIMIT]))


def expire(limit_s: float | None, why: str = "the time limit is near", *, limit: bool = True) -> None:
    """Ask for a stop in time before a limit that is ``limit_s`` seconds away; None: there is none any more."""
    lead_s = max(LEAD_S, LEAD_SHARE * (limit_s or 0.0))
    _ASKED.deadline = None if limit_s is None else time.monotonic() + limit_s - lead_s
    _ASKED.at_deadline = Request(why, limit=limit)


def limited(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the job script names a limit that `listen` heeds."""
    return _seconds(environment.get(LIMIT, "")) >= SHORTEST_LIMIT_S


def early(asked: Request, done: int, frames: int, kept: str) -> KernelError:
    """The error of a job that was stopped, on every rank.

    Parameters
    ----------
    kept : str
        Name of the partial result that holds the ``done`` frames; empty if there is none.
    """
    told = f"{asked.why}: ended after {done} of {frames} frames" + (f", which {kept} holds" if kept else "")
    if asked.limit:
        step = "raise time_limit_s in [scheduler], or give the job more ranks: the same limit would be met again"
        return known_to_all(TimeLimit(told, next_step=step))
    return known_to_all(StoppedEarly(told, next_step="a new attempt starts from the beginning"))


def reduce_in_slices(
    job: JobSpec, plan: Plan, source: Source, ranks: Ranks, *, progress: Progress | None = None
) -> tuple[Reduced | None, Request | None, int]:
    """Compute a plan slice by slice until it is done or somebody asks for a stop; every rank calls it.

    Every rank has a contiguous share of each slice, on the boundaries that change no bit (`Visit.align`).

    Returns
    -------
    reduced : Reduced or None
        Of the frames that are done, on rank 0.
    asked : Request or None
        Why it stopped, on all ranks; None: all frames are done.
    done : int
        Frames.

    Raises
    ------
    KernelError
        What the source raises on any rank, on all of them at the end of the slice (`agreed`).
    """
    frames, done = plan.header.frames, 0
    visit = Visit(plan, source, ranks, method=job.method, block_bytes=job.block_bytes)
    try:
        leader = _Leader(job.job, plan, visit.align) if not ranks.rank else None
        asked, size = _told(ranks, leader, done)
        while asked is None and done < frames:
            start, stop = ranks.share_of(done, done + size, visit.align)
            together(ranks, partial(visit.add, start, stop, _within(progress, done, size, frames)))
            done += size
            asked, size = _told(ranks, leader, done)
        return (visit.merged(last=True) if done else None), asked, done
    finally:
        visit.close()


class _Leader:
    """What rank 0 alone does: it looks for requests and at the clock, and decides for all."""

    def __init__(self, job: str, plan: Plan, align: int) -> None:
        self._job, self._frames, self._align = job, plan.header.frames, align
        self._size = max(1, FIRST_BYTES // frame_bytes(plan))
        self._begin, self._before = time.monotonic(), 0

    def next(self, done: int) -> tuple[Request | None, int]:
        """Why to stop now, and the frames of the next slice."""
        now = time.monotonic()
        took_s, added = now - self._begin, done - self._before
        self._begin, self._before = now, done
        if added:
            self._size = int(min(GROWTH * added, added * SLICE_S / max(took_s, 1e-6)))
        left = self._frames - done
        size = max(self._align, self._size // self._align * self._align)
        size = left if 2 * left < 3 * size else size  # no small rest
        return (requested(self._job, took_s if added else 0.0) if left else None), size


def frame_bytes(plan: Plan) -> int:
    """Bytes of a frame in memory."""
    height, width = plan.header.det_shape
    return height * width * np.dtype(plan.header.dtype).itemsize


def _told(ranks: Ranks, leader: _Leader | None, done: int) -> tuple[Request | None, int]:
    """What rank 0 decides, on every rank."""
    data = None
    if leader is not None:
        asked, size = leader.next(done)
        data = json.dumps([None if asked is None else [asked.why, asked.job, asked.limit], size]).encode("ascii")
    plain, size = json.loads(ranks.broadcast(data))
    return (None if plain is None else Request(*plain)), int(size)


def _within(progress: Progress | None, done: int, size: int, frames: int) -> Progress | None:
    """Progress of all frames from that of this rank's share of a slice."""
    if progress is None:
        return None
    told: Callable[[int, int], None] = progress
    return lambda part, share: told(done + part * size // max(1, share), frames)


def _near_limit(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    request(f"{signal.Signals(number).name}, the time limit is near", limit=True)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


__all__ = [
    "Request",
    "StoppedEarly",
    "TimeLimit",
    "agreed",
    "clear",
    "early",
    "expire",
    "limited",
    "listen",
    "reduce_in_slices",
    "request",
    "requested",
]
