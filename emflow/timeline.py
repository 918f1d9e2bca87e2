"""From events to what people ask: where an acquisition is, and where its time went."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from emflow.journal import Journal
from emflow.records import Acquisition, Job
from mpi_kernels.contract import Event

STEPS = ("noticed", "ready", "staged", "submitted", "running", "reduced", "done")
"""Events of the service that mark an acquisition's way, in order."""

_BACK_TO = {"growing": "ready", "planned": "submitted"}
"""Events that begin a part of the way anew, and the first step of that part."""

SERVICE_BARS = {
    "ready": "written and settled",
    "staged": "copied and verified",
    "submitted": "planned and submitted",
    "running": "job starts",
    "reduced": "job",
    "done": "published",
}
KERNEL_BARS = {
    "claimed": "Python, MPI, claim",
    "started": "header",
    "reduced": "read and reduce",
    "written": "write result",
}
"""What lies before each event of the service and of the kernels, in words for a figure."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One acquisition as `emflow status` shows it; ``seconds`` from the first sight to each step that happened."""

    id: str
    share: str
    path: str
    state: str
    reason: str
    format: str
    kind: str
    frames: int
    job: str
    job_state: str
    scheduler_id: str
    seen_ns: int
    seconds: dict[str, float]


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One bar of a waterfall: a step that took from ``start_s`` to ``stop_s`` after the first sight."""

    name: str
    start_s: float
    stop_s: float
    inside_job: bool = False


def step_times(events: Iterable[Event]) -> dict[str, int]:
    """Wall time, ns, of each step of `STEPS` that happened.

    The way of one attempt only: a step that is taken again, the next attempt's planning and the return to GROWING drop
    what came later in the attempt before.
    """
    times: dict[str, int] = {}
    for event in events:
        if event.plane != "management" or event.name not in (*STEPS, *_BACK_TO):
            continue
        until = STEPS.index(_BACK_TO.get(event.name, event.name))
        times = {name: times[name] for name in STEPS[:until] if name in times}
        if event.name in STEPS:
            times[event.name] = event.wall_ns
    return times


def row_of(journal: Journal, acquisition: Acquisition) -> Row:
    """Gather one acquisition, its newest job and the times of its steps."""
    jobs: Sequence[Job] = journal.jobs(acquisition.id)
    job = jobs[-1] if jobs else None
    times = step_times(event for _, event in journal.events(trace=acquisition.trace))
    return Row(
        id=acquisition.id,
        share=acquisition.share,
        path=acquisition.name,
        state=acquisition.state.value,
        reason=acquisition.reason,
        format=acquisition.format,
        kind=acquisition.kind,
        frames=acquisition.frames,
        job=job.name if job else "",
        job_state=job.state.value if job else "",
        scheduler_id=job.scheduler_id if job else "",
        seen_ns=acquisition.seen_ns,
        seconds={name: (when - acquisition.seen_ns) / 1e9 for name, when in times.items()},
    )


def waterfall(events: Sequence[Event]) -> list[Bar]:
    """Bars of one acquisition's way: the service's steps end to end, the kernels' own steps inside them."""
    times = step_times(events)
    if "noticed" not in times:
        return []
    marks = [(SERVICE_BARS.get(name, name), times[name]) for name in STEPS if name in times]
    data = [e for e in events if e.plane == "data" and e.name in KERNEL_BARS]
    job = max((e.subject for e in data), default="")  # the last attempt
    inside = [(KERNEL_BARS[e.name], e.wall_ns) for e in data if e.subject == job]
    begun = [times[name] for name in ("submitted", "running") if name in times]
    if inside:  # the service may hear that a job runs after the job has told of itself
        inside.insert(0, ("", max((t for t in begun if t <= inside[0][1]), default=inside[0][1])))
    zero = times["noticed"]
    bars = [
        Bar(name=name, start_s=(begin - zero) / 1e9, stop_s=(end - zero) / 1e9, inside_job=pairs is inside)
        for pairs in (marks, inside)
        for (_, begin), (name, end) in itertools.pairwise(pairs)
    ]
    return sorted(bars, key=lambda bar: (bar.start_s, -bar.stop_s))
