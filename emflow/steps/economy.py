"""Economy: what jobs cost, what that means for the next one, and how many acquisitions wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emflow import backlog
from emflow.backlog import Backlog
from emflow.journal import Journal
from emflow.journal_usage import HOUR_S, by_day, day_of
from emflow.microscope.protocol import COMMAND_ID
from emflow.records import Acquisition, AcquisitionState, Job, JobStatus
from emflow.steps.context import Context

BOOK_S = 60.0
"""How often the cost of a job that runs is written into the journal; at its end it is written once more."""

TELL_S = 1.0
"""Shortest time between two numbers in the backlog's file, unless the limit lies between them."""

WAITING = (AcquisitionState.READY, AcquisitionState.STAGED)
"""States of an acquisition that the service has yet to bring to its result; its job may be under way."""

CAP = "cap "
"""Begins the names of the alarms of caps."""

Verdict = Literal["whole", "degraded", "wait"]


@dataclass(frozen=True, slots=True)
class Cap:
    """One bound on node-hours, and what is spent of it."""

    name: str
    spent: float
    limit: float
    until: str

    @property
    def reached(self) -> bool:
        """Whether nothing more may be started."""
        return self.spent >= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.spent:.4g} of {self.limit:.4g} node-hours are spent; jobs wait until {self.until}"


def experiment_of(acquisition: Acquisition) -> str:
    """The experiment whose command made an acquisition; empty where none did."""
    found = COMMAND_ID.fullmatch(acquisition.trace)
    return found["experiment"] if found else ""


def verdict(context: Context, acquisition: Acquisition) -> Verdict:
    """Whether the next job of an acquisition may start, and with which recipe; what waits is told as an alarm."""
    caps = list(_caps(context, experiment_of(acquisition)))
    for cap in (cap for cap in caps if cap.reached):
        context.raise_alarm(CAP + cap.name, str(cap))
        return "wait"
    near = any(cap.spent >= context.config.caps.degrade_at * cap.limit for cap in caps)
    return "degraded" if near and context.degraded is not None else "whole"


def lift(context: Context) -> None:
    """End the alarms of caps that bind no more: a day is over."""
    for name in [name for name in context.alarms if name.startswith(CAP)]:
        experiment = name.partition("experiment ")[2]
        if not any(CAP + cap.name == name and cap.reached for cap in _caps(context, experiment)):
            context.clear_alarm(name)


def _caps(context: Context, experiment: str) -> Iterator[Cap]:
    caps, usage = context.config.caps, context.journal.usage
    if caps.node_hours_per_day:
        day = day_of(int(context.wall() * 1e9))
        yield Cap(
            f"day {day}",
            usage.of_day(day),
            caps.node_hours_per_day,
            "00:00 UTC, or until node_hours_per_day in [caps] is raised",
        )
    if caps.node_hours_per_experiment and experiment:
        yield Cap(
            f"experiment {experiment}",
            usage.of_experiment(experiment),
            caps.node_hours_per_experiment,
            "node_hours_per_experiment in [caps] is raised",
        )


# --- what a job costs


def book(
    context: Context, job: Job, folder: Path, *, status: JobStatus | None = None, ended_ns: int | None = None
) -> float:
    """Write into the journal what a job has cost so far, or in all; returns node-hours.

    From the moment that the scheduler names, or else from the job's claim, to its end.  One that never started costs
    nothing.
    """
    context.booked[job.name] = context.clock()
    claim = None if job.started_ns else context.runs.read_claim(folder)
    started_ns = job.started_ns or (claim.wall_ns if claim is not None else 0)
    if status is not None and status.elapsed_s:
        started_ns = started_ns or int((context.wall() - status.elapsed_s) * 1e9)
        ended_ns = started_ns + int(status.elapsed_s * 1e9)
    if not started_ns:
        return 0.0
    nodes = (status.nodes if status is not None else 0) or job.nodes or _nodes(context)
    spent = by_day(started_ns, ended_ns or int(context.wall() * 1e9), nodes)
    context.journal.usage.book(job.name, spent)
    return sum(spent.values()) / HOUR_S


def book_running(context: Context, job: Job, folder: Path, status: JobStatus) -> None:
    """Write what a job that runs has cost, now and then."""
    if context.clock() - context.booked.setdefault(job.name, context.clock()) >= BOOK_S:
        book(context, job, folder, status=status)


def _nodes(context: Context) -> int:
    """Nodes of a job of which its scheduler has not said it."""
    return 1 if context.scheduler.ends_with_service else max(1, context.config.slurm.nodes)


# --- how many wait


def waiting(journal: Journal) -> int:
    """Acquisitions that wait for a copy, a job or its end."""
    return journal.count(WAITING)


def tell(context: Context) -> None:
    """Publish how many acquisitions wait, for an agent; where no limit is set, nothing is written."""
    if context.config.caps.backlog:
        with context.going_on("backlog"):
            _tell(context, context.config.caps.backlog)


def _tell(context: Context, limit: int) -> None:
    now, said = context.clock(), context.told
    found = Backlog(waiting=waiting(context.journal), limit=limit, wall_ns=int(context.wall() * 1e9))
    if said is not None:
        before, at = said
        due_s = backlog.REFRESH_S if found.over else float("inf")
        if found.waiting != before.waiting:
            due_s = TELL_S if found.over == before.over else 0.0
        if now - at < due_s:
            return
    backlog.write(context.runs.root, found)
    context.told = (found, now)
