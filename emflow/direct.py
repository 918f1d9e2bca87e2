"""Reduce one file where it lies, through the same run folder and kernels, with no service."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

from emflow import __version__
from emflow.errors import EmflowError, UsageError
from emflow.prober import Prober
from emflow.records import Resources, SchedulerPhase, acquisition_id, job_name
from emflow.registry import names, target
from emflow.runs import RunFolders
from emflow.schedulers.local import LocalScheduler
from emflow.transfer import publish_copy
from mpi_kernels.contract import (
    AUTO,
    PREVIEW_FILE,
    RESULT_H5,
    JobSpec,
    Method,
    Recipe,
    ResultManifest,
    SourceSpec,
)
from mpi_kernels.errors import KernelError, printable

POLL_S = 0.02
NAME_MAX = 255
"""Bytes of a file's name.  Source: limits.h."""

TIME_LIMIT_S = 30 * 86400
"""A person waits for it and can stop it."""


def output_path(path: Path, output: Path | None, *, folder: bool = False) -> Path:
    """Where the result of a file goes: as asked, else ``<stem>_emflow.h5`` in the current folder.

    ``folder`` says that ``output`` is a folder, also where it is not there yet.
    """
    if output is not None and not folder and not output.is_dir():
        return output
    stem = path.stem
    while len(os.fsencode(stem)) > NAME_MAX - len("_emflow.h5"):
        stem = stem[:-1]
    return (output or Path.cwd()) / f"{stem or 'result'}_emflow.h5"


def reduce_file(
    path: Path,
    recipe: Recipe,
    output: Path,
    *,
    ranks: int = 1,
    scan_shape: tuple[int, ...] | None = None,
    method: Method = AUTO,
) -> ResultManifest:
    """Reduce a file and put the result at ``output``, with the preview (``.png``) beside it.

    Parameters
    ----------
    path : Path
        The main file of an acquisition in any registered format; it is only read.
    recipe : Recipe
        What to compute.
    output : Path
        The result file.
    ranks : int
        MPI ranks; with more than one, mpiexec is started.
    scan_shape : tuple of int, optional
        Overrides the recipe's and the file's.
    method : Method
        How to compute.

    Raises
    ------
    KernelError
        The file or the recipe is wrong: it names the file, the frame and the next step.
    Unavailable
        MPI is not there.
    """
    if output.exists() and path.exists() and output.samefile(path):
        raise UsageError("the output would replace the input", next_step="Choose another -o")
    if scan_shape is not None:
        recipe = dataclasses.replace(recipe, scan_shape=scan_shape)
    formats = {name: target("formats", name) for name in names("formats")}
    with Prober(formats) as prober:
        name, _ = prober.probe(os.path.abspath(path))  # noqa: PTH100  resolve() would follow links
    acquisition = acquisition_id("", os.fsencode(os.path.abspath(path)), 0)  # noqa: PTH100
    with tempfile.TemporaryDirectory(prefix="emflow-") as scratch:
        runs = RunFolders(Path(scratch))
        spec = JobSpec(
            job=job_name(acquisition, 1),
            acquisition=acquisition,
            trace=acquisition,
            recipe=recipe,
            source=SourceSpec(path=os.path.abspath(path), format=formats[name]),  # noqa: PTH100
            ranks=ranks,
            method=method,
            attributes={"path": printable(path.name)},
            program=f"emflow {__version__}",
        )
        folder = runs.write_job(spec, day="1970-01-01")
        _run(folder, spec.job, ranks)
        manifest = runs.read_result(folder)
        if manifest is None:
            raise _error(runs, folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        publish_copy(folder / RESULT_H5, output)
        if (folder / PREVIEW_FILE).exists():
            publish_copy(folder / PREVIEW_FILE, output.with_suffix(".png"))
        return manifest


def _run(folder: Path, name: str, ranks: int) -> None:
    """Run the job as the local scheduler does and wait for it; an interrupt ends it with all its processes."""
    scheduler = LocalScheduler()
    try:
        scheduler_id = scheduler.submit(name, folder, Resources(ranks=ranks, time_limit_s=TIME_LIMIT_S))
        while scheduler.poll({name: scheduler_id})[name].phase is not SchedulerPhase.ENDED:
            time.sleep(POLL_S)
    except BaseException:
        scheduler.cancel(*scheduler.find(name, folder))  # found also if the interrupt came before its id was told
        raise


def _error(runs: RunFolders, folder: Path) -> EmflowError | KernelError:
    record = runs.read_error(folder)
    if record is not None:
        error = KernelError(record.message, path=record.path, frame=record.frame, next_step=record.next_step)
        error.code = record.code
        return error
    said = (folder / "job.out").read_text("utf-8", "replace").strip().splitlines()[-5:]
    return EmflowError("the kernels ended without a result: " + " | ".join(said), next_step="Test MPI: emflow check")
