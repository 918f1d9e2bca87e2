"""Follow: how the jobs are that were sent; the run folder is asked first, and only a manifest is success."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emflow.errors import Unavailable
from emflow.records import Acquisition, AcquisitionState, Job, JobState, JobStatus, SchedulerPhase
from emflow.runs import LIVE, LOST, NO_SPACE, STOPPED, failure_reason
from emflow.steps import economy
from emflow.steps.alive import silent_s
from emflow.steps.context import DISK_RUNS, RETRY_S, Context, log
from emflow.steps.ending import MANIFEST_GRACE_S, grace_s, said_by_the_job, said_by_the_scheduler
from mpi_kernels.contract import ResultManifest
from mpi_kernels.errors import FormatError, printable

LONGEST_PAUSE_S = 60.0
"""Between attempts that met a full disk or were taken away; each waits twice as long as the one before."""

LOOK_S = 5.0
"""Between two looks for a running job's sign of life, or a tenth of what is allowed: each is a question to the disk."""

AWAITED = "ended; its result is waited for, since file systems show new files late"
"""Reason of a job that its scheduler says has ended, while its result may still show."""

LEAVING_S = 30.0
"""How long a job that has said that it was stopped may still be there before it is cancelled."""


def follow(context: Context) -> None:
    """Ask the run folders, then the scheduler, how the sent jobs are; only a manifest is success."""
    sent = context.journal.jobs_in({JobState.SUBMITTED, JobState.RUNNING, JobState.UNKNOWN})
    unsettled = []
    for job in sent:
        if not context.waits(job.name):
            with context.going_on(job.name, clears=False):
                if _ended(context, job):
                    context.clear_alarm(f"trouble {job.name}")
                else:
                    unsettled.append(job)
    if not unsettled:
        return
    try:
        said = context.scheduler.poll({job.name: job.scheduler_id for job in unsettled})
    except (Unavailable, OSError) as error:  # the folder of the pools may be away
        context.raise_alarm("scheduler poll", printable(str(error)))
        return
    context.clear_alarm("scheduler poll")
    for job in unsettled:
        with context.going_on(job.name):
            _heard(context, job, said[job.name])


def _ended(context: Context, job: Job) -> bool:
    """Whether the run folder says how the job ended; then the journal knows it too."""
    folder = _folder(context, job)
    try:
        error = context.runs.read_error(folder)  # first: a job never fails after its commit
        result = context.runs.read_result(folder)
    except FormatError as torn:
        fail(context, job, f"final: {torn}")
        return True
    acquisition = context.journal.acquisition(job.acquisition) if result is not None else None
    if acquisition is not None and acquisition.state in (AcquisitionState.GROWING, AcquisitionState.READY):
        return False  # of a live job: what it is of is known when the digest is
    if result is not None and acquisition is not None and (wrong := _wrong(context, acquisition, folder, result)):
        fail(context, job, wrong, ended_ns=result.wall_ns)
        return True
    if result is not None:
        _reduced(context, job, folder, result)
        return True  # the next turn publishes it
    if error is not None and (reason := said_by_the_job(context, folder, error)):
        fail(context, job, reason, ended_ns=error.wall_ns)
        return True
    if error is not None:  # stopped: by whom, and whether anything of it is left, its scheduler has to say
        context.leaving.setdefault(job.name, context.clock())
    return False


def _reduced(context: Context, job: Job, folder: Path, result: ResultManifest) -> None:
    with context.journal.transaction():
        context.journal.merge(context.runs.collect_events(folder))
        spent = economy.book(context, job, folder, ended_ns=result.wall_ns)
        context.journal.move_job(
            job.name,
            job.state,
            JobState.REDUCED,
            attrs={
                "quality": result.quality,
                "seconds": result.seconds,
                "ranks": result.ranks,
                "node_hours": round(spent, 6),
            },
        )
    _forget(context, job)


def _wrong(context: Context, acquisition: Acquisition, folder: Path, result: ResultManifest) -> str:
    """Why a result is not the one of this job; empty if it is."""
    if result.source_digest != acquisition.digest:
        return "final: the result is of other bytes than were staged"
    if not context.runs.result_is_whole(folder, result):
        return f"{result.result} is not the file that result.json was written for"
    return ""


def _heard(context: Context, job: Job, status: JobStatus) -> None:
    journal, phase = context.journal, status.phase
    if phase in (SchedulerPhase.ENDED, SchedulerPhase.GONE):
        if not _ended(context, job):
            _without_result(context, job, status)
        return
    if phase is SchedulerPhase.UNKNOWN and job.state is not JobState.UNKNOWN:
        log.warning("%s: the scheduler says %r, which is not known", job.name, status.reason, extra={"job": job.name})
        journal.move_job(job.name, job.state, JobState.UNKNOWN, reason=status.reason)
    elif phase is SchedulerPhase.PENDING:
        _waits(context, job, status)
    elif phase is SchedulerPhase.RUNNING:
        _runs(context, job, status)
    context.ended.pop(job.name, None)  # not any more, if it ever was


def _waits(context: Context, job: Job, status: JobStatus) -> None:
    """Show why a job waits; one that waits for what can't come by itself is an alarm, and goes on waiting."""
    context.heard.pop(job.name, None)  # a job that is suspended waits too
    if job.state is JobState.UNKNOWN:
        job = context.journal.move_job(job.name, job.state, JobState.SUBMITTED, reason=status.reason)
    elif job.reason != status.reason:
        context.journal.update_job(job.name, job.state, reason=status.reason)
    if status.stuck:
        context.raise_alarm(f"waiting {job.name}", f"{job.name} can't start: {status.reason}")
    else:
        context.clear_alarm(f"waiting {job.name}")


