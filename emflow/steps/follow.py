"""Follow: how the jobs are that were sent; the run folder is asked first, and only a manifest is success."""

from __future__ import annotations

from pathlib import Path

from emflow.errors import Unavailable
from emflow.records import Acquisition, Job, JobState, JobStatus, SchedulerPhase
from emflow.runs import NO_SPACE, STOPPED, failure_reason
from emflow.steps.context import DISK_RUNS, RETRY_S, Context, log
from emflow.transfer import free_bytes
from mpi_kernels.contract import ErrorRecord, ResultManifest
from mpi_kernels.errors import FormatError, printable

MANIFEST_GRACE_S = 0.5
"""How long a result may take to be seen after its job ended: file systems show renames late."""

LONGEST_PAUSE_S = 60.0
"""Between attempts that met a full disk; each waits twice as long as the one before."""


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
    except Unavailable as error:
        context.raise_alarm("scheduler poll", str(error))
        return
    context.clear_alarm("scheduler poll")
    for job in unsettled:
        with context.going_on(job.name):
            _heard(context, job, said[job.name])


def _ended(context: Context, job: Job) -> bool:
    """Whether the run folder says how the job ended; then the journal knows it too."""
    acquisition = context.journal.acquisition(job.acquisition)
    folder = context.runs.job_folder(acquisition.day, job.name)
    try:
        error = context.runs.read_error(folder)  # first: a job never fails after its commit
        result = context.runs.read_result(folder)
    except FormatError as torn:
        _failed(context, job, f"final: {torn}")
        return True
    if result is not None and (wrong := _wrong(context, acquisition, folder, result)):
        _failed(context, job, wrong)
        return True
    if result is not None:
        with context.journal.transaction():
            context.journal.merge(context.runs.collect_events(folder))
            context.journal.move_job(
                job.name,
                job.state,
                JobState.REDUCED,
                attrs={"quality": result.quality, "seconds": result.seconds, "ranks": result.ranks},
            )
        return True  # the next turn publishes it
    if error is not None:
        _failed(context, job, _timed_out(context, folder, error) or failure_reason(error))
        return True
    return False


def _wrong(context: Context, acquisition: Acquisition, folder: Path, result: ResultManifest) -> str:
    """Why a result is not the one of this job; empty if it is."""
    if result.source_digest != acquisition.digest:
        return "final: the result is of other bytes than were staged"
    if not context.runs.result_is_whole(folder, result):
        return f"{result.result} is not the file that result.json was written for"
    return ""


def _timed_out(context: Context, folder: Path, error: ErrorRecord) -> str:
    """What to say of a job that was stopped when its time was up: such an attempt is counted; else empty.

    Whoever stops a job sends the same signal.  Both times come from the job's own host.
    """
    limit_s, claim = context.config.scheduler.time_limit_s, context.runs.read_claim(folder)
    if error.code != STOPPED or claim is None:
        return ""
    ran_s = (error.wall_ns - claim.wall_ns) / 1e9
    started_s = 0.1 * limit_s + 2.0  # Python, MPI and a batch system take their part of the limit
    return f"reached the time limit of {limit_s} s" if ran_s >= limit_s - started_s else ""


def _heard(context: Context, job: Job, status: JobStatus) -> None:
    journal = context.journal
    if status.phase is SchedulerPhase.RUNNING and job.state is not JobState.RUNNING:
        journal.move_job(job.name, job.state, JobState.RUNNING, attrs={"node": status.node})
    elif status.phase is SchedulerPhase.PENDING and job.state is JobState.UNKNOWN:
        journal.move_job(job.name, job.state, JobState.SUBMITTED)
    elif status.phase is SchedulerPhase.UNKNOWN and job.state is not JobState.UNKNOWN:
        log.warning("%s: the scheduler says %r, which is not known", job.name, status.reason, extra={"job": job.name})
        journal.move_job(job.name, job.state, JobState.UNKNOWN, reason=status.reason)
    elif status.phase in (SchedulerPhase.ENDED, SchedulerPhase.GONE) and not _ended(context, job):
        _without_result(context, job, status)
        return
    context.ended.pop(job.name, None)  # not any more, if it ever was


def _without_result(context: Context, job: Job, status: JobStatus) -> None:
    """The scheduler says that a job has ended, and the run folder says nothing: wait a moment, then believe it."""
    first = context.ended.setdefault(job.name, context.clock())
    if context.clock() - first < MANIFEST_GRACE_S:
        return
    del context.ended[job.name]
    full = free_bytes(context.runs.root) < context.config.transfer.min_free  # not even error.json may have had room
    _failed(context, job, f"{f'{NO_SPACE}: ' if full else ''}the job ended without a result {status.reason}".strip())


def _failed(context: Context, job: Job, reason: str) -> None:
    acquisition = context.journal.acquisition(job.acquisition)
    with context.journal.transaction():
        context.journal.merge(context.runs.collect_events(context.runs.job_folder(acquisition.day, job.name)))
        context.journal.move_job(job.name, job.state, JobState.FAILED, reason=reason)
    if reason.startswith(NO_SPACE):
        context.raise_alarm(DISK_RUNS, reason)
        context.back_off(acquisition.id, min(LONGEST_PAUSE_S, RETRY_S * 2 ** (job.attempt - 1)))
    log.error("failed %s: %s", job.name, printable(reason), extra={"job": job.name})


def end_jobs(context: Context) -> None:
    """Stop with the service what does not outlive it; such an attempt is not counted."""
    if not context.scheduler.ends_with_service:
        return
    jobs = context.journal.jobs_in({JobState.SUBMITTED, JobState.RUNNING, JobState.UNKNOWN})
    context.scheduler.cancel(*(job.scheduler_id for job in jobs))
    for job in jobs:
        if not _ended(context, job):
            _failed(context, job, f"{STOPPED}: with the service")
