"""Keeps pools alive: starts them, has each relieved before its time is up, and makes sure of the end of one that died.

One turn reads everything from the pool folder, acts, and leaves what it did there.  So it does not matter who takes the
next turn: this service, the one after it, or ``emflow pool start`` beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from emflow.errors import EmflowError, SubmitError, printable
from emflow.records import EndCause, Resources, SchedulerPhase
from emflow.schedulers import pool_plan
from emflow.schedulers.pool_folder import Closed
from emflow.schedulers.pool_look import Found, empty_hands, read_pool
from emflow.schedulers.pool_plan import Seen
from emflow.schedulers.pool_secret import make_secret
from emflow.schedulers.pool_signs import ANSWER_S, GONE, PREFIX, QUIET_S, Signs
from mpi_kernels import jsonfile
from mpi_kernels.errors import KernelError
from mpi_kernels.events import host_name
from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.records import POOL_FILE, PoolSpec, Reach

log = logging.getLogger("emflow")

STALE_S = 20.0
"""Silence after which a pool that runs is ended: a node that swaps, or a file system, may hang for some seconds."""

BEGIN_S = 180.0
"""How long a started pool may take to begin: imports from a busy file system take a minute."""

LOST_S = 30.0
"""How long a pool of which nobody knows whether it was started may take to turn up: sbatch waits 10 s for slurmctld."""

YOUNG_S = 30.0
"""A pool that ends by itself before it is so old says that something is wrong."""

CLEAN_S = 3600.0


class Relay:
    """The turns that keep ``count`` pools alive.

    Parameters
    ----------
    signs : Signs
        Of the pools' lives; it knows the folder where they are written down, and what starts and ends them.
    spec : PoolSpec
        What each pool is, but for its name.
    count : int
        Pools at the same time.
    relay_s : float
        So long before the end the successor is asked for.
    lock : Path
        File on a local disk that is locked for a turn, so that no two processes start the same pool.
    stale_s : float
        Silence after which a pool that runs is ended.
    """

    def __init__(
        self,
        signs: Signs,
        spec: PoolSpec,
        *,
        count: int,
        relay_s: float,
        lock: Path,
        stale_s: float = STALE_S,
    ) -> None:
        self.folder, self.signs, self.spec = signs.folder, signs, spec
        self._count, self._relay_s, self._lock, self._stale_s = count, relay_s, lock, stale_s
        self._ending: dict[str, tuple[str, EndCause]] = {}
        self.pools: tuple[Seen, ...] = ()
        """All that were not closed, as the last turn saw them; replaced as a whole."""

    def turn(self) -> None:
        """Look at every pool, and do what is due."""
        with self.locked():
            pools = self.look()
            for pool in pools:
                if pool.deaf:
                    self.drain(pool.name)
            if not self.folder.held:
                due = pool_plan.plan(pools, self._count, self._relay_s)
                for name in due.drain:
                    self.drain(name)
                self._keep(due.start)
            if self.signs.for_s("", "cleaned") > CLEAN_S:
                self.signs.since_now("", "cleaned")
                self.folder.clean()

    def glance(self) -> tuple[Seen, ...]:
        """The pools that have begun, by their own files as they are now; nobody is asked, and nothing is done."""
        found = ((name, read_pool(self.folder.of(name))) for name in self.folder.open_names())
        signs = self.signs
        return tuple(signs.seen(name, one, self.spec, signs.silence_s(name, one)) for name, one in found if one.begun)

    def allocations(self) -> list[str]:
        """Slurm jobs that hold nodes while their pool takes no tasks: it has not begun, or gives no sign of life."""
        going = (pool for pool in self.pools if pool.allocation and not self.folder.leaving(pool.name))
        return [pool.allocation for pool in going if read_pool(self.folder.of(pool.name)).ended is None]

    def look(self) -> tuple[Seen, ...]:
        """How the pools are; one that has ended, or must end, is closed on the way."""
        self.signs.ask()
        looked = [self._look(name) for name in self.folder.open_names()]
        self.pools = tuple(pool for pool in looked if pool is not None)
        return self.pools

    def start(self) -> str:
        """Start one pool; its name.

        Raises
        ------
        NotAllowed
            The secret can't be trusted.
        SubmitError, Unavailable
            It was refused; or nobody knows, and then it is looked for by its name from now on.
        """
        make_secret(self.folder.root)
        name = self.folder.new_name()
        spec = dataclasses.replace(self.spec, name=name)
        folder = self.folder.of(name)
        jsonfile.publish(folder / POOL_FILE, jsonfile.encode(spec))
        resources = Resources(ranks=spec.ranks, time_limit_s=int(spec.walltime_s))
        try:
            scheduler_id = self.signs.starter.submit(PREFIX + name, folder, resources)
        except SubmitError as error:
            if not error.transient:
                self._close(name, f"refused: {error}", EndCause.FAILED, young=True)
            raise
        self.folder.write_launched(name, self.signs.kind, scheduler_id)
        log.info("started pool %s as %s", name, scheduler_id)
        return name

    def drain(self, name: str) -> None:
        """Let a pool finish what it has, and end."""
        if not self.folder.leaving(name):
            self.folder.write_leaving(name)
            log.info("pool %s takes no more tasks", name)
        ways: tuple[Reach, ...] = ("tcp",) if self.spec.reach == "tcp" else (self.spec.reach, "spool")
        for reach in ways:  # one whose secret was replaced hangs up on us, and reads its spool
            try:
                with contextlib.closing(PoolClient(self.folder.of(name), reach=reach, timeout_s=ANSWER_S)) as pool:
                    pool.drain()
                return
            except (KernelError, OSError) as error:  # nothing is sent to it any more, and its walltime ends it
                log.debug("pool %s was not told to drain: %s", name, printable(str(error)))

    def end(self, name: str, reason: str, cause: EndCause = EndCause.CANCELLED) -> bool:
        """End a pool for real and close it; False while it is not certain that nothing of it runs."""
        self._ending[name] = reason, cause
        if self.signs.end(name):
            self._close(name, reason, cause)
            return True
        return False

    # --- one pool

    def _look(self, name: str) -> Seen | None:
        """One pool, or None if it has been closed now; without a word of the launcher it is left as it is."""
        found, said = read_pool(self.folder.of(name)), self.signs.said.get(name)
        self.signs.knock(name, found)
        silence_s = self.signs.silence_s(name, found)
        phase = None if said is None else said.phase
        if phase in GONE:
            self._gone(name, found)
            return None
        if found.ended is not None:
            lingers = self.signs.for_s(name, "ended") > self._stale_s
            if lingers and self.end(name, found.ended.message, EndCause.COMPLETED):
                return None
        elif self.folder.launched(name) is None:
            lost_s = LOST_S if self.signs.kind == "slurm" else 0.0  # here there is a record, or nothing has run
            if not self.signs.turned_up(name) and self.signs.for_s(name, "lost") > lost_s:
                self._close(name, "nobody knows whether it was started, and it did not turn up", EndCause.UNSAID)
                return None
        elif phase is SchedulerPhase.RUNNING:
            why = self._hangs(name, found, silence_s)
            if why and self.end(name, why, EndCause.FAILED):
                return None
        return self.signs.seen(name, found, self.spec, silence_s)

    def _hangs(self, name: str, found: Found, silence_s: float) -> str:
        """Why a pool that runs must be ended; empty if it need not."""
        if found.begun:
            stale_s = self._stale_s + self.signs.quiet_s(name) - QUIET_S
            return f"no sign of life for {silence_s:.0f} s" if silence_s > stale_s else ""
        return f"its ranks did not begin within {BEGIN_S:.0f} s" if self.signs.for_s(name, "running") > BEGIN_S else ""

    def _gone(self, name: str, found: Found) -> None:
        said = self.signs.said[name]
        if name in self._ending:
            self._close(name, *self._ending[name])
        elif found.ended is not None and found.ended.why != "gave-up":
            self._close(name, found.ended.message, EndCause.COMPLETED, young=False)
        elif said.cause is EndCause.TIMEOUT:
            self._close(name, "its time was up while a job ran", said.cause, young=False)
        else:
            told = "" if found.ended is None else found.ended.message
            why = told or said.reason or said.cause.value.lower().replace("_", " ") or "its ranks are gone"
            self._close(name, f"ended before its time: {why}", said.cause)

    def _close(self, name: str, reason: str, cause: EndCause, *, young: bool | None = None) -> None:
        """Record that nothing of a pool runs any more; only after its launcher has said so."""
        folder, said = self.folder.of(name), self.signs.said.pop(name, None)
        found = read_pool(folder)
        told = cause is EndCause.CANCELLED
        closed = Closed(
            reason=reason,
            wall_ns=time.time_ns(),
            cause=cause,
            young=(not told and found.age_s < YOUNG_S) if young is None else young,
            nodes=(said.nodes if said is not None else 0) or found.nodes,
            seconds=(said.elapsed_s if said is not None else 0.0) or found.age_s,
        )
        empty_hands(folder)
        self.folder.write_closed(name, closed)
        fine = told or cause is EndCause.COMPLETED
        log.log(logging.INFO if fine else logging.WARNING, "pool %s has ended: %s", name, printable(reason))

    # --- starting

    def _keep(self, count: int) -> None:
        """Start what is missing, but not at once where pools die young."""
        if not count:
            self.signs.trouble = ""
            return
        found = [self.folder.closed(name) for name in self.folder.names()]
        closed = sorted((one for one in found if one is not None), key=lambda one: one.wall_ns)
        pause_s = pool_plan.pause_s(closed)
        waited_s = (time.time_ns() - closed[-1].wall_ns) / 1e9 if closed else 0.0
        if 0 <= waited_s < pause_s:  # a clock that was set back does not make it wait
            why = closed[-1].reason
            self.signs.tell(f"pools end soon after their start ({why}); the next one after {pause_s:.0f} s")
            return
        try:
            for _ in range(count):
                self.start()
        except EmflowError as error:
            self.signs.tell(f"no pool can be started: {error}")

    def own(self) -> None:
        """Make sure that the pool folder is this service's alone; raises `NotAllowed` if not."""
        self.folder.own(f"{host_name()}:{self._lock.parent}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else starts or ends pools meanwhile.

        Raises
        ------
        NotAllowed
            The pool folder is not ours alone.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        self.own()
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
