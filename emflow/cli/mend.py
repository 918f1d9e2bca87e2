"""Commands that put things right: retry, rebuild."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from emflow.cli.look import one
from emflow.cli.options import configuration, journal_of, json_option, print_json
from emflow.config import Config
from emflow.errors import UsageError
from emflow.journal import Journal
from emflow.recipes import load_recipe
from emflow.records import ACTIVE_JOB_STATES, LAST_ATTEMPT, Acquisition, AcquisitionState, Job, JobState, job_name
from emflow.runs import RunFolders, holder
from mpi_kernels.errors import FormatError

RETRYABLE = (AcquisitionState.DONE, AcquisitionState.QUARANTINED, AcquisitionState.STALLED)


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.pass_context
def retry(ctx: click.Context, ids: tuple[str, ...]) -> None:
    """Try again what was set aside, or run a finished acquisition once more.

    What was never copied, or whose copy is gone, is looked at anew; what was copied gets one more job with the recipe
    as it is now.
    """
    config = configuration(ctx)
    with journal_of(config, read_only=False) as journal:
        for id_ in ids:
            click.echo(_retry(config, journal, one(journal, id_)))
    if holder(config.service.state) is None:
        click.echo("No service is running: start it with emflow run")


def _retry(config: Config, journal: Journal, acquisition: Acquisition) -> str:
    if acquisition.state not in RETRYABLE:
        raise UsageError(
            f"{acquisition.id} is {acquisition.state}, not one of {', '.join(RETRYABLE)}",
            next_step=f"See what it waits for: emflow trace {acquisition.id}",
        )
    jobs = journal.jobs(acquisition.id)
    if any(job.state in ACTIVE_JOB_STATES for job in jobs):
        raise UsageError(
            f"{acquisition.id} has a job under way", next_step=f"See what it does: emflow trace {acquisition.id}"
        )
    gone = acquisition.digest is not None and not _copy_is_there(config, acquisition)
    if acquisition.digest is None or gone:
        because = "emflow retry" + (": the copy is gone" if gone else "")
        journal.move_acquisition(
            acquisition.id, acquisition.state, AcquisitionState.GROWING, attrs={"because": because}, digest=None
        )
        return f"{acquisition.id}: {'its copy is gone: it ' if gone else ''}will be looked at again"
    return _one_more_job(config, journal, acquisition, jobs)


def _copy_is_there(config: Config, acquisition: Acquisition) -> bool:
    try:
        record = RunFolders(config.service.runs).read_acquisition(acquisition.day, acquisition.id)
    except (FileNotFoundError, NotADirectoryError, FormatError):
        return False
    return Path(record.transfer.path).exists()


def _one_more_job(config: Config, journal: Journal, acquisition: Acquisition, jobs: Sequence[Job]) -> str:
    attempt = jobs[-1].attempt + 1 if jobs else 1
    if attempt > LAST_ATTEMPT:
        raise UsageError(
            f"{acquisition.id} has had {LAST_ATTEMPT} jobs, and names for no more",
            next_step="Use emflow reduce, or copy the file to another name on the share",
        )
    job = Job(
        name=job_name(acquisition.id, attempt),
        acquisition=acquisition.id,
        attempt=attempt,
        state=JobState.PLANNED,
        recipe=_recipe_name(config, acquisition),
        scheduler=config.scheduler.use,
        planned_ns=time.time_ns(),
    )
    with journal.transaction():
        journal.move_acquisition(
            acquisition.id, acquisition.state, AcquisitionState.STAGED, attrs={"because": "emflow retry"}
        )
        journal.add_job(job)
    return f"{acquisition.id}: job {job.name} planned"


def _recipe_name(config: Config, acquisition: Acquisition) -> str:
    for watch in config.watch:
        if watch.share == acquisition.share:
            return load_recipe(watch.recipe, relative_to=config.folder).name
    raise UsageError(f"share {acquisition.share!r} is not in the configuration any more", next_step="Add its [[watch]]")


@click.command()
@click.option("--force", is_flag=True, help="Do it although the run folders hold nothing of what the journal knows.")
@json_option
@click.pass_context
def rebuild(ctx: click.Context, as_json: bool, force: bool) -> None:
    """Make the journal anew from the run folders; the old one is kept beside it."""
    from emflow.rebuild import rebuild as rebuild_journal

    config = configuration(ctx)
    service = config.service
    done = rebuild_journal(
        RunFolders(service.runs), service.state / "journal.sqlite", results=service.results, force=force
    )
    if as_json:
        print_json(done)
        return
    click.echo(f"{done.acquisitions} acquisitions, {done.jobs} jobs, {done.events} events from {config.service.runs}")
    if done.backup is not None:
        click.echo(f"the journal before is kept as {done.backup}")
    for problem in done.problems:
        click.echo(f"skipped: {problem}", err=True)
