"""Signs of life of the pools: their heartbeats, and what those who started them say.

All times are of our own monotonic clock: what other hosts say of the time is never compared with ours.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from emflow.errors import Unavailable, printable
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers.file_system import is_local
from emflow.schedulers.pool_folder import Kind, PoolFolder
from emflow.schedulers.pool_look import Found, read_pool, seen, standing_of
from emflow.schedulers.pool_plan import Seen
from mpi_kernels.errors import KernelError
from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.records import PoolSpec

log = logging.getLogger("emflow")

PREFIX = "emflow-pool-"
"""Before a pool's name in its job name: a person who reads squeue knows what it is."""

KNOCK_S = 2.5
"""Silence of the heartbeat after which a pool is asked over TCP: NFS shows a renamed file up to a minute late."""

QUIET_S = 5.0
"""Silence after which the launcher is asked whether the pool runs; it should give a sign of life every second."""

UNSEEN_S = 75.0
"""The same for a pool that TCP does not reach, on a file system that may show files late.

Source: nfs(5), acdirmax, 60 s by default.
"""

ANSWER_S = 2.0
"""How long a pool may take to answer."""

ASK_S = 3.0
"""Between two questions to Slurm about pools that give no sign of life: each is a process, and work for slurmctld."""

GONE = (SchedulerPhase.ENDED, SchedulerPhase.GONE)


class Launcher(Protocol):
    """What starts and ends pools; every scheduler whose script is ``pool.sbatch`` can."""

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Start a pool; as `Scheduler.submit`."""

    def find(self, name: str, folder: Path) -> list[str]:
        """Ids of what was started under a name; as `Scheduler.find`."""

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How pools are; as `Scheduler.poll`."""

    def cancel(self, *scheduler_ids: str) -> None:
        """End pools; as `Scheduler.cancel`."""


