"""The parts of one service on a temporary folder, real but for its clock, and turned by hand."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest

from emflow.config import (
    Bytes,
    CapSettings,
    Config,
    ScanSettings,
    SchedulerSettings,
    ServiceSettings,
    SlurmSettings,
    TransferSettings,
    Watch,
    default_match,
)
from emflow.errors import Unavailable
from emflow.journal import Journal
from emflow.pipeline import STEPS, load_looks
from emflow.prober import Prober
from emflow.recipes import load_recipe
from emflow.records import Acquisition, AcquisitionState, Job, JobStatus, Resources, SchedulerPhase
from emflow.registry import names, target
from emflow.runs import RunFolders
from emflow.schedulers.null import NullScheduler
from emflow.schedulers.protocol import Finding, Rehearsal, Scheduler
from emflow.steps.context import Context, Watched
from emflow.steps.notice import notice
from emflow.watch.scan import Scanner
from emflow.watch.settle import Settling
from emflow.watch.waiting import NoHints
from mpi_kernels import jsonfile
from mpi_kernels.contract import Claim, ErrorRecord

P = SchedulerPhase
GOOD = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.began = time.time() - self.now

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        """Seconds since 1970, which pass as the others do."""
        return self.began + self.now


class Bench:
    """A share and a service's folders; `open` puts a service on them, as often as a test kills one."""

    def __init__(self, folder: Path, prober: Prober) -> None:
        self.folder, self.share = folder, folder / "share"
        self.share.mkdir(parents=True)
        self.clock = Clock()
        self.prober = prober
        self.scan = ScanSettings()
        self.transfer = TransferSettings(min_free=Bytes(0))
        self.scheduling = SchedulerSettings(use="null", ranks=1)
        self.slurm = SlurmSettings()
        self.caps = CapSettings()
        self.recipe = "quick"
        self.scheduler: Scheduler = NullScheduler()
        self.context: Context
        self._open: list[contextlib.ExitStack] = []

    def open(self, *, shares: bool = True) -> Bench:
        """A new service on the folders; an older one is dropped as a kill would: nothing of it is closed."""
        service = ServiceSettings(
            state=self.folder / "state", runs=self.folder / "runs", results=self.folder / "results"
        )
        service.state.mkdir(exist_ok=True)
        stack = contextlib.ExitStack()
        self._open.append(stack)
        watch = Watch(root=self.share, share="share", recipe=self.recipe)
        journal = stack.enter_context(Journal(service.state / "journal.sqlite"))
        scanner = Scanner(
            self.share,
            match=default_match(),
            active_s=self.scan.active_s,
            recent_s=self.scan.recent_s,
            whole_s=self.scan.whole_s,
            clock=self.clock,
        )
        scanner.load((a.relpath, a.fingerprint) for a in journal.known("share"))
        hints = NoHints()
        stack.callback(hints.close)
        watched = Watched("share", self.share, load_recipe(self.recipe, relative_to=self.folder), scanner, hints)
        self.context = Context(
            config=Config(
                folder=self.folder,
                watch=(watch,),
                service=service,
                scan=self.scan,
                transfer=self.transfer,
                scheduler=self.scheduling,
                slurm=self.slurm,
                caps=self.caps,
            ),
            journal=journal,
            runs=RunFolders(service.runs, clock=self.clock),
            results=service.results,
            scheduler=self.scheduler,
            prober=self.prober,
            pool=stack.enter_context(concurrent.futures.ThreadPoolExecutor(2)),
            watches={"share": watched} if shares else {},
            settling=Settling(self.scan.settle_s, self.scan.stable_s),
            wake=lambda: None,
            clock=self.clock,
            wall=getattr(self.clock, "wall", time.time),  # a test may put a real clock here
            degraded=load_recipe(self.caps.degraded, relative_to=self.folder) if self.caps.degraded else None,
        )
        load_looks(self.context)
        return self

    def close(self) -> None:
        for stack in reversed(self._open):
            stack.close()

    # --- the microscope

    def save(self, name: str = "scan.npy", data: np.ndarray = GOOD) -> Path:
        path = self.share / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            np.save(file, data)
        return path

    # --- the service

    def look(self) -> None:
        """Notice what is on the share now."""
        self.clock.now += 20.0
        notice(self.context)

    def turn(self, seconds: float = 0.0) -> bool:
        """Every step once, as the pipeline does, then wait for the copies that were started."""
        self.clock.now += seconds
        before = self.journal.changes
        for step in STEPS:
            step(self.context)
        concurrent.futures.wait(self.context.transfers.values())
        return self.journal.changes != before

    def work(self, seconds: float = 40.0) -> None:
        """Turn until the clock has gone on for some time."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            if not self.turn():
                self.clock.now += 1.0

    # --- what it knows

    @property
    def journal(self) -> Journal:
        return self.context.journal

    def one(self, name: str = "scan.npy") -> Acquisition:
        """The newest generation of a file."""
        found = self.journal.latest("share", name.encode())
        assert found is not None, f"{name} was not noticed"
        return found

    def state(self, name: str = "scan.npy") -> AcquisitionState:
        return self.one(name).state

    def jobs(self, name: str = "scan.npy") -> list[Job]:
        return self.journal.jobs(self.one(name).id)

    def job_folder(self, name: str = "scan.npy", attempt: int = -1) -> Path:
        acquisition = self.one(name)
        return self.context.runs.job_folder(acquisition.day, self.jobs(name)[attempt].name)

    def told(self, subject: str) -> list[str]:
        """Names of the events of an acquisition or a job, in order."""
        return [event.name for _, event in self.journal.events(subject=subject) if event.plane == "management"]

    @property
    def results(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "results").glob("*.h5"))


class Scripted:
    """A scheduler that does what a test says: it keeps jobs until they are told to run, and raises what it is given."""

    name: ClassVar[str] = "scripted"
    ends_with_service: ClassVar[bool] = False

    def __init__(self) -> None:
        self.refusals: list[Exception] = []
        """Raised by the next calls of ``submit``, before anything happens."""
        self.lost: list[Exception] = []
        """Raised by the next calls of ``submit``, after the job was taken."""
        self.away = False
        self.sent: list[str] = []
        self.cancelled: list[str] = []
        self.calls: list[str] = []
        """Both, in order, with the job's attempt."""
        self.stuck_cancel = False
        self.phases: dict[str, SchedulerPhase] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        """More of a job's status."""
        self.asked: dict[str, Resources] = {}
        self.word = ""
        self.folders: dict[str, Path] = {}
        self._worker = NullScheduler()

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls()

    def tend(self) -> None:
        pass

    def rehearse(self, resources: Resources) -> Rehearsal:
        return Rehearsal(command=(), environment={}, script="")

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        if self.refusals:
            raise self.refusals.pop(0)
        self.sent.append(name)
        self.calls.append(f"sent {name[-2:]}")
        self.asked[name] = resources
        self.folders[name] = folder
        self.phases.setdefault(name, P.PENDING)
        if self.lost:
            raise self.lost.pop(0)
        return f"id-{name}"

    def find(self, name: str, folder: Path) -> list[str]:
        if self.away:
            raise Unavailable("the scheduler does not answer")
        return [f"id-{name}"] if name in self.folders else []

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        if self.away:
            raise Unavailable("the scheduler does not answer")
        return {
            name: JobStatus(
                **{"scheduler_id": known, "phase": self.phases.get(name, P.GONE), "reason": self.word, "node": "n1"}
                | self.facts.get(name, {})
            )
            for name, known in jobs.items()
        }

    def cancel(self, *scheduler_ids: str) -> None:
        if self.stuck_cancel:
            raise Unavailable("scancel: jobs are still there")
        self.cancelled += scheduler_ids
        self.calls += [f"cancelled {one[-2:]}" for one in scheduler_ids]

    def check(self) -> list[Finding]:
        return []

    def close(self) -> None:
        self._worker.close()

    def run(self, name: str) -> None:
        """Let the kernels do the job, and say that it ended."""
        self._worker.submit(name, self.folders[name], Resources())
        self.phases[name] = P.ENDED

    def claim(self, name: str, ago_s: float = 0.0) -> None:
        """Claim a run folder as rank 0 does, some time ago."""
        claim = Claim(job=name, host="n1", pid=1, scheduler_id="", wall_ns=time.time_ns() - int(ago_s * 1e9))
        jsonfile.publish(self.folders[name] / "claim", jsonfile.encode(claim))

    def fail(self, name: str, code: str = "kernel", *, retryable: bool = True) -> None:
        """End a job as the kernels would on an error."""
        record = ErrorRecord(
            job=name,
            code=code,
            message="it went wrong",
            path=None,
            frame=3,
            next_step="",
            retryable=retryable,
            rank=0,
            host="n1",
            traceback="",
            wall_ns=time.time_ns(),
        )
        jsonfile.publish(self.folders[name] / "error.json", jsonfile.encode(record))
        self.phases[name] = P.ENDED


@pytest.fixture(scope="session")
def prober() -> Iterator[Prober]:
    with Prober({name: target("formats", name) for name in names("formats")}) as prober:
        yield prober


@pytest.fixture
def make_bench(tmp_path: Path, prober: Prober) -> Iterator[Callable[..., Bench]]:
    """Make benches; attributes of the settings are given by keyword, and nothing is open yet."""
    made: list[Bench] = []

    def make(**settings: object) -> Bench:
        made.append(Bench(tmp_path / f"bench{len(made)}", prober))
        for name, value in settings.items():
            setattr(made[-1], name, value)
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """A service that has just been started on an empty share."""
    return make_bench().open()


@pytest.fixture
def good() -> np.ndarray:
    """A scan of 2 x 3 positions."""
    return GOOD


@pytest.fixture
def scripts() -> type[Scripted]:
    """The scheduler that does what a test says."""
    return Scripted


@pytest.fixture
def scripted(make_bench):
    """A bench whose only acquisition is staged, with its job sent to a scripted scheduler."""
    bench = make_bench(scheduler=Scripted(), scheduling=SchedulerSettings(use="null", ranks=1, attempts=3)).open()
    bench.save()
    return bench