def _runs(context: Context, job: Job, status: JobStatus) -> None:
    context.clear_alarm(f"waiting {job.name}")
    if job.state is not JobState.RUNNING or job.reason or (status.nodes and not job.nodes):
        job = _begun(context, job, status)
    now, most_s = context.clock(), context.config.scheduler.silent_s
    if now < context.look_again.get(job.name, now):
        return
    context.look_again[job.name] = now + min(LOOK_S, most_s / 10)
    folder = _folder(context, job)
    economy.book_running(context, job, folder, status)
    silent = silent_s(context, job, folder, status)
    if silent >= most_s:
        _cancelled(context, job, f"said to run, but without a sign of life for {silent:.0f} s: it was cancelled")
    elif now - context.leaving.get(job.name, now) >= LEAVING_S and (error := context.runs.read_error(folder)):
        _cancelled(context, job, failure_reason(error), ended_ns=error.wall_ns)


def _begun(context: Context, job: Job, status: JobStatus) -> Job:
    """Keep that a job runs, and what it has from when on."""
    columns: dict[str, Any] = {"memory_mib": job.memory_mib or status.memory_mib}
    if status.nodes:
        columns |= {"nodes": status.nodes, "started_ns": int((context.wall() - status.elapsed_s) * 1e9)}
    if job.state is JobState.RUNNING:
        return context.journal.update_job(job.name, job.state, reason="", **columns)
    attrs = {"node": status.node, **({"nodes": status.nodes} if status.nodes else {})}
    return context.journal.move_job(job.name, job.state, JobState.RUNNING, attrs=attrs, **columns)


def _without_result(context: Context, job: Job, status: JobStatus) -> None:
    """The scheduler says that a job has ended, and the run folder has no result: wait a moment, then believe it."""
    folder = _folder(context, job)
    error = context.runs.read_error(folder)
    first = context.ended.setdefault(job.name, context.clock())
    if error is None and context.clock() - first < grace_s(context):
        if job.reason != AWAITED:  # what was said of it last is not so any more
            context.journal.update_job(job.name, job.state, reason=AWAITED)
        return
    reason = said_by_the_scheduler(context, folder, status, error)
    if status.phase is SchedulerPhase.GONE or reason.startswith(LOST):  # a node that is away may still compute
        _cancelled(context, job, reason, status=status)
    else:
        fail(context, job, reason, status=status)


def _cancelled(context: Context, job: Job, reason: str, **how: Any) -> None:
    """Fence an attempt before another one is sent: nothing of it is left, or this is tried again."""
    context.scheduler.cancel(job.scheduler_id)
    if not _ended(context, job):
        fail(context, job, reason, **how)


def fail(
    context: Context, job: Job, reason: str, *, status: JobStatus | None = None, ended_ns: int | None = None
) -> None:
    """Journal that an attempt has failed, with what it cost and what its processes have told."""
    acquisition, folder = context.journal.acquisition(job.acquisition), _folder(context, job)
    if not reason.startswith(LIVE) and _was_live(context, folder):
        reason = f"{LIVE}: {reason}"
    with context.journal.transaction():
        context.journal.merge(context.runs.collect_events(folder))
        spent = economy.book(context, job, folder, status=status, ended_ns=ended_ns)
        context.journal.move_job(
            job.name, job.state, JobState.FAILED, reason=reason, attrs={"node_hours": round(spent, 6)}
        )
    if reason.startswith(NO_SPACE):
        context.raise_alarm(DISK_RUNS, reason)
    if reason.startswith((NO_SPACE, LOST)):
        context.back_off(acquisition.id, min(LONGEST_PAUSE_S, RETRY_S * 2 ** (job.attempt - 1)))
    _forget(context, job)
    log.error("failed %s: %s", job.name, printable(reason), extra={"job": job.name})


def _was_live(context: Context, folder: Path) -> bool:
    """Whether a job read what was still being written: its end says nothing of a job over the whole."""
    try:
        spec = context.runs.read_job(folder)
    except FormatError:
        return False
    return spec is not None and spec.growing


def _forget(context: Context, job: Job) -> None:
    for known in (context.ended, context.leaving, context.look_again, context.heard, context.booked, context.folders):
        known.pop(job.name, None)
    context.clear_alarm(f"waiting {job.name}")


def _folder(context: Context, job: Job) -> Path:
    """The run folder of a job, which never moves: a thousand jobs are asked for it several times a second."""
    found = context.folders.get(job.name)
    if found is None:
        found = context.runs.job_folder(context.journal.acquisition(job.acquisition).day, job.name)
        context.folders[job.name] = found
    return found


def end_jobs(context: Context) -> None:
    """Stop with the service what does not outlive it; such an attempt is not counted."""
    if not context.scheduler.ends_with_service:
        return
    jobs = context.journal.jobs_in({JobState.SUBMITTED, JobState.RUNNING, JobState.UNKNOWN})
    context.scheduler.cancel(*(job.scheduler_id for job in jobs))
    for job in jobs:
        if not _ended(context, job):
            fail(context, job, f"{STOPPED}: with the service")


__all__ = ["LONGEST_PAUSE_S", "MANIFEST_GRACE_S", "end_jobs", "follow"]