class Signs:
    """What is known of the pools' lives.

    Parameters
    ----------
    folder : PoolFolder
        Where they are written down.
    launchers : mapping of str to Launcher
        By the name that stands in ``launched.json``.  ``slurm`` is asked only in doubt, another one always.
    kind : str
        Which of them starts new pools.
    """

    def __init__(
        self,
        folder: PoolFolder,
        launchers: Mapping[str, Launcher],
        kind: Kind,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.launchers, self.kind, self._clock = folder, launchers, kind, clock
        self.said: dict[str, JobStatus] = {}
        """What the launchers said last, by the pools' names."""
        self.trouble = ""
        """Why there is something that nobody could say or do, in plain words; empty if all is well."""
        self._beats: dict[str, tuple[bytes, float]] = {}
        self._since: dict[tuple[str, str], float] = {}
        self._reached: dict[str, bool] = {}
        self._asked = -math.inf
        self._local = is_local(folder.root)

    def silence_s(self, name: str, found: Found) -> float:
        """Seconds since a pool's heartbeat changed; 0 when it is seen for the first time."""
        now, known = self._clock(), self._beats.get(name)
        if known is None or known[0] != found.beat:
            self._beats[name] = (found.beat, now)
            return 0.0
        return now - known[1]

    def was_silent(self, name: str, found: Found, seconds: float) -> None:
        """Take over since when a pool has been silent, for who looks only once."""
        self._beats[name] = (found.beat, self._clock() - seconds)

    def knock(self, name: str, found: Found) -> None:
        """Ask a pool over TCP whether it lives: once at first, and whenever its heartbeat is late."""
        if found.endpoint is None or not found.endpoint.port or found.ended is not None:
            return
        if name in self._reached and self.silence_s(name, found) < KNOCK_S:
            return
        try:
            with contextlib.closing(PoolClient(self.folder.of(name), reach="tcp", timeout_s=ANSWER_S)) as pool:
                answer = pool.beat()
        except (KernelError, OSError):
            answer = None
        # what is newer than the file came over TCP, or from a newer file: both are signs of life
        alive = answer is not None and (found.told is None or answer.wall_ns > found.told.wall_ns)
        self._reached[name] = alive or self._reached.get(name, False)
        if alive:
            self._beats[name] = (found.beat, self._clock())

    def quiet_s(self, name: str) -> float:
        """How long a pool may be silent before that means anything."""
        return QUIET_S if self._local or self._reached.get(name) else UNSEEN_S

    def for_s(self, name: str, what: str) -> float:
        """Seconds since something was first seen of a pool."""
        now = self._clock()
        return now - self._since.setdefault((name, what), now)

    def since_now(self, name: str, what: str) -> None:
        """Count the seconds of `for_s` from now on."""
        self._since[name, what] = self._clock()

    @property
    def starter(self) -> Launcher:
        """What starts new pools."""
        return self.launchers[self.kind]

    def ask(self) -> None:
        """Ask the launchers how pools are, each in one question for all of them."""
        doubtful = {name for name in self.folder.open_names() if not self._alive(name)}
        self.said = {name: said for name, said in self.said.items() if name in doubtful}
        by_kind: dict[str, dict[str, str]] = {}
        for name in doubtful:
            launched = self.folder.launched(name)
            if launched is not None:
                by_kind.setdefault(launched.launcher, {})[PREFIX + name] = launched.scheduler_id
        for kind, ids in by_kind.items():
            if kind != "slurm" or self._clock() - self._asked >= ASK_S:
                self._ask(kind, ids)

    def seen(self, name: str, found: Found, spec: PoolSpec, silence_s: float = 0.0) -> Seen:
        """How a pool is, for those who plan; ``spec`` describes one that has no ``pool.json`` yet."""
        said = self.said.get(name)
        phase = None if said is None else said.phase
        standing = standing_of(
            found,
            queued=phase is SchedulerPhase.PENDING or (not found.begun and phase is None),
            silent=found.begun and silence_s > self.quiet_s(name),
            leaving=self.folder.leaving(name),
        )
        # one that drains or has ended gives its nodes back any moment
        waits = phase is SchedulerPhase.RUNNING and standing in ("silent", "starting")
        running = said.scheduler_id if said is not None and waits else ""
        allocation = running if running.isdecimal() else ""  # the id of a Slurm job
        return seen(name, found, standing, silence_s=silence_s, allocation=allocation, fallback=spec)

    def end(self, name: str) -> bool:
        """Tell a pool's launcher to end it; False while it is not certain that nothing of it runs."""
        try:
            known = self.ids(name)
            if not known:
                return True
            launcher = self._launcher(name)
            launcher.cancel(*known)
            said = launcher.poll({PREFIX + name: known[-1]})[PREFIX + name]
        except Unavailable as error:
            self.tell(f"pool {name} can't be ended: {error}")
            return False
        self.said[name] = said
        return said.phase in GONE

    def turned_up(self, name: str) -> bool:
        """Whether a pool whose start was in doubt is there after all, or nobody can say."""
        try:
            return bool(self.ids(name))
        except Unavailable as error:
            self._since.pop((name, "lost"), None)
            self.tell(f"nobody can say whether pool {name} was started: {error}")
            return True

    def ids(self, name: str) -> list[str]:
        """What a pool was started as; found by its name, and recorded, where that is not known."""
        launched = self.folder.launched(name)
        if launched is not None:
            return [launched.scheduler_id]
        known = self.starter.find(PREFIX + name, self.folder.of(name))
        if known:
            self.folder.write_launched(name, self.kind, known[-1])
        return known

    def tell(self, trouble: str) -> None:
        """Say once what is wrong."""
        if self.trouble != trouble:
            log.warning("%s", printable(trouble))
        self.trouble = trouble

    def _ask(self, kind: str, ids: Mapping[str, str]) -> None:
        if kind == "slurm":
            self._asked = self._clock()
        try:
            said = self.launchers[kind].poll(ids)
        except Unavailable as error:
            self.tell(f"nobody can say how the pools are: {error}")
            return
        self.said |= {name.removeprefix(PREFIX): status for name, status in said.items()}

    def _launcher(self, name: str) -> Launcher:
        launched = self.folder.launched(name)
        return self.launchers[self.kind if launched is None else launched.launcher]

    def _alive(self, name: str) -> bool:
        """Whether a pool's own sign of life is enough, and Slurm need not be asked."""
        launched = self.folder.launched(name)
        if launched is None or launched.launcher != "slurm":
            return False
        found = read_pool(self.folder.of(name))
        return found.begun and found.ended is None and self.silence_s(name, found) <= self.quiet_s(name)
