"""Plan: what every staged acquisition needs next: a job, another attempt, its result published, or a person."""

from __future__ import annotations

import math
import time
from typing import Any

from emflow.errors import NoSpace
from emflow.records import ACTIVE_JOB_STATES, LAST_ATTEMPT, Acquisition, AcquisitionState, Job, JobState, job_name
from emflow.runs import LOST, NO_MEMORY, NO_SPACE, STOPPED
from emflow.schedulers import site
from emflow.steps import economy
from emflow.steps.context import DISK_RESULTS, RETRY_S, Context, log
from emflow.steps.notice import quarantine
from emflow.transfer import publish_copy
from mpi_kernels.contract import PREVIEW_FILE, RESULT_H5
from mpi_kernels.errors import printable


def plan(context: Context) -> None:
    """Decide what every staged acquisition needs next: a first job, another attempt, its result published, a person."""
    economy.lift(context)
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
        return _plan(context, acquisition, attempt, 0)
    if last.state is JobState.REDUCED:
        _publish(context, acquisition, last)
    elif last.state is JobState.FAILED and not _may_try_again(context, jobs):
        quarantine(context, acquisition, f"job {last.name} failed: {last.reason}{_advice(context, jobs)}")
    elif last.state is JobState.FAILED and last.attempt >= LAST_ATTEMPT:
        quarantine(context, acquisition, f"{last.attempt} attempts, of which the last failed: {last.reason}")
    elif last.state is JobState.FAILED:
        return _plan(context, acquisition, attempt, _memory_mib(context, last))
    return 0


def _of_this_copy(context: Context, acquisition: Acquisition, jobs: list[Job]) -> list[Job]:
    """Jobs that were planned since the data were staged last; after `emflow retry` the older ones answer nothing."""
    staged = [number for number, _ in context.journal.events(subject=acquisition.id, names=("staged",))]
    if not staged or not jobs:
        return jobs
    planned = {job.name: context.journal.events(subject=job.name, names=("planned",)) for job in jobs}
    return [job for job in jobs if not planned[job.name] or planned[job.name][-1][0] > staged[-1]]


def _may_try_again(context: Context, jobs: list[Job]) -> bool:
    if jobs[-1].reason.startswith(NO_MEMORY):  # with twice as much it may fit; if not, four times is not ours to take
        return len(_short_of_memory(jobs)) < 2
    # what was stopped from outside, taken away or met a full disk says nothing against the next one
    failed = [j for j in jobs if not j.reason.startswith((STOPPED, NO_SPACE, LOST, NO_MEMORY))]
    if jobs[-1] not in failed:
        return True
    return not jobs[-1].reason.startswith("final") and len(failed) < context.config.scheduler.attempts


def _short_of_memory(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.reason.startswith(NO_MEMORY)]


def _memory_mib(context: Context, last: Job) -> int:
    """Memory of the next attempt, of each node: twice of what was too little, and else as before; 0 is the site's."""
    if not last.reason.startswith(NO_MEMORY):
        return last.memory_mib
    return 2 * _had_mib(context, last)


def _had_mib(context: Context, job: Job) -> int:
    """Memory that an attempt had of each node, as far as anybody knows."""
    if job.memory_mib or context.scheduler.ends_with_service:  # on this machine a job takes what is there
        return job.memory_mib
    return math.ceil(site.settings(context.config).memory / (1 << 20))


def _advice(context: Context, jobs: list[Job]) -> str:
    """What a person may do about a job that is short of memory."""
    if not jobs[-1].reason.startswith(NO_MEMORY):
        return ""
    had = [str(mib) for mib in (_had_mib(context, job) for job in _short_of_memory(jobs)) if mib]
    tried = f" It had {' and then '.join(had)} MiB of each node." if had else ""
    return f".{tried} Raise memory in [slurm], or take more nodes or ranks"


def _plan(context: Context, acquisition: Acquisition, attempt: int, memory_mib: int) -> int:
    watched = context.watches.get(acquisition.share)
    if watched is None:
        context.not_watched(acquisition)
        return 0
    if not context.room(0, "the next job"):
        context.back_off(acquisition.id, RETRY_S)
        return 0
    said = economy.verdict(context, acquisition)
    if said == "wait":
        context.back_off(acquisition.id, RETRY_S)
        return 0
    degraded = context.degraded if said == "degraded" else None
    job = Job(
        name=job_name(acquisition.id, attempt),
        acquisition=acquisition.id,
        attempt=attempt,
        state=JobState.PLANNED,
        recipe=(degraded or watched.recipe).name,
        scheduler=context.config.scheduler.use,
        planned_ns=time.time_ns(),
        memory_mib=memory_mib,
    )
    more: dict[str, Any] = {"memory_mib": memory_mib} if memory_mib else {}
    context.journal.add_job(job, attrs=more | ({"degraded": True} if degraded is not None else {}))
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
