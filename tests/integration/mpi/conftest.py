"""Real pools of warm ranks, and run folders for them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from mpi_kernels import jsonfile
from mpi_kernels.contract import JobSpec, Recipe, ReductionSpec, SourceSpec
from mpi_kernels.events import host_name
from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.records import Ended, Endpoint, PoolSpec, Task, TaskEnd

ROOT = Path(__file__).resolve().parents[3]
NPY = "mpi_kernels.formats.npy:Npy"
FAULTY = "faulty:Faulty"
WAIT_S = 30.0


def until(condition: Callable[[], Any], what: str, seconds: float = WAIT_S, log: Path | None = None) -> Any:
    """Wait for something; a log is in the error."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what} after {seconds:g} s\n{'' if log is None else log.read_text()}")
        time.sleep(0.005)
    return found


class Yard:
    """Run folders and pools below one folder."""

    def __init__(self, base: Path, kernels: SimpleNamespace) -> None:
        self.base, self.kernels, self.runs = base, kernels, base / "runs"
        self.secret = base / "pool" / "secret"
        self.secret.parent.mkdir(parents=True)
        self.write_secret(self.secret)
        self.scan = base / "scan.npy"
        data = np.random.default_rng(7).poisson(3, (6, 7, 20, 24)).astype(np.float32)
        np.save(self.scan, data)
        self._jobs = self._pools = 0

    @staticmethod
    def write_secret(path: Path, mode: int = 0o600) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        os.write(fd, secrets.token_hex(32).encode())
        os.close(fd)

    def task(
        self,
        source: Path | None = None,
        form: str = NPY,
        *,
        ranks: int = 2,
        reductions: Sequence[ReductionSpec] | None = None,
        **facts: Any,
    ) -> Task:
        """A job in its run folder."""
        self._jobs += 1
        acquisition = f"{self._jobs:016x}"
        task = Task(job=f"{acquisition}-01", folder=f"2026-11-28/{acquisition}/01")
        job = JobSpec(
            job=task.job,
            acquisition=acquisition,
            trace="feedbeef",
            recipe=Recipe(name="standard", reductions=tuple(reductions or self.kernels.standard)),
            source=SourceSpec(path=str(source or self.scan), format=form, digest="0" * 32),
            ranks=ranks,
            **facts,
        )
        self.folder(task).mkdir(parents=True)
        jsonfile.publish(self.folder(task) / "job.json", jsonfile.encode(job))
        return task

    def faulty(self, how: str, at: int = -1, *, frames: int = 40, ranks: int = 2) -> Task:
        """A job whose source fails, or takes its time."""
        path = self.base / f"{how}-{at}-{frames}.faulty"
        path.write_text(json.dumps({"frames": frames, "at": at, "how": how}))
        return self.task(path, FAULTY, ranks=ranks, block_bytes=64)

    def long(self) -> Task:
        """A job over 2 TB: frame i is frame i % 16 of a small file."""
        np.save(self.base / "base.npy", np.random.default_rng(3).poisson(5, (16, 512, 512)).astype("<u2"))
        path = self.base / "long.cycling"
        path.write_text(json.dumps({"frames": 4_000_000, "of": str(self.base / "base.npy")}))
        return self.task(path, "cycling:Cycling", reductions=self.kernels.standard[2:3])

    def folder(self, task: Task) -> Path:
        return self.runs / task.folder

    def has(self, task: Task, name: str = "result.json") -> bool:
        return (self.folder(task) / name).exists()

    def maps(self, task: Task) -> dict[str, bytes]:
        """Every map of a result, as bytes."""
        manifest = json.loads((self.folder(task) / "result.json").read_text())
        with h5py.File(self.folder(task) / "result.h5") as file:
            return {name: file[name]["data"][()].tobytes() for name in manifest["outputs"]}

    def instance(self, **facts: Any) -> Path:
        """The folder of a pool that is yet to be started."""
        self._pools += 1
        name = f"20261128T120000-{self._pools:02d}"
        folder = self.base / "pool" / name
        folder.mkdir()
        spec = PoolSpec(name=name, runs=str(self.runs), ranks=2, secret=str(self.secret), gateway=host_name())
        jsonfile.publish(folder / "pool.json", jsonfile.encode(replace(spec, **facts)))
        return folder


