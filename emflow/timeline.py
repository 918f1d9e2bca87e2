"""From events to what people ask: where an acquisition is, and where its time went."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from emflow.config import Config
from emflow.journal import Journal
from emflow.microscope.protocol import COMMAND_ID
from emflow.records import ACTIVE_JOB_STATES, Acquisition, Job
from emflow.runs import RunFolders
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

LOOP_BARS = {
    "ordered": "",
    "sent": "controls set",
    "began": "command",
    "written": "scan written",
    "noted": "note beside it",
    "ready": "noticed and settled",
    "staged": SERVICE_BARS["staged"],
    "submitted": SERVICE_BARS["submitted"],
    "result": "job",
    "found": "result seen",
    "decided": "policy decides",
    "next": "next command",
}
"""Marks of a commanded acquisition in their order, from the first command of its decision to the first of the next one,
and what lies before each.  Publishing is not among them: the agent does not wait for it."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One acquisition as `emflow status` shows it; ``seconds`` from the first sight to each step that happened.

    ``reason`` is its own, or that of a job that can't start or is not known; ``node_hours`` are those of all attempts.
    """

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
    node_hours: float
    seen_ns: int
    seconds: dict[str, float]


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One bar of a waterfall: a step that took from ``start_s`` to ``stop_s`` after the first command, or sight."""

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
        reason=acquisition.reason or (job.reason if job is not None and job.state in ACTIVE_JOB_STATES else ""),
        format=acquisition.format,
        kind=acquisition.kind,
        frames=acquisition.frames,
        job=job.name if job else "",
        job_state=job.state.value if job else "",
        scheduler_id=job.scheduler_id if job else "",
        node_hours=round(journal.usage.of_acquisition(acquisition.id), 6),
        seen_ns=acquisition.seen_ns,
        seconds={name: (when - acquisition.seen_ns) / 1e9 for name, when in times.items()},
    )


def acquisition_events(journal: Journal, config: Config, acquisition: Acquisition) -> list[Event]:
    """All events of an acquisition, by their wall clocks.

    The journal's, and what stands in the folders of its jobs: a job's last word may come after the service has merged
    them.  For an acquisition that a command made also those of the agent and the microscope, and the first command of
    the decision that its result led to.
    """
    runs = RunFolders(config.service.runs)
    events = [event for _, event in journal.events(trace=acquisition.trace)]
    for job in journal.jobs(acquisition.id):
        events += runs.collect_events(runs.job_folder(acquisition.day, job.name))
    if COMMAND_ID.fullmatch(acquisition.trace):
        # a batch makes several acquisitions under one trace: drop what belongs to the others and their jobs
        events = [e for e in events if e.plane == "control" or e.subject.startswith(acquisition.id)]
        events += with_next(control_events(config, acquisition.trace), acquisition.trace)
    return in_order(events)


def control_events(config: Config, command: str) -> list[Event]:
    """All events that the agent and the microscope told of a command's experiment."""
    found = COMMAND_ID.fullmatch(command)
    folder = config.service.experiments / (found["experiment"] if found else "")
    return in_order(RunFolders(config.service.runs).collect_events(folder)) if found else []


def trace_of(config: Config, said: str) -> str:
    """The trace of a command's id, where its experiment tells it; anything else as it is."""
    return next((e.trace for e in control_events(config, said) if e.subject == said), said)


def with_next(events: Sequence[Event], trace: str) -> list[Event]:
    """Events of a trace, in order, and the command that came next: the first of another trace after its decision."""
    own = [e for e in events if e.trace == trace]
    decided = _taken(own).get("decided")
    if decided is None:
        return own
    after = (e for e in events if e.name == "sent" and e.trace != trace and e.wall_ns >= decided.wall_ns)
    return own + list(itertools.islice(after, 1))


def in_order(events: Iterable[Event]) -> list[Event]:
    """Each event once, by wall clock; the same one may come from the journal and from a file."""
    once = {(e.host, e.pid, e.seq, e.wall_ns): e for e in events}
    return sorted(once.values(), key=lambda e: (e.wall_ns, e.host, e.pid, e.seq))


