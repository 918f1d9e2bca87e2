"""Pools as the scheduler keeps them, on this machine under mpiexec or on a real Slurm; none outlives its test."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.cluster import Cluster
from emflow import registry
from emflow.config import Config, load
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.runs import RunFolders
from emflow.schedulers.pool import PoolScheduler
from emflow.schedulers.pool_folder import PoolFolder, Sent
from emflow.schedulers.pool_setup import end_pools
from mpi_kernels import jsonfile
from mpi_kernels.contract import JOB_FILE, RESULT_FILE, JobSpec, Recipe, ReductionSpec, SourceSpec
from mpi_kernels.events import read_events

WAIT_S = 40.0
ALIVE = (SchedulerPhase.PENDING, SchedulerPhase.RUNNING)
DAY = "2024-05-01"


class Yard:
    """A configuration, its pools, and a scheduler that the test takes turns with, as a service would."""

    def __init__(self, root: Path, launcher: str, **pool: Any) -> None:
        self.root = root
        np.save(root / "scan.npy", np.arange(2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5))
        self.toml = root / "emflow.toml"
        self.toml.write_text(
            '[[watch]]\nroot = "share"\n[scheduler]\nuse = "pool"\nranks = 2\n'
            f'[pool]\nlauncher = "{launcher}"\nwalltime_s = 300\n'
        )
        config = load(self.toml)
        self.config: Config = msgspec.structs.replace(config, pool=msgspec.structs.replace(config.pool, **pool))
        self.folder = PoolFolder(self.config.pool.folder)
        self.schedulers: list[PoolScheduler] = []
        self.closed = False
        self.scheduler = self.new_service()
        self.ids: dict[str, str] = {}
        self._acquisition = hashlib.blake2b(bytes(root), digest_size=8).hexdigest()

    def new_service(self, stale_s: float = 20.0) -> PoolScheduler:
        """A scheduler that knows only what the files say."""
        self.scheduler = PoolScheduler(self.config, stale_s=stale_s)
        self.schedulers.append(self.scheduler)
        return self.scheduler

    def until(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
        """Take turns until something is so."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} after {seconds:g} s: {self.story()}"
            self.scheduler.tend()
            time.sleep(0.02)
        return found

    def up(self, count: int = 1) -> list[str]:
        """Wait until so many pools take tasks; their names."""
        return self.until(lambda: len(found := self.taking()) >= count and found, f"not {count} pools up")

    def taking(self) -> list[str]:
        return [pool.name for pool in self.scheduler.pools() if pool.takes]

    def allocations(self) -> list[str]:
        return self.scheduler.allocations()

    def job(self, number: int, *, waits: bool = False) -> tuple[str, Path]:
        """A run folder; a job that ``waits`` follows an acquisition that grows no further until `finish`."""
        name = f"{self._acquisition}-{number:02d}"
        folder = self.root / "runs" / DAY / self._acquisition / f"{number:02d}"
        folder.mkdir(parents=True)
        spec = JobSpec(
            job=name,
            acquisition=self._acquisition,
            trace=self._acquisition,
            recipe=Recipe(
                name="test", reductions=(ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="p"),)
            ),
            source=SourceSpec(path=str(self.root / "scan.npy"), format=registry.target("formats", "npy")),
            ranks=2,
            growing=waits,
            stall_s=300.0,
        )
        jsonfile.publish(folder / JOB_FILE, jsonfile.encode(spec))
        if waits:
            RunFolders(self.root).publish_ready(folder.parent, frames=1, complete=False, digest=None)
        return name, folder

    def submit(self, number: int, *, waits: bool = False, time_limit_s: int = 120) -> str:
        """Send a job; its name."""
        name, folder = self.job(number, waits=waits)
        self.ids[name] = self.scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=time_limit_s))
        return name

    def finish(self) -> None:
        """Let the jobs that wait come to their end."""
        folder = self.root / "runs" / DAY / self._acquisition
        RunFolders(self.root).publish_ready(folder, frames=6, complete=True, digest="d" * 32)

    def poll(self) -> dict[str, JobStatus]:
        return self.scheduler.poll(self.ids)

    def status(self, name: str) -> JobStatus:
        return self.poll()[name]

    def runs(self, name: str) -> None:
        """Wait until a job has begun."""
        self.until(lambda: self.status(name).phase is SchedulerPhase.RUNNING, f"{name} does not run")

    def all_ended(self, seconds: float = WAIT_S) -> dict[str, JobStatus]:
        """Wait until no job is alive; what is said of each."""

        def over() -> dict[str, JobStatus] | None:
            said = self.poll()
            return said if all(status.phase not in ALIVE for status in said.values()) else None

        return self.until(over, "jobs do not end", seconds)

    def sent(self, name: str) -> Sent:
        found = PoolFolder(self.config.pool.folder).sent(name)
        assert found is not None
        return found

    def has_result(self, name: str) -> bool:
        return (self.run_folder(name) / RESULT_FILE).exists()

    def run_folder(self, name: str) -> Path:
        return self.root / "runs" / DAY / self._acquisition / name[-2:]

    def claims(self, name: str) -> int:
        """How often ranks began a job."""
        paths = self.run_folder(name).glob("events-*.jsonl")
        return sum(event.name == "claimed" for path in paths for event in read_events(path))

    def story(self) -> str:
        """What a failure needs to be understood."""
        closed = {name: self.folder.closed(name) for name in self.folder.names()}
        outputs = [path.read_text("utf-8", "replace")[-500:] for path in self.folder.root.glob("*/job.out")]
        return f"{self.scheduler.pools()}\n{closed}\n{self.poll()}\n{outputs}"

    def close(self) -> None:
        """End everything, once."""
        if self.closed:
            return
        self.closed = True
        for scheduler in self.schedulers:
            scheduler.close()
        assert end_pools(self.config)


@pytest.fixture
def make_yard(tmp_path: Path) -> Iterator[Callable[..., Yard]]:
    """Make yards; ``launcher`` and keys of ``[pool]``."""
    made: list[Yard] = []

    def make(launcher: str = "mpiexec", **pool: Any) -> Yard:
        root = tmp_path / f"yard{len(made)}"
        root.mkdir()
        made.append(Yard(root, launcher, **pool))
        return made[-1]

    yield make
    for yard in made:
        yard.close()


@pytest.fixture
def yard(make_yard: Callable[..., Yard]) -> Yard:
    """Pools of two ranks under mpiexec."""
    return make_yard()


@pytest.fixture
def shared(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster of the whole run: nothing of it may be hurt."""
    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    return slurm
