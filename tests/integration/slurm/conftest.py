"""Clusters that a test may hurt, run folders, and commands of Slurm that fail when they are told to."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import cluster
from benchmarks.cluster import Cluster
from emflow import registry
from emflow.config import load
from emflow.errors import Unavailable
from emflow.records import JobStatus, SchedulerPhase
from emflow.schedulers.slurm import SlurmScheduler
from mpi_kernels import jsonfile
from mpi_kernels.contract import CLAIM_FILE, ERROR_FILE, JOB_FILE, JobSpec, Recipe, ReductionSpec, SourceSpec

HERE = Path(__file__).parent
QUICK = "MessageTimeout=4"
"""Commands give up on a controller that hangs after 4 s instead of 10."""

ALIVE = (SchedulerPhase.PENDING, SchedulerPhase.RUNNING)


@pytest.fixture
def make_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Start a cluster of the test's own, which the test's commands then talk to."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> Cluster:
            made = stack.enter_context(cluster.running(tmp_path / "cluster", **settings))
            for key, value in made.environment.items():
                monkeypatch.setenv(key, value)
            return made

        yield make


@pytest.fixture
def own(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster that the test may hurt."""
    return make_cluster()


@pytest.fixture
def hanging(make_cluster: Callable[..., Cluster]) -> Cluster:
    """One whose controller the test may hang, and whose commands wait less long for it."""
    return make_cluster(extra=QUICK)


@pytest.fixture
def shared(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster of the whole run: nothing of it may be hurt."""
    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    return slurm


def make_scheduler(root: Path, more: str = "", **options: Any) -> SlurmScheduler:
    """The scheduler as a configuration makes it."""
    path = root / "emflow.toml"
    path.write_text(f'[[watch]]\nroot = "share"\n[scheduler]\nuse = "slurm"\n{more}')
    return SlurmScheduler(load(path), **options)


PATTERN = ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="p")


def plan(
    root: Path, number: int = 1, ranks: int = 1, *, waits: bool = False, reduction: ReductionSpec = PATTERN
) -> tuple[str, Path]:
    """A run folder; a job that ``waits`` is one of an acquisition that does not grow: it runs for most of a minute."""
    acquisition = hashlib.blake2b(bytes(root), digest_size=8).hexdigest()
    name, folder = f"{acquisition}-{number:02d}", root / "runs" / "2024-05-01" / acquisition / f"{number:02d}"
    folder.mkdir(parents=True)
    source = root / "scan.npy"
    np.save(source, np.arange(2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5))
    spec = JobSpec(
        job=name,
        acquisition=acquisition,
        trace=acquisition,
        recipe=Recipe(name="test", reductions=(reduction,)),
        source=SourceSpec(path=str(source), format=registry.target("formats", "npy")),
        ranks=ranks,
        growing=waits,
    )
    jsonfile.publish(folder / JOB_FILE, jsonfile.encode(spec))
    return name, folder


def eventually(condition: Callable[[], object], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"did not happen within {seconds:g} s"
        time.sleep(0.05)


def status(scheduler: SlurmScheduler, name: str, scheduler_id: str) -> JobStatus:
    """What is said of a job, once something is said: on a busy machine Slurm may take longer than its commands wait."""
    heard: list[JobStatus] = []

    def answered() -> bool:
        with contextlib.suppress(Unavailable):
            heard.append(scheduler.poll({name: scheduler_id})[name])
        return bool(heard)

    eventually(answered)
    return heard[0]


def until_ended(scheduler: SlurmScheduler, name: str, scheduler_id: str, seconds: float = 90.0) -> JobStatus:
    eventually(lambda: status(scheduler, name, scheduler_id).phase not in ALIVE, seconds)
    return status(scheduler, name, scheduler_id)


def until_claimed(folder: Path) -> None:
    """The ranks are there, and rank 0 has begun."""
    eventually(lambda: (folder / CLAIM_FILE).exists() or (folder / ERROR_FILE).exists())
    assert (folder / CLAIM_FILE).exists(), (folder / "job.out").read_text()


def processes_of(folder: Path) -> list[int]:
    """Live processes that name a run folder in their command."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            named = entry.name.isdigit() and bytes(folder) in (entry / "cmdline").read_bytes()
            if named and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(entry.name))
    return found


@pytest.fixture
def jobs() -> SimpleNamespace:
    """What the tests of Slurm share."""
    return SimpleNamespace(
        make_scheduler=make_scheduler,
        plan=plan,
        eventually=eventually,
        status=status,
        until_ended=until_ended,
        until_claimed=until_claimed,
        processes_of=processes_of,
        quick=QUICK,
        recorded=HERE / "recorded",
    )


_WRAPPER = """\
#!/bin/bash
# The real {name}, but for its first call, which does what the test wants done.
real={real}
if ! mkdir -- {once} 2>/dev/null; then exec "$real" "$@"; fi
{body}
"""


@pytest.fixture
def first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Let the first call of a command of Slurm go wrong: a line of bash in which ``$real`` is the command itself."""

    def arrange(name: str, body: str) -> Path:
        folder = tmp_path / "path"
        folder.mkdir()
        once, real = tmp_path / "called", shutil.which(name)
        (folder / name).write_text(_WRAPPER.format(name=name, real=real, once=f"'{once}'", body=body))
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return once

    return arrange


@pytest.fixture(scope="session")
def services() -> ModuleType:
    """`Place` and `Service` of the tests of the whole service."""
    path = HERE.parents[1] / "system" / "conftest.py"
    spec = importlib.util.spec_from_file_location("services_of_the_slurm_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module