def loop_times(events: Sequence[Event]) -> dict[str, int]:
    """Wall time, ns, of each mark of `LOOP_BARS` that there is; empty for what no command made.

    Clocks of several hosts are as far apart as they are; a mark never lies before the one it follows.

    Parameters
    ----------
    events : sequence of Event
        Of one acquisition, as `acquisition_events` gives them.
    """
    trace = events[0].trace if events else ""
    if not COMMAND_ID.fullmatch(trace):
        return {}
    steps = step_times(events)
    times: dict[str, int] = {name: at for name, at in steps.items() if name in ("ready", "staged", "submitted")}
    times |= {name: event.wall_ns for name, event in _taken(events).items()}
    job = _job_of(events)
    for event in events:
        for mark in _marks_of(event, trace, job):
            times.setdefault(mark, event.wall_ns)
    latest = 0
    for mark in [name for name in LOOP_BARS if name in times]:
        latest = times[mark] = max(latest, times[mark])
    return {name: times[name] for name in LOOP_BARS if name in times}


def _taken(events: Sequence[Event]) -> dict[str, Event]:
    """When the agent first saw the result, and what it then decided: the decision for this scan is not meant."""
    told = [e for e in events if e.plane == "control" and e.name in ("found", "decided")]
    after = itertools.dropwhile(lambda e: e.name != "found", told)
    taken: dict[str, Event] = {}
    for event in after:
        taken.setdefault(event.name, event)
    return taken


def _job_of(events: Sequence[Event]) -> str:
    """The job whose result the agent took, or the last attempt."""
    attempts = (e.subject for e in events if e.plane == "data" and e.name in KERNEL_BARS)
    found = _taken(events).get("found")
    return found.subject if found else max(attempts, default="")


def _marks_of(event: Event, trace: str, job: str) -> tuple[str, ...]:
    if event.plane == "data":
        return ("result",) if event.name == "written" and event.subject == job else ()
    if event.plane != "control":
        return ()
    if event.trace != trace:
        return ("next",) if event.name == "sent" else ()
    if event.name == "sent":
        return ("ordered", "sent") if event.subject == trace else ("ordered",)
    own = event.subject == trace and event.name in ("began", "written", "noted")
    return (event.name,) if own else ()


def waterfall(events: Sequence[Event]) -> list[Bar]:
    """Bars of one acquisition's way, end to end, the kernels' own steps inside them.

    The service's steps from the first sight on; for a commanded acquisition the whole loop, from the command that made
    it to the next one.

    Parameters
    ----------
    events : sequence of Event
        Of one acquisition, as `acquisition_events` gives them.
    """
    times, loop = step_times(events), loop_times(events)
    if not loop and "noticed" not in times:
        return []
    names, whole = (LOOP_BARS, loop) if loop else ({name: SERVICE_BARS.get(name, name) for name in STEPS}, times)
    marks = [(names[name], whole[name]) for name in names if name in whole]
    job = _job_of(events)
    inside = [
        (KERNEL_BARS[e.name], e.wall_ns)
        for e in events
        if e.plane == "data" and e.name in KERNEL_BARS and e.subject == job
    ]
    begun = [whole[name] for name in ("submitted", "running") if name in whole]
    if inside:  # the service may hear that a job runs after the job has told of itself
        inside.insert(0, ("", max((t for t in begun if t <= inside[0][1]), default=inside[0][1])))
    zero = marks[0][1]
    bars = [
        Bar(name=name, start_s=(begin - zero) / 1e9, stop_s=(end - zero) / 1e9, inside_job=pairs is inside)
        for pairs in (marks, inside)
        for (_, begin), (name, end) in itertools.pairwise(pairs)
        if end > begin or pairs is inside or not loop
    ]
    return sorted(bars, key=lambda bar: (bar.start_s, -bar.stop_s))
