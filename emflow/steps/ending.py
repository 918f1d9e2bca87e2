"""How a job ended that has no result: in words, and whether that says anything of its data.

A reason begins with a word that `emflow.steps.plan` goes by: ``final`` (no other attempt), ``memory`` (one more, with
twice as much), ``stopped``, ``lost`` and ``no-space`` (another one, and this one does not count); any other counts.
"""

from __future__ import annotations

from pathlib import Path

from emflow.records import EndCause, JobStatus
from emflow.runs import LOST, NO_MEMORY, NO_SPACE, STOPPED, TIME_LIMIT, failure_reason
from emflow.steps.context import Context
from emflow.transfer import free_bytes
from mpi_kernels.contract import ErrorRecord

TAKEN_AWAY = {
    EndCause.NODE_FAIL: "its node failed",
    EndCause.BOOT_FAIL: "its node did not start",
    EndCause.PREEMPTED: "another job took its place",
    EndCause.CANCELLED: "somebody cancelled it",
}
"""What says nothing of the data or the program."""

OVERTIME = frozenset({EndCause.TIMEOUT, EndCause.DEADLINE})

MANIFEST_GRACE_S = 0.5
"""How long a result may take to be seen after its job ended on this machine."""

CLUSTER_GRACE_S = 30.0
"""The same where nodes write: NFS clients believe so long that a name is not there.  Source: nfs(5), acdirmin."""


def grace_s(context: Context) -> float:
    """How long a result may take to be seen after its job ended: file systems show renames late."""
    return MANIFEST_GRACE_S if context.scheduler.ends_with_service else CLUSTER_GRACE_S


def said_by_the_job(context: Context, folder: Path, error: ErrorRecord) -> str:
    """The reason in a job's own words; empty where only its scheduler knows who stopped it, and why."""
    if error.code == STOPPED:
        return _overtime(context, folder) if _ran_its_time(context, folder, error) else ""
    if error.code == TIME_LIMIT:
        return _overtime(context, folder)
    return failure_reason(error)


def said_by_the_scheduler(context: Context, folder: Path, status: JobStatus, error: ErrorRecord | None) -> str:
    """The reason of a job that its scheduler says has ended, and that has at most said that it was stopped."""
    cause = status.cause
    if cause is EndCause.OUT_OF_MEMORY:
        return f"{NO_MEMORY}: out of memory{_told(status)}"
    if cause in OVERTIME:
        return _overtime(context, folder, _told(status))
    if cause in TAKEN_AWAY:
        return f"{LOST}: {TAKEN_AWAY[cause]}{_told(status)}"
    if error is not None:
        return failure_reason(error)
    full = free_bytes(context.runs.root) < context.config.transfer.min_free  # not even error.json may have had room
    return f"{f'{NO_SPACE}: ' if full else ''}the job ended without a result {status.reason}".strip()


def _told(status: JobStatus) -> str:
    said = status.reason if status.cause in status.reason else f"{status.cause} {status.reason}".strip()
    return f" ({said})"


def _overtime(context: Context, folder: Path, told: str = "") -> str:
    what = f"reached the time limit of {context.config.scheduler.time_limit_s} s{told}{_partial(context, folder)}"
    return f"{what}. Raise time_limit_s in [scheduler], or take more ranks"


def _partial(context: Context, folder: Path) -> str:
    there = context.runs.newest_partial(folder)
    if there is None:
        return ""
    return f", with {there.coverage:.0%} of the frames done: see {folder.name}/{there.result} in its run folder"


def _ran_its_time(context: Context, folder: Path, error: ErrorRecord) -> bool:
    """Whether a job that was stopped had had its time: such an attempt is counted.

    Whoever stops a job sends the same signal.  Both times come from the job's own host.
    """
    limit_s, claim = context.config.scheduler.time_limit_s, context.runs.read_claim(folder)
    if claim is None:
        return False
    started_s = 0.1 * limit_s + 2.0  # Python, MPI and a batch system take their part of the limit
    return (error.wall_ns - claim.wall_ns) / 1e9 >= limit_s - started_s
