"""What a job leaves in its run folder: the result, and partial results on the way."""

from __future__ import annotations

import functools
import time
from pathlib import Path

from mpi_kernels import jsonfile, preview, quality, result
from mpi_kernels.contract import PARTIAL, PREVIEW_FILE, RESULT_FILE, RESULT_H5, JobSpec, ResultManifest
from mpi_kernels.engine import Reduced
from mpi_kernels.events import host_name
from mpi_kernels.plan import Plan

KEPT_PARTIALS = 2
"""A reader that has just seen a partial result's name must have time to open it."""


def publish_result(
    folder: Path, job: JobSpec, plan: Plan, reduced: Reduced, *, ranks: int, begin: float
) -> ResultManifest:
    """Write ``result.h5``, the preview and last, as the commit, ``result.json``; all or nothing.

    Parameters
    ----------
    begin : float
        When the job began, by `time.perf_counter`.
    """
    try:
        before = time.perf_counter()
        draw = functools.partial(_draw, folder / PREVIEW_FILE, plan, reduced)
        digest = result.write(folder / RESULT_H5, job, plan, reduced, meanwhile=draw)
        now = time.perf_counter()
        reduced.seconds |= {"write": now - before, "total": now - begin}
        manifest = _manifest(job, plan, reduced, RESULT_H5, digest, ranks=ranks, preview_file=PREVIEW_FILE)
        jsonfile.publish(folder / RESULT_FILE, jsonfile.encode(manifest))
    except BaseException:
        if not (folder / RESULT_FILE).exists():  # no commit: nothing may look like a result, or fill the disk
            for name in (RESULT_H5, PREVIEW_FILE):
                (folder / name).unlink(missing_ok=True)
        raise
    return manifest


def _draw(path: Path, plan: Plan, reduced: Reduced) -> None:
    """Write the preview; that its name survives a power cut is left to what is published after it."""
    jsonfile.replace(path, preview.contact_sheet(list(result.maps(plan, reduced))))


def publish_partial(folder: Path, number: int, job: JobSpec, plan: Plan, reduced: Reduced, *, ranks: int) -> None:
    """Write ``partial-<number>.h5`` and then its ``.json``; older ones but the last go."""
    name = PARTIAL.format(number)
    digest = result.write(folder / f"{name}.h5", job, plan, reduced)
    manifest = _manifest(job, plan, reduced, f"{name}.h5", digest, ranks=ranks, preview_file=None)
    jsonfile.publish(folder / f"{name}.json", jsonfile.encode(manifest))
    drop_partials(folder, number - KEPT_PARTIALS)


def drop_partials(folder: Path, number: int) -> None:
    """Remove a partial result, its JSON first."""
    if number >= 1:
        for suffix in (".json", ".h5"):
            (folder / f"{PARTIAL.format(number)}{suffix}").unlink(missing_ok=True)


def _manifest(
    job: JobSpec, plan: Plan, reduced: Reduced, file: str, digest: str, *, ranks: int, preview_file: str | None
) -> ResultManifest:
    verdict, reasons = quality.judge(plan, reduced)
    frames = int(reduced.covered.sum())
    return ResultManifest(
        job=job.job,
        acquisition=job.acquisition,
        trace=job.trace,
        recipe=job.recipe.name,
        result=file,
        result_sha256=digest,
        preview=preview_file,
        outputs=tuple(f"/{name}" for name, _ in result.maps(plan, reduced)),
        scalars=result.finite_scalars(reduced.scalars),
        skipped=plan.skipped,
        frames=frames,
        coverage=frames / plan.header.frames,
        partial=frames < plan.header.frames,
        quality=verdict,
        quality_reasons=reasons,
        seconds={name: round(value, 6) for name, value in reduced.seconds.items()},
        ranks=ranks,
        host=host_name(),
        source_digest=job.source.digest,
        wall_ns=time.time_ns(),
        program=job.program or result.PROGRAM,
        method=reduced.method,
    )