class Pool:
    """A pool that was started: its folder, the process that holds it, and a client."""

    def __init__(self, yard: Yard, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.yard, self.folder, self.process, self.log = yard, folder, process, log
        self.client = PoolClient(folder, timeout_s=10.0)
        self.ends: list[TaskEnd] = []

    def ready(self, life: int = 1) -> Endpoint:
        """Wait until it takes tasks."""

        def listens() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            found = self.client.endpoint()
            return found is not None and found.life >= life

        until(listens, "the pool does not start", log=self.log)
        endpoint = self.client.endpoint()
        assert endpoint is not None
        return endpoint

    def send(self, task: Task, time_limit_s: float = 0.0) -> None:
        self.client.send(task.job, task.folder, time_limit_s=time_limit_s)

    def end_of(self, task: Task) -> TaskEnd:
        """Wait until the pool says that a task has ended."""

        def said() -> TaskEnd | None:
            self.ends += self.client.ended()
            return next((end for end in self.ends if end.job == task.job), None)

        found: TaskEnd = until(said, f"{task.job} does not end", log=self.log)
        return found

    def ended(self) -> Ended:
        """Wait until the pool has ended, and its process too."""
        self.process.wait(WAIT_S)
        last = self.client.last()
        assert last is not None, self.log.read_text()
        return last

    def ranks(self) -> list[int]:
        """Pids of its ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"mpi_kernels.pool" in words and str(self.folder).encode() in words and b"-hosts" not in words:
                    found.append(int(entry.name))
        return sorted(pid for pid in found if b"mpiexec" not in Path(f"/proc/{pid}/cmdline").read_bytes())

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture(scope="session", name="until")
def _until() -> Callable[..., Any]:
    """Waits for something."""
    return until


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, kernels: SimpleNamespace) -> Yard:
    """Where the pools of a module and their run folders are."""
    return Yard(tmp_path_factory.mktemp("yard"), kernels)


@contextlib.contextmanager
def started(yard: Yard, mpiexec: str, folder: Path, *, script: bool = False) -> Iterator[Pool]:
    """A pool under mpiexec, or under pool.sbatch which starts its ranks again."""
    spec = json.loads((folder / "pool.json").read_text())
    program = [mpiexec, "-n", str(spec["ranks"]), sys.executable, "-m", "mpi4py", "-m", "mpi_kernels.pool", str(folder)]
    environment = yard.kernels.environment()
    if script:
        program = ["bash", "--", str(ROOT / "slurm" / "pool.sbatch"), str(folder)]
        more = {"EMFLOW_LAUNCHER": mpiexec, "EMFLOW_RANKS": str(spec["ranks"]), "EMFLOW_PYTHON": sys.executable}
        environment |= more
    log = folder / "pool.out"
    with log.open("wb") as out:
        process = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    pool = Pool(yard, folder, process, log)
    try:
        yield pool
    finally:
        pool.stop()
        for pid in pool.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(yard: Yard, mpiexec: str) -> Iterator[Callable[..., Pool]]:
    """Starts pools, and ends them."""
    with contextlib.ExitStack() as stack:

        def begin(folder: Path | None = None, *, script: bool = False, **facts: Any) -> Pool:
            chosen = yard.instance(**facts) if folder is None else folder
            return stack.enter_context(started(yard, mpiexec, chosen, script=script))

        yield begin


@pytest.fixture(scope="module")
def pool(yard: Yard, mpiexec: str) -> Iterator[Pool]:
    """One pool of two ranks for the tests of a module that do it no harm."""
    with started(yard, mpiexec, yard.instance()) as found:
        found.ready()
        yield found
