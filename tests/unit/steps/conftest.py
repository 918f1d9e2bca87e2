"""The parts of one service on a temporary folder, real but for its clock, and turned by hand."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from emflow.config import (
    Bytes,
    Config,
    ScanSettings,
    SchedulerSettings,
    ServiceSettings,
    TransferSettings,
    Watch,
    default_match,
)
from emflow.journal import Journal
from emflow.pipeline import STEPS, load_looks
from emflow.prober import Prober
from emflow.recipes import load_recipe
from emflow.records import Acquisition, AcquisitionState, Job
from emflow.registry import names, target
from emflow.runs import RunFolders
from emflow.schedulers.null import NullScheduler
from emflow.schedulers.protocol import Scheduler
from emflow.steps.context import Context, Watched
from emflow.steps.notice import notice
from emflow.watch.scan import Scanner
from emflow.watch.settle import Settling
from emflow.watch.waiting import NoHints

GOOD = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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
