"""From what Slurm lists of a name to how the job is."""

from __future__ import annotations

from collections.abc import Iterable

from emflow.errors import printable
from emflow.records import JobStatus, SchedulerPhase
from emflow.schedulers.slurm_reasons import explained, never_ends
from emflow.schedulers.slurm_rows import Row
from emflow.schedulers.slurm_states import Meaning, judge


def by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the jobs' names."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def chosen(rows: Iterable[Row], scheduler_id: str) -> Row | None:
    """The job that was sent; or the one that runs in its place, since it came first after a doubt."""
    own = next((row for row in rows if row.id == scheduler_id), None)
    if own is not None and not judge(own.state).ended:
        return own
    return next((row for row in rows if judge(row.state).phase is SchedulerPhase.RUNNING), own)


def status(rows: Iterable[Row], scheduler_id: str) -> JobStatus:
    """How the job is that was sent as ``scheduler_id``, by the rows of its name."""
    row = chosen(rows, scheduler_id)
    if row is None:
        return gone(scheduler_id)
    meaning = judge(row.state)
    return JobStatus(
        scheduler_id=row.id,
        phase=meaning.phase,
        reason=_reason(row, meaning),
        stuck=meaning.stuck or (row.state == "PENDING" and never_ends(row.reason)),
        node=row.node,
        cause=meaning.cause,
        nodes=row.nodes if row.node else 0,  # before it starts, what it asks for
        elapsed_s=row.elapsed_s,
    )


def _reason(row: Row, meaning: Meaning) -> str:
    if row.state == "PENDING":
        return printable(explained(row.reason))
    if meaning.ended:
        why = f" ({row.reason})" if row.reason not in ("", "None") else ""
        return printable(f"{row.state}{why}")
    return printable(f"{row.state}: {meaning.text}" if meaning.text else "")


def gone(scheduler_id: str) -> JobStatus:
    """Of a job that Slurm does not know."""
    text = "Slurm does not know it any more"
    return JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.GONE, reason=text)
