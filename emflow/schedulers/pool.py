"""Jobs on warm ranks: given to a pool that is up, and sent another way where there is none.

A job's record says where it is sent before it is sent.  So the next service knows where to ask; a job whose pool died
before it began is given to another under the same name; and the claim in its run folder keeps it from running twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from emflow.config import Config
from emflow.errors import SubmitError, Unavailable, printable
from emflow.records import EndCause, JobStatus, Resources, SchedulerPhase
from emflow.schedulers import pool_plan
from emflow.schedulers.pool_fallback import TOLD, Fallback, way_of
from emflow.schedulers.pool_folder import PoolFolder, Sent
from emflow.schedulers.pool_jobs import PoolJobs, pool_id, pool_of
from emflow.schedulers.pool_look import holder_of, holds
from emflow.schedulers.pool_relay import ANSWER_S, Relay
from emflow.schedulers.pool_setup import check_pools, rehearse_pool, relay_of
from emflow.schedulers.protocol import Finding, Rehearsal
from mpi_kernels.contract import CLAIM_FILE, ERROR_FILE, RESULT_FILE
from mpi_kernels.errors import KernelError
from mpi_kernels.pool.client import PoolClient

log = logging.getLogger("emflow")

TURN_S = 1.0
"""Between two looks at the pools."""

CANCEL_S = 15.0
"""How long a pool may take to stop a job before the pool itself is ended; it ends its own ranks after 10 s."""

_STEP_S = 0.05


class PoolScheduler:
    """Gives jobs to pools, and keeps the pools alive in `tend`.

    Parameters
    ----------
    config : Config
        ``[pool]``, and ``[slurm]`` where Slurm is the launcher.
    """

    name: ClassVar[str] = "pool"
    ends_with_service: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = PoolFolder(config.pool.folder)
        self._jobs = PoolJobs(self._folder)
        self._fallback = Fallback(config)
        self._relay: Relay | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pools")
        self._turn: Future[None] | None = None
        self._turn_due = 0.0
        self._clients: dict[str, PoolClient] = {}
        self._load: dict[str, str] = {}
        self._told = ""

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Made without starting or asking anything; `tend` does."""
        return cls(config)

    # --- the jobs

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Give the job of a run folder to the pool that has the least to do, or send it another way, and say so."""
        sent = Sent(
            job=name,
            folder=str(folder),
            ranks=resources.ranks,
            time_limit_s=resources.time_limit_s,
            memory_mib=resources.memory_mib,
            to="",
        )
        return self._send(sent).to

    def find(self, name: str, folder: Path) -> list[str]:
        """Where a job is: as its record says if that is so, in the hands of any pool, or where jobs go without one."""
        sent = self._folder.sent(name)
        pool = pool_of(sent.to) if sent is not None and sent.folder == str(folder) else None
        if sent is not None and pool is not None:
            over = any((folder / file).exists() for file in (RESULT_FILE, ERROR_FILE))
            verdict, _ = self._jobs.judge(sent)
            if over or holds(self._folder.of(pool), name) or (verdict == "said" and _claimed(folder)):
                return [sent.to]
        held = holder_of(self._folder, name)
        if held is not None:
            self._folder.write_sent(_found(name, folder, held, sent))
            return [pool_id(held, name)]
        return self._fallback.find(name, folder)

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are; one that its pool never began is sent to another place on the way."""
        said: dict[str, JobStatus] = {}
        elsewhere: dict[str, str] = {}
        for name, scheduler_id in jobs.items():
            sent = self._folder.sent(name)
            if sent is not None and pool_of(scheduler_id) is not None and sent.to:
                sent, status = self._judged(sent)
                if pool_of(sent.to) is not None:
                    said[name] = status
                else:
                    elsewhere[name] = sent.to
            elif way_of(scheduler_id) is not None:
                elsewhere[name] = scheduler_id
            else:
                said[name] = JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.GONE, reason="no such pool")
        for name, status in self._poll_elsewhere(elsewhere, alone=not said).items():
            sent = self._folder.sent(name)
            told = "; ".join(text for text in (status.reason, sent.why if sent is not None else "") if text)
            said[name] = msgspec.structs.replace(status, reason=told)
        for name, status in said.items():
            if status.phase in (SchedulerPhase.ENDED, SchedulerPhase.GONE):
                self._forget(name)
        return {name: msgspec.structs.replace(said[name], scheduler_id=jobs[name]) for name in jobs}

    def _poll_elsewhere(self, jobs: Mapping[str, str], *, alone: bool) -> dict[str, JobStatus]:
        """How the jobs are that went another way; if nobody can say so, the others are told all the same."""
        if not jobs:
            return {}
        try:
            return self._fallback.poll(jobs)
        except Unavailable as error:
            if alone:
                raise
            unknown = SchedulerPhase.UNKNOWN
            return {n: JobStatus(scheduler_id=i, phase=unknown, reason=str(error)) for n, i in jobs.items()}

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs; a pool that does not let go of one is ended itself, and gives its other jobs back."""
        elsewhere, pools = [i for i in scheduler_ids if way_of(i) is not None], []
        for scheduler_id in scheduler_ids:
            sent = self._folder.sent(scheduler_id.rpartition("/")[2]) if pool_of(scheduler_id) is not None else None
            if sent is None:
                continue
            if pool_of(sent.to) is None:
                elsewhere.append(sent.to)
                continue
            self._folder.write_sent(msgspec.structs.replace(sent, cancelled=True))
            self._stop(sent)
            pools.append(sent)
        self._fallback.cancel(*elsewhere)
        for sent in pools:
            self._make_sure(sent)

    # --- the pools

    def tend(self) -> None:
        """Let the relay take its next turn, in a thread of its own: Slurm's commands may take seconds."""
        now = time.monotonic()
        if self._turn is not None and self._turn.done():
            error, self._turn = self._turn.exception(), None
            if error is not None:
                self._tell(f"the pools can't be looked after: {printable(str(error))}")
        if self._turn is None and now >= self._turn_due:
            self._turn_due = now + TURN_S
            self._turn = self._worker.submit(self._relays().turn)

    def rehearse(self, resources: Resources) -> Rehearsal:  # noqa: ARG002
        """What a pool would be started with; a job itself is only a name that is sent to one."""
        return rehearse_pool(self._config)

    def check(self) -> list[Finding]:
        """The pool folder, the secret, the pools that are up, and what starts them."""
        return [*check_pools(self._config), *self._fallback.check()]

    def close(self) -> None:
        """Give resources back; pools and jobs go on."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._fallback.close()

    # --- sending

    def _send(self, sent: Sent, tried: tuple[str, ...] = ()) -> Sent:
        """Send a job to the best pool that takes it, else another way; the record comes before each try."""
        why = "no pool takes tasks"
        for pool in pool_plan.choose(self._pools(), sent.ranks, self._loads()):
            if pool.name in tried:
                continue
            aimed = msgspec.structs.replace(sent, to=pool_id(pool.name, sent.job), why="")
            self._folder.write_sent(aimed)
            try:
                self._client(pool.name).send(sent.job, Path(sent.folder))
            except (KernelError, OSError) as error:
                why = printable(str(error))
                log.info("pool %s did not take %s: %s", pool.name, sent.job, why)
                self._hang_up(pool.name)
                continue
            self._load[sent.job] = pool.name
            self._tell("")
            return aimed
        trouble = self._relays().trouble if why == "no pool takes tasks" else ""
        return self._send_elsewhere(sent, f"{why} ({trouble})" if trouble else why)

    def _send_elsewhere(self, sent: Sent, why: str) -> Sent:
        allocations = [pool.allocation for pool in self._pools() if pool.allocation]
        resources = Resources(ranks=sent.ranks, time_limit_s=sent.time_limit_s, memory_mib=sent.memory_mib)
        ways = self._fallback.ways(allocations)
        for way in ways:
            told = f"{why}: it {TOLD[way]}"
            aimed = msgspec.structs.replace(sent, to=f"{way}:", why=told)
            self._folder.write_sent(aimed)
            try:
                scheduler_id = self._fallback.submit(way, sent.job, Path(sent.folder), resources, allocations)
            except (SubmitError, Unavailable):
                if way == ways[-1]:
                    raise
                continue
            self._tell(f"{why}: jobs {TOLD[way].replace('runs', 'run', 1)}")
            aimed = msgspec.structs.replace(aimed, to=scheduler_id)
            self._folder.write_sent(aimed)
            return aimed
        raise Unavailable(why)

    def _judged(self, sent: Sent) -> tuple[Sent, JobStatus]:
        """How a job of a pool is, after what had to be done about it."""
        verdict, status = self._jobs.judge(sent)
        if verdict == "overdue" and not sent.cancelled:
            log.warning("%s reached its time limit of %d s and is stopped", sent.job, sent.time_limit_s)
            self._folder.write_sent(msgspec.structs.replace(sent, cancelled=True))
            self._stop(sent)
        if verdict != "give back":
            pool = pool_of(sent.to)
            if pool is not None and status.phase in (SchedulerPhase.PENDING, SchedulerPhase.RUNNING):
                self._load[sent.job] = pool
            return sent, status
        self._load.pop(sent.job, None)
        before = pool_of(sent.to)
        try:
            again = self._send(sent, tried=(before,) if before is not None else ())
        except (SubmitError, Unavailable) as error:  # it waits where it is until somebody takes it
            return sent, msgspec.structs.replace(status, reason=f"{status.reason}; {error}")
        log.warning("%s: %s; sent on as %s", sent.job, status.reason, again.to)
        self._jobs.forget(sent.job)
        return again, msgspec.structs.replace(status, scheduler_id=again.to)

    # --- stopping

    def _stop(self, sent: Sent) -> None:
        pool = pool_of(sent.to)
        if pool is None or self._folder.closed(pool) is not None:
            return
        try:
            self._client(pool).cancel(sent.job)
        except (KernelError, OSError) as error:
            log.info("pool %s was not told to stop %s: %s", pool, sent.job, printable(str(error)))
            self._hang_up(pool)

    def _make_sure(self, sent: Sent) -> None:
        """Wait until a pool has let go of a job; if that takes long, end the pool."""
        pool = pool_of(sent.to)
        assert pool is not None
        until = time.monotonic() + CANCEL_S
        while self._folder.closed(pool) is None and holds(self._folder.of(pool), sent.job):
            if time.monotonic() > until:
                log.warning("pool %s does not let go of %s, and is ended", pool, sent.job)
                relay = self._relays()
                with relay.locked():
                    relay.end(pool, f"it did not let go of {sent.job}", EndCause.FAILED)
                return
            time.sleep(_STEP_S)

    # --- parts

    def _relays(self) -> Relay:
        if self._relay is None:
            self._relay = relay_of(self._config, self._folder)
            with contextlib.suppress(Unavailable):
                self._relay.glance()  # before the first turn is over: pools of the service before this one may be up
        return self._relay

    def _pools(self) -> tuple[pool_plan.Seen, ...]:
        return self._relays().pools

    def _loads(self) -> dict[str, int]:
        loads: dict[str, int] = {}
        for pool in self._load.values():
            loads[pool] = loads.get(pool, 0) + 1
        return loads

    def _client(self, pool: str) -> PoolClient:
        if pool not in self._clients:
            self._clients[pool] = PoolClient(self._folder.of(pool), reach=self._config.pool.reach, timeout_s=ANSWER_S)
        return self._clients[pool]

    def _hang_up(self, pool: str) -> None:
        if pool in self._clients:
            self._clients.pop(pool).close()

    def _forget(self, name: str) -> None:
        self._load.pop(name, None)
        self._jobs.forget(name)
        self._folder.forget(name)

    def _tell(self, text: str) -> None:
        """Say once that jobs go another way, and once that they do not any more."""
        if text and text != self._told:
            log.warning("%s", text)
        elif self._told and not text:
            log.info("pools take jobs again")
        self._told = text


def _claimed(folder: Path) -> bool:
    return (folder / CLAIM_FILE).exists()


def _found(name: str, folder: Path, pool: str, sent: Sent | None) -> Sent:
    """The record of a job that a pool has, where the one that was written before was lost or says otherwise."""
    if sent is not None:
        return msgspec.structs.replace(sent, to=pool_id(pool, name), why="")
    unknown = Resources()
    return Sent(job=name, folder=str(folder), ranks=1, time_limit_s=unknown.time_limit_s, to=pool_id(pool, name))
