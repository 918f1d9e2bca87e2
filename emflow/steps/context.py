"""What the steps share: the parts of one running service, passed and never global."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from emflow.backlog import Backlog
from emflow.config import Config
from emflow.errors import Busy, EmflowError, JournalError, JournalFull, NoSpace, StaleState
from emflow.journal import Journal
from emflow.prober import Prober
from emflow.records import Acquisition, Transfer
from emflow.runs import RunFolders
from emflow.schedulers.protocol import Scheduler
from emflow.transfer import free_bytes
from emflow.watch.scan import Scanner
from emflow.watch.settle import Settling
from emflow.watch.waiting import Hints
from mpi_kernels.contract import Header, Recipe
from mpi_kernels.errors import KernelError, printable

log = logging.getLogger("emflow")

RETRY_S = 1.0
"""Pause before the next try of what may pass by itself: a full disk, a share or a scheduler that is away."""

BUG_RETRY_S = 60.0

DISK_RUNS, DISK_RESULTS = "disk runs", "disk results"
"""Alarms: the disk of the run folders, or that of the results, is full."""

ALARMS = "alarms"
"""Trace of the events that tell of alarms; their subject is the alarm's name."""


@dataclass(slots=True)
class Watched:
    """One watched share: its scanner is the truth, its hints only make a scan happen sooner."""

    share: str
    root: Path
    recipe: Recipe
    scanner: Scanner
    hints: Hints
    degraded: str = ""
    """What was told last of why there are no live hints."""


@dataclass(slots=True)
class Look:
    """When an unfinished acquisition is examined next, and what was found last."""

    acquisition: Acquisition
    due: float = 0.0
    waiting: bool = True
    """Something may still happen by itself; False once its files are settled and still incomplete."""


@dataclass(slots=True)
class Heard:
    """A job's last sign of life: when it was seen, the time that the job had had then, and its age since."""

    at: float
    elapsed_s: float
    age_s: float | None


@dataclass(slots=True)
class Context:
    """The parts of one running service."""

    config: Config
    journal: Journal
    runs: RunFolders
    results: Path
    scheduler: Scheduler
    prober: Prober
    pool: ThreadPoolExecutor
    watches: dict[str, Watched]
    settling: Settling
    wake: Callable[[], None]
    clock: Callable[[], float] = time.monotonic
    looks: dict[str, Look] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    transfers: dict[str, Future[Transfer]] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    """Earliest time of the next try, by acquisition or job, after something that may pass by itself."""
    ended: dict[str, float] = field(default_factory=dict)
    """When the scheduler first said that a job had ended of which the run folder says nothing."""
    leaving: dict[str, float] = field(default_factory=dict)
    """When a job was first seen to have said that it was stopped."""
    look_again: dict[str, float] = field(default_factory=dict)
    """When a job that runs is looked at next, for a sign of life and for what it costs."""
    heard: dict[str, Heard] = field(default_factory=dict)
    """The last sign of life of each job that is said to run."""
    booked: dict[str, float] = field(default_factory=dict)
    """When the cost of each running job was written into the journal last."""
    told: tuple[Backlog, float] | None = None
    """The backlog that was published last, and when."""
    degraded: Recipe | None = None
    """The recipe of jobs that are near a cap."""
    wall: Callable[[], float] = time.time
    """Seconds since 1970: caps are by the day."""
    alarms: dict[str, str] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)

    def path_of(self, acquisition: Acquisition) -> Path | None:
        """Where the file lies on its share; None where the share is no longer configured."""
        watched = self.watches.get(acquisition.share)
        return None if watched is None else watched.root / acquisition.relpath.decode("utf-8", "surrogateescape")

    def waits(self, key: str) -> bool:
        """Whether a back-off after a passing failure is still running."""
        return self.clock() < self.not_before.get(key, 0.0)

    def back_off(self, key: str, seconds: float) -> None:
        """Leave something alone for a while."""
        self.not_before[key] = self.clock() + seconds

    def room(self, needed: int, what: str) -> bool:
        """Back-pressure: nothing is started that would leave less than ``min_free`` on the run folders' disk."""
        free, kept = free_bytes(self.runs.root), self.config.transfer.min_free
        if free - needed >= kept:
            self.clear_alarm(DISK_RUNS)
            return True
        self.raise_alarm(
            DISK_RUNS,
            f"{printable(str(self.runs.root))}: {free >> 20} MiB free, {needed >> 20} MiB needed and {kept >> 20} MiB "
            f"kept: {what} waits until there is room",
        )
        return False

    def not_watched(self, acquisition: Acquisition) -> str:
        """Tell that the share of an acquisition is gone from the configuration; returns what was told."""
        text = f"share {acquisition.share} is not in the configuration any more, but {acquisition.id} waits for it"
        self.raise_alarm(f"share {acquisition.share}", text)
        self.back_off(acquisition.id, RETRY_S)
        return text

    @contextlib.contextmanager
    def going_on(self, key: str, *, clears: bool = True) -> Iterator[None]:
        """Keep trouble with one acquisition or job from stopping the others: told, and tried again after a pause.

        ``clears`` False is for the first part of a step: that it went well does not end an alarm of the second.  A
        journal that can't be written is not such trouble: that passes through, to the loop.
        """
        try:
            yield
        except StaleState as error:  # another process moved it: the next turn sees where it is
            log.info("%s", error)
        except (JournalFull, JournalError, Busy):
            raise
        except NoSpace as error:
            self.raise_alarm(DISK_RUNS, str(error))
            self.back_off(key, RETRY_S)
        except (EmflowError, KernelError, OSError) as error:
            if self.stopping.is_set():
                return
            self.raise_alarm(f"trouble {key}", printable(str(error)))
            self.back_off(key, RETRY_S)
        except Exception as error:  # a bug, ours or a plug-in's, must not stop the others either
            log.exception("a bug met %s; please report it", key)
            self.raise_alarm(f"trouble {key}", f"a bug, see the log: {type(error).__name__}: {printable(str(error))}")
            self.back_off(key, BUG_RETRY_S)
        else:
            if clears:
                self.clear_alarm(f"trouble {key}")

    def raise_alarm(self, name: str, text: str) -> None:
        """Tell once that something needs room, a mount or a person; work goes on around it."""
        if self.alarms.get(name) != text:
            if name not in self.alarms:
                log.warning("alarm: %s", text, extra={"alarm": name})
                self.journal.append(subject=name, trace=ALARMS, plane="management", name="alarm", attrs={"text": text})
            self.alarms[name] = text

    def clear_alarm(self, name: str) -> None:
        """Tell that an alarm is over."""
        if self.alarms.pop(name, None) is not None:
            log.info("alarm cleared: %s", name, extra={"alarm": name})
            self.journal.append(subject=name, trace=ALARMS, plane="management", name="cleared", attrs={})


def open_alarms(journal: Journal) -> dict[str, str]:
    """Alarms that were raised and not cleared since."""
    alarms: dict[str, str] = {}
    for _, event in journal.events(trace=ALARMS):
        if event.name == "alarm":
            alarms[event.subject] = str(event.attrs.get("text", ""))
        else:
            alarms.pop(event.subject, None)
    return alarms
