"""A growing acquisition: frames are reduced as they become readable, and what is there so far is published."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpi_kernels import jsonfile
from mpi_kernels.agreement import together
from mpi_kernels.contract import READY_FILE, JobSpec, Ready
from mpi_kernels.engine import Reduced, Visit
from mpi_kernels.errors import FormatError, KernelError, MissingData, Stalled
from mpi_kernels.plan import Plan
from mpi_kernels.protocols import Source
from mpi_kernels.ranks import Ranks
from mpi_kernels.sampling import needed
from mpi_kernels.stopping import Request, early, requested

POLL_S = 0.005
"""Between two looks for news; each is one look-up of a name that is not there yet."""

LIST_S = 1.0
"""Between two listings of the folder: numbers may be skipped, and a network folder may know names late."""

PARTIAL_S = 0.5
"""Shortest time between two partial results."""

PULSE_S = 0.25
"""Rank 0 tells the others at least so often that it is still there."""


class ReadyFiles:
    """The newest ``ready-<n>.json`` of an acquisition's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._listed_at = -LIST_S

    def news(self) -> Ready | None:
        """The newest record, once; None if there is none that is newer than the last."""
        now = time.monotonic()
        numbers = [self._number + 1] if (self._folder / f"ready-{self._number + 1}.json").exists() else []
        if numbers or now - self._listed_at >= LIST_S:
            self._listed_at = now
            names = (READY_FILE.fullmatch(path.name) for path in self._folder.glob("ready-*.json"))
            numbers += [int(name[1]) for name in names if name]
        newest = max(numbers, default=0)
        if newest <= self._number:
            return None
        try:
            ready = jsonfile.read(Ready, self._folder / f"ready-{newest}.json")
        except FileNotFoundError:  # the folder is read later than its names
            return None
        self._number = newest
        return ready


@dataclass(slots=True)
class _State:
    """What all ranks know: frames that may be read, and whether there will be more."""

    frames: int = 0
    complete: bool = False
    publish: bool = False


def follow(
    job: JobSpec,
    plan: Plan,
    source: Source,
    ranks: Ranks,
    folder: Path,
    publish: Callable[[int, Reduced], None],
    progress: Callable[[int, int], None],
) -> tuple[Reduced | None, str | None]:
    """Reduce an acquisition while it is written; every rank calls it.

    Parameters
    ----------
    folder : Path
        The run folder; the ready files are in the one above.
    publish : callable
        Given the number of a partial result, from 1, and the result, on rank 0.
    progress : callable
        Given the frames that are done and all of them, on rank 0, also while nothing happens.

    Returns
    -------
    reduced : Reduced or None
        The whole, on rank 0.
    digest : str or None
        Of the acquisition, as the last ready file has it; on rank 0.

    Raises
    ------
    Stalled
        Nothing new for ``job.stall_s`` seconds; what was there is in the last partial result.
    MissingData
        The acquisition ended with fewer frames than it should have.
    FormatError
        A ready file says what can't be.
    StoppedEarly
        Somebody asked for it (`mpi_kernels.stopping`).

    Notes
    -----
    All but a failure in the middle of a collective call is raised by every rank (`agreement.agreed`).
    """
    leader = _Leader(job, plan, folder, progress) if ranks.rank == 0 else None
    number, done, state = 0, 0, _State()
    while state.frames < needed(plan):
        state = _told(ranks, leader, 0)
        together(ranks, lambda: None if leader is None else leader.check(0))
    visit = Visit(plan, source, ranks, method=job.method, block_bytes=job.block_bytes)
    try:
        while done < plan.header.frames or not state.complete:
            state = _told(ranks, leader, done)
            stop = state.frames if state.complete else state.frames - state.frames % visit.align
            if stop > done:
                together(ranks, functools.partial(visit.add, *ranks.share_of(done, stop, visit.align)))
                done = stop
            publishes = state.publish and done > 0  # frames may be ready that are too few to begin with
            partial = visit.merged() if publishes else None
            number += publishes

            def tell(number: int = number, done: int = done, partial: Reduced | None = partial) -> None:
                if partial is not None:
                    publish(number, partial)
                if leader is not None:
                    leader.check(done)

            together(ranks, tell)
        return visit.merged(last=True), None if leader is None else leader.digest
    finally:
        visit.close()


class _Leader:
    """What rank 0 alone does: it watches the folder and the clock, and decides for all."""

    def __init__(self, job: JobSpec, plan: Plan, folder: Path, progress: Callable[[int, int], None]) -> None:
        self._files = ReadyFiles(folder.parent)
        self._frames, self._stall_s, self._progress = plan.header.frames, job.stall_s, progress
        self._path = job.source.path
        self._state = _State()
        self._published, self._published_at = 0, time.monotonic()
        self._news_at = time.monotonic()
        self.digest: str | None = None
        self._failure: KernelError | None = None
        self._asked: Request | None = None
        self._job = job.job

    def next(self, done: int) -> _State:
        """Wait for something to do, at most `PULSE_S`."""
        until = time.monotonic() + PULSE_S
        while True:
            ready = self._files.news()
            now = time.monotonic()
            if ready is not None:
                self._take(ready)
                self._news_at = now
            elif now - self._news_at > self._stall_s:
                told = f"{self._state.frames} of {self._frames} frames"
                self._failure = Stalled(
                    f"nothing new was ready for {self._stall_s:g} s, after {told}",
                    path=self._path,
                    next_step="does the microscope still write? the next attempt starts from the beginning",
                )
            self._asked = requested(self._job)
            due = now - self._published_at >= PARTIAL_S and done > self._published
            self._state.publish = due and done < self._frames
            if self._failure is not None or self._asked is not None:
                self._state.publish = self._state.frames > self._published
                return self._state
            if ready is not None or self._state.publish or now >= until:
                break
            time.sleep(POLL_S)
        if self._state.publish:
            self._published, self._published_at = done, now
        return self._state

    def _take(self, ready: Ready) -> None:
        if ready.frames < self._state.frames or ready.frames > self._frames:
            self._failure = FormatError(
                f"{ready.frames} frames are said to be ready after {self._state.frames}, of {self._frames} in all",
                path=self._path,
                next_step="was the acquisition started again? the next attempt reads it from the beginning",
            )
            self._failure.retryable = True
            return
        self._state.frames, self._state.complete, self.digest = ready.frames, ready.complete, ready.digest
        if ready.complete and ready.frames < self._frames:
            self._failure = MissingData(
                f"it ended after {ready.frames} of {self._frames} frames",
                path=self._path,
                frame=ready.frames,
                next_step="what is there is in the last partial result; record it again",
            )

    def check(self, done: int) -> None:
        """Say how far it is, and raise what went wrong once what is there is published."""
        self._progress(done, self._frames)
        if self._failure is not None:
            raise self._failure
        if self._asked is not None and not (self._state.complete and done == self._frames):
            raise early(self._asked, done, self._frames, "the last partial result" if done else "")


def _told(ranks: Ranks, leader: _Leader | None, done: int) -> _State:
    """The state as rank 0 has it now, on every rank."""
    data, state = None, together(ranks, lambda: None if leader is None else leader.next(done))
    if state is not None:
        data = json.dumps([state.frames, state.complete, state.publish]).encode("ascii")
    frames, complete, publish = json.loads(ranks.broadcast(data))
    return _State(int(frames), bool(complete), bool(publish))
