"""Submit: record the intent, act, record the fact."""

from __future__ import annotations

from pathlib import Path

from emflow import __version__
from emflow.errors import ConfigError, NoSpace, SubmitError, Unavailable
from emflow.records import Acquisition, AcquisitionState, Job, JobState, Resources
from emflow.registry import target
from emflow.steps.context import RETRY_S, Context, log
from mpi_kernels.contract import JobSpec, Method, Recipe, SourceSpec
from mpi_kernels.errors import FormatError, printable


def submit(context: Context) -> None:
    """Record the intent, act, record the fact; after any doubt ask for the name before sending anything again."""
    for job in context.journal.jobs_in({JobState.PLANNED, JobState.SUBMITTING}):
        if context.stopping.is_set():
            return
        if context.waits(job.name):
            continue
        with context.going_on(job.name):
            try:
                _submit(context, context.journal.acquisition(job.acquisition), job)
            except NoSpace:
                raise
            except (SubmitError, Unavailable) as error:
                _refused(context, job, error)


def _submit(context: Context, acquisition: Acquisition, job: Job) -> None:
    journal, scheduler = context.journal, context.scheduler
    folder = context.runs.job_folder(acquisition.day, job.name)
    found: list[str] = []
    if job.state is JobState.PLANNED and acquisition.state is not AcquisitionState.SUPERSEDED:
        _write_job(context, acquisition, job, folder)
        job = journal.move_job(job.name, JobState.PLANNED, JobState.SUBMITTING)
    elif job.state is JobState.SUBMITTING:
        found = scheduler.find(job.name, folder)
    if not found and acquisition.state is AcquisitionState.SUPERSEDED:
        journal.move_job(job.name, job.state, JobState.FAILED, reason=f"not sent: {acquisition.reason}")
        return
    scheduler_id = found[0] if found else scheduler.submit(job.name, folder, _resources(context, job))
    journal.move_job(
        job.name,
        JobState.SUBMITTING,
        JobState.SUBMITTED,
        attrs={"scheduler_id": scheduler_id, "adopted": bool(found)},
        scheduler_id=scheduler_id,
    )
    context.clear_alarm("scheduler")
    context.room(0, "the next job")  # an alarm of a full disk may be over
    log.info("submitted %s as %s", job.name, scheduler_id, extra={"job": job.name})


def _write_job(context: Context, acquisition: Acquisition, job: Job, folder: Path) -> None:
    """Write job.json, or keep the one of before a crash: the recipe may have changed since, the data may not."""
    there = context.runs.read_job(folder)
    if there is None:
        context.runs.write_job(_spec(context, acquisition, job), acquisition.day)
    elif (there.job, there.source.digest) != (job.name, acquisition.digest):
        raise SubmitError(
            f"{printable(str(folder))} holds a job over other bytes",
            next_step="Was the journal lost or restored? emflow rebuild makes it from the run folders",
        )


def _refused(context: Context, job: Job, error: SubmitError | Unavailable) -> None:
    if isinstance(error, SubmitError) and not error.transient:
        unsent = {JobState.PLANNED, JobState.SUBMITTING}
        context.journal.move_job(job.name, unsent, JobState.FAILED, reason=f"final: {error}")
        context.clear_alarm("scheduler")  # it answers
        return
    context.raise_alarm("scheduler", str(error))
    context.back_off(job.name, RETRY_S)


def _resources(context: Context, job: Job) -> Resources:
    scheduler = context.config.scheduler
    return Resources(ranks=scheduler.ranks, time_limit_s=scheduler.time_limit_s, memory_mib=job.memory_mib)


def _method(context: Context) -> Method:
    kernels = context.config.kernels
    return Method(device=kernels.device, kernel=kernels.kernel, reading=kernels.reading, threads=kernels.threads)


def _recipe(context: Context, job: Job, whole: Recipe) -> Recipe:
    """The recipe that a job was planned with; by name, and a recipe that was renamed since is the one of now."""
    degraded = context.degraded
    return degraded if degraded is not None and job.recipe == degraded.name else whole


def _spec(context: Context, acquisition: Acquisition, job: Job) -> JobSpec:
    watched = context.watches.get(acquisition.share)
    if watched is None:
        raise ConfigError(context.not_watched(acquisition))
    try:
        kept = context.runs.read_acquisition(acquisition.day, acquisition.id)
    except (FileNotFoundError, FormatError) as error:
        raise SubmitError(
            f"the verified copy is gone: {printable(str(error))}",
            next_step=f"Copy again: emflow retry {acquisition.id}",
        ) from error
    return JobSpec(
        job=job.name,
        acquisition=acquisition.id,
        trace=acquisition.trace,
        recipe=_recipe(context, job, watched.recipe),
        source=SourceSpec(
            path=kept.transfer.path, format=target("formats", acquisition.format), digest=acquisition.digest
        ),
        ranks=context.config.scheduler.ranks,
        method=_method(context),
        attributes={"share": acquisition.share, "path": acquisition.name},
        scheduler=job.scheduler,
        planned_ns=job.planned_ns,
        program=f"emflow {__version__}",
    )
