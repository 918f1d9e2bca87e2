"""Live: what is still being written is copied and reduced meanwhile, once; whatever goes wrong, it is done as usual.

The acquisition stays GROWING, becomes READY and STAGED by the same rules as any other.  Its job follows the
``ready-<n>.json`` that the copy publishes, and ends with the one that has the digest, which `emflow.steps.stage` gives
only to a copy that is what lies on the share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from emflow.growing_copy import Grid, GrowingCopy
from emflow.prober import Growing
from emflow.records import ACTIVE_JOB_STATES, LAST_ATTEMPT, Acquisition, AcquisitionState, Job, JobState, job_name
from emflow.runs import LIVE
from emflow.steps import economy
from emflow.steps.context import Context, Live, Look, log
from emflow.steps.follow import fail
from mpi_kernels.errors import KernelError, printable

KEPT_READY = 20
"""``ready-<n>.json`` that stay: readers want the newest, and may be at one that is a little older."""

UNSTAGED = frozenset(
    {AcquisitionState.GROWING, AcquisitionState.READY, AcquisitionState.STALLED, AcquisitionState.QUARANTINED}
)


def live(context: Context) -> None:
    """Look after the copies that grow, and begin new ones; what an earlier service left is ended first."""
    if not context.leftovers_ended:
        context.leftovers_ended = _end_leftovers(context)
    for entry in list(context.live.values()):
        with context.going_on(entry.id):
            _look_after(context, entry)
    transfer = context.config.transfer
    if not transfer.live or transfer.stage != "copy" or not context.leftovers_ended:
        return
    for look in list(context.looks.values()):
        one = look.acquisition.id
        key = f"{LIVE} {one}"
        # an older copy of it may be under way still, to the same place
        known = one in context.live or one in context.not_live or one in context.transfers
        if not known and look.acquisition.state is AcquisitionState.GROWING and not context.waits(key):
            context.back_off(key, context.config.scan.active_s)
            with context.going_on(key):
                _begin(context, look)


def give_up(context: Context, entry: Live, reason: str) -> None:
    """End a live copy and its job, so that nothing of it can count any more; the usual way follows."""
    entry.copy.stop()
    if entry.job:
        _end(context, context.journal.job(entry.job), reason)
    del context.live[entry.id]
    context.not_live.add(entry.id)
    log.info("no longer live: %s (%s)", entry.id, printable(reason), extra={"acquisition": entry.id})


def stop_copies(context: Context) -> None:
    """End the threads, with the service."""
    for entry in context.live.values():
        entry.copy.stop()


def next_attempt(context: Context, acquisition: Acquisition, jobs: list[Job]) -> int:
    """Number of the next attempt: one that a lost journal knew of has its folder still."""
    if jobs:
        return jobs[-1].attempt + 1
    folder = context.runs.acquisition_folder(acquisition.day, acquisition.id)
    return max((int(path.name) for path in context.runs.job_folders(folder)), default=0) + 1


def _end_leftovers(context: Context) -> bool:
    """End live jobs that an earlier service has started: nobody copies for them any more."""
    for job in context.journal.jobs_in(ACTIVE_JOB_STATES):
        if context.journal.acquisition(job.acquisition).state in UNSTAGED:
            with context.going_on(job.name):
                _end(context, job, "the service was started anew")
    active = context.journal.jobs_in(ACTIVE_JOB_STATES)
    return not any(context.journal.acquisition(job.acquisition).state in UNSTAGED for job in active)


def _end(context: Context, job: Job, reason: str) -> None:
    if job.state not in ACTIVE_JOB_STATES:
        return
    if job.state is not JobState.PLANNED:
        folder = context.runs.job_folder(context.journal.acquisition(job.acquisition).day, job.name)
        found = [job.scheduler_id] if job.scheduler_id else context.scheduler.find(job.name, folder)
        context.scheduler.cancel(*found)
    fail(context, job, f"{LIVE}: {reason}")


def _begin(context: Context, look: Look) -> None:
    acquisition, path = look.acquisition, context.path_of(look.acquisition)
    if path is None or path.is_symlink() or context.journal.jobs(acquisition.id):
        return
    try:
        found = context.prober.probe_growing(os.fspath(path), context.stopping)
    except KernelError:
        return  # not yet, or never: its probe tells people
    if any(Path(member.path).is_symlink() for member in found.header.members):
        return
    grid = Grid(found.first, found.record, found.header.frames)
    if not 0 < grid.whole(path.stat().st_size) < grid.frames:  # nothing to begin with, or no need to
        return
    copy = _copy(context, acquisition, found, grid)
    copy.start()
    context.live[acquisition.id] = Live(acquisition.id, found.format, found.header.frames, copy)
    log.info("live %s (%s)", printable(acquisition.name), found.format, extra={"acquisition": acquisition.id})


def _copy(context: Context, acquisition: Acquisition, found: Growing, grid: Grid) -> GrowingCopy:
    inside = acquisition.relpath.rpartition(b"/")[0]
    folder = os.fsencode(Path(found.header.members[0].path).parent)
    members = tuple(
        (m.path, os.path.normpath(os.path.join(inside, os.path.relpath(os.fsencode(m.path), folder))), m.suffix)  # noqa: PTH118
        for m in found.header.members
    )
    return GrowingCopy(
        members,
        context.runs.make(context.runs.source_folder(acquisition.day, acquisition.id)),
        acquisition.id,
        grid,
        context.config.transfer.min_free,
        _teller(context, acquisition),
    )


def _teller(context: Context, acquisition: Acquisition) -> Callable[[int], None]:
    folder, runs, wake = context.runs.acquisition_folder(acquisition.day, acquisition.id), context.runs, context.wake

    def tell(frames: int) -> None:
        path = runs.publish_ready(folder, frames=frames, complete=False, digest=None)
        number = int(path.stem.partition("-")[2])
        (folder / f"ready-{number - KEPT_READY}.json").unlink(missing_ok=True)
        wake()

    return tell


def _look_after(context: Context, entry: Live) -> None:
    acquisition = context.journal.acquisition(entry.id)
    ended = bool(entry.job) and context.journal.job(entry.job).state is JobState.FAILED
    if acquisition.state not in (AcquisitionState.GROWING, AcquisitionState.READY):
        give_up(context, entry, f"the acquisition is {acquisition.state}: {acquisition.reason}")
    elif ended or entry.copy.failed:
        give_up(context, entry, entry.copy.failed or "its job has ended")
    elif not entry.job and entry.copy.frames and acquisition.state is AcquisitionState.GROWING:
        _plan(context, acquisition, entry)


def _plan(context: Context, acquisition: Acquisition, entry: Live) -> None:
    watched = context.watches.get(acquisition.share)
    slots = context.config.scheduler.max_active - len(context.journal.jobs_in(ACTIVE_JOB_STATES))
    attempt = next_attempt(context, acquisition, context.journal.jobs(acquisition.id))
    if watched is None or slots <= 0 or attempt > LAST_ATTEMPT or not context.room(0, "the next job"):
        return
    if economy.verdict(context, acquisition) != "whole":
        return
    job = Job(
        name=job_name(acquisition.id, attempt),
        acquisition=acquisition.id,
        attempt=attempt,
        state=JobState.PLANNED,
        recipe=watched.recipe.name,
        scheduler=context.config.scheduler.use,
        planned_ns=time.time_ns(),
    )
    context.journal.add_job(job, attrs={"growing": True})
    entry.job = job.name
