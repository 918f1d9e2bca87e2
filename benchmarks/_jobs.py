"""Run folders, configurations and a service for benchmarks of the ways in which jobs are started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.cluster import Cluster
from emflow.config import Config, load
from emflow.demo.processes import Part, running
from emflow.journal import Journal
from emflow.records import AcquisitionState, Job
from emflow.registry import target
from mpi_kernels import jsonfile
from mpi_kernels.contract import RESULT_FILE, JobSpec, Recipe, ReductionSpec, SourceSpec

SCAN = (64, 64, 64, 64)
"""33 MB of uint16: what a live acquisition is."""

CONFIGURATION = """\
[[watch]]
root = "share"

[scan]
active_s = 0.05
settle_s = 0.05

[transfer]
min_free = "64 MiB"

[scheduler]
use = "{use}"
ranks = {ranks}
max_active = {max_active}
poll_s = {poll_s}
time_limit_s = 600

{more}
"""


def configure(
    folder: Path, use: str, *, ranks: int = 2, max_active: int = 1, poll_s: float = 0.05, more: str = ""
) -> Config:
    """A folder with a configuration and an empty share."""
    (folder / "share").mkdir(parents=True)
    text = CONFIGURATION.format(use=use, ranks=ranks, max_active=max_active, poll_s=poll_s, more=more)
    (folder / "emflow.toml").write_text(text, encoding="utf-8")
    return load(folder / "emflow.toml")


@contextlib.contextmanager
def on(cluster: Cluster) -> Iterator[None]:
    """Slurm's commands of this process and its children talk to a cluster."""
    before = os.environ.get("SLURM_CONF")
    os.environ.update(cluster.environment)
    try:
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


def write_scan(path: Path, shape: tuple[int, ...] = SCAN, seed: int = 0) -> Path:
    """Counts of a few electrons a pixel, as uint16 .npy; it appears under its name at once."""
    counts = np.random.default_rng(seed).poisson(3.0, shape).astype(np.uint16)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, counts)
    return temporary.rename(path)


def run_folder(root: Path, number: int, source: Path, *, ranks: int) -> tuple[str, Path]:
    """A run folder with its job.json over a file, as the service makes it; the job's name and the folder."""
    acquisition = f"{number:016x}"
    folder = root / "2026-01-01" / acquisition / "01"
    folder.mkdir(parents=True)
    reductions = (
        ReductionSpec(use="mpi_kernels.reductions.virtual_image:VirtualImage", name="bf"),
        ReductionSpec(
            use="mpi_kernels.reductions.virtual_image:VirtualImage", name="adf", parameters={"shape": "annulus"}
        ),
        ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern"),
        ReductionSpec(use="mpi_kernels.reductions.centre_of_mass:CentreOfMass", name="com"),
    )
    spec = JobSpec(
        job=f"{acquisition}-01",
        acquisition=acquisition,
        trace=acquisition,
        recipe=Recipe(name="bench", reductions=reductions),
        source=SourceSpec(path=str(source), format=target("formats", "npy")),
        ranks=ranks,
    )
    jsonfile.publish(folder / "job.json", jsonfile.encode(spec))
    return spec.job, folder


def until(condition: Callable[[], object], what: str, seconds: float = 120.0, nap_s: float = 0.002) -> None:
    """Wait for something, looking often."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(nap_s)


def until_result(folder: Path, seconds: float = 120.0) -> float:
    """When a run folder had its result, by `time.perf_counter`."""
    until((folder / RESULT_FILE).exists, f"a result in {folder}", seconds)
    return time.perf_counter()


@contextlib.contextmanager
def service(config: Config) -> Iterator[Part]:
    """``emflow run`` as a process, until its journal is there."""
    arguments = ["-c", str(config.folder / "emflow.toml"), "run"]
    with running("service", arguments, config.folder) as part:
        until((config.service.state / "journal.sqlite").exists, "the service's start", nap_s=0.02)
        yield part


def until_done(config: Config, count: int, part: Part, seconds: float) -> None:
    """Wait until so many acquisitions are done."""
    with Journal(config.service.state / "journal.sqlite", read_only=True) as journal:

        def done() -> bool:
            if part.ended:
                raise RuntimeError(f"the service ended: {part.log.read_text('utf-8', 'replace')[-2000:]}")
            return journal.counts()[0].get(AcquisitionState.DONE, 0) >= count

        until(done, f"{count} acquisitions done", seconds, nap_s=0.02)


def jobs_of(config: Config) -> list[tuple[Job, dict[str, int]]]:
    """Every job with the times of its acquisition's events and, after their plane, its own: ns, this host's clock."""
    with Journal(config.service.state / "journal.sqlite", read_only=True) as journal:
        found = []
        for acquisition in journal.acquisitions(set(AcquisitionState)):
            times = {event.name: event.mono_ns for _, event in journal.events(subject=acquisition.id)}
            for job in journal.jobs(acquisition.id):
                own: dict[str, int] = {}
                for _, event in journal.events(subject=job.name):
                    own.setdefault(f"{event.plane} {event.name}", event.mono_ns)
                found.append((job, times | own))
        return found
