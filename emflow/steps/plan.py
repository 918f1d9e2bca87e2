"""Plan: what every staged acquisition needs next: a job, another attempt, its result published, or a person."""

from __future__ import annotations

import time

from emflow.errors import NoSpace
from emflow.records import ACTIVE_JOB_STATES, LAST_ATTEMPT, Acquisition, AcquisitionState, Job, JobState, job_name
from emflow.runs import NO_SPACE, STOPPED
from emflow.steps.context import DISK_RESULTS, RETRY_S, Context, log
from emflow.steps.notice import quarantine
from emflow.transfer import publish_copy
from mpi_kernels.contract import PREVIEW_FILE, RESULT_H5
from mpi_kernels.errors import printable


def plan(context: Context) -> None:
    """Decide what every staged acquisition needs next: a first job, another attempt, its result published, a person."""
    active = {job.acquisition for job in context.journal.jobs_in(ACTIVE_JOB_STATES)}
    slots = context.config.scheduler.max_active - len(active)
    for acquisition in context.journal.walk(AcquisitionState.STAGED):
        if slots <= 0 or context.stopping.is_set():
            return
        if acquisition.id not in active and not context.waits(acquisition.id):
            with context.going_on(acquisition.id):
                slots -= _next(context, acquisition)


def _next(context: Context, acquisition: Acquisition) -> int:
    """What one staged acquisition needs; returns how many slots that takes."""
    jobs = context.journal.jobs(acquisition.id)
    attempt = jobs[-1].attempt + 1 if jobs else 1
    jobs = _of_this_copy(context, acquisition, jobs)
    last = jobs[-1] if jobs else None
    if last is None:
        return _plan(context, acquisition, attempt)
    if last.state is JobState.REDUCED:
        _publish(context, acquisition, last)
    elif last.state is JobState.FAILED and not _may_try_again(context, jobs):
        quarantine(context, acquisition, f"job {last.name} failed: {last.reason}")
    elif last.state is JobState.FAILED and last.attempt >= LAST_ATTEMPT:
        quarantine(context, acquisition, f"{last.attempt} attempts, of which the last failed: {last.reason}")
    elif last.state is JobState.FAILED:
        return _plan(context, acquisition, attempt)
    return 0


def _of_this_copy(context: Context, acquisition: Acquisition, jobs: list[Job]) -> list[Job]:
    """Jobs that were planned since the data were staged last; after `emflow retry` the older ones answer nothing."""
    staged = [number for number, _ in context.journal.events(subject=acquisition.id, names=("staged",))]
    if not staged or not jobs:
        return jobs
    planned = {job.name: context.journal.events(subject=job.name, names=("planned",)) for job in jobs}
    return [job for job in jobs if not planned[job.name] or planned[job.name][-1][0] > staged[-1]]


def _may_try_again(context: Context, jobs: list[Job]) -> bool:
    # an attempt that was stopped from outside or met a full disk says nothing against the next one
    failed = [j for j in jobs if not j.reason.startswith((STOPPED, NO_SPACE))]
    if jobs[-1] not in failed:
        return True
    return not jobs[-1].reason.startswith("final") and len(failed) < context.config.scheduler.attempts


def _plan(context: Context, acquisition: Acquisition, attempt: int) -> int:
    watched = context.watches.get(acquisition.share)
    if watched is None:
        context.not_watched(acquisition)
        return 0
    if not context.room(0, "the next job"):
        context.back_off(acquisition.id, RETRY_S)
        return 0
    job = Job(
        name=job_name(acquisition.id, attempt),
        acquisition=acquisition.id,
        attempt=attempt,
        state=JobState.PLANNED,
        recipe=watched.recipe.name,
        scheduler=context.config.scheduler.use,
        planned_ns=time.time_ns(),
    )
    context.journal.add_job(job)
    return 1


def _publish(context: Context, acquisition: Acquisition, job: Job) -> None:
    """Copy the result to where people look; the acquisition is done when the copy is there."""
    folder = context.runs.job_folder(acquisition.day, job.name)
    if not (folder / RESULT_H5).exists():
        quarantine(context, acquisition, f"the result of job {job.name} is gone from its run folder")
        return
    try:
        context.results.mkdir(parents=True, exist_ok=True)
        publish_copy(folder / RESULT_H5, context.results / f"{acquisition.id}_emflow.h5")
        if (folder / PREVIEW_FILE).exists():
            publish_copy(folder / PREVIEW_FILE, context.results / f"{acquisition.id}_emflow.png")
    except NoSpace as error:
        context.raise_alarm(DISK_RESULTS, str(error))
        context.back_off(acquisition.id, RETRY_S)
        return
    context.clear_alarm(DISK_RESULTS)
    with context.journal.transaction():
        context.journal.merge(context.runs.collect_events(folder))  # a job's last event comes after its result.json
        context.journal.move_acquisition(
            acquisition.id, AcquisitionState.STAGED, AcquisitionState.DONE, attrs={"job": job.name}
        )
    log.info("done %s", printable(acquisition.name), extra={"acquisition": acquisition.id, "job": job.name})
