"""Jobs on warm ranks: given to a pool that is up, and sent another way where there is none.

A job's record says where it is sent before it is sent.  So the next service knows where to ask; a job whose pool died
before it began is given to another under the same name; and the claim in its run folder keeps it from running twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from emflow.config import Config
from emflow.errors import SubmitError, Unavailable
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers.file_system import is_local
from emflow.schedulers.pool_fallback import Fallback, way_of
from emflow.schedulers.pool_folder import PoolFolder, Sent
from emflow.schedulers.pool_jobs import HANDS_S, LATE_S, PoolJobs, pool_id, pool_of
from emflow.schedulers.pool_look import holder_of, holds, task_folder
from emflow.schedulers.pool_plan import Seen
from emflow.schedulers.pool_relay import STALE_S
from emflow.schedulers.pool_sending import Sender
from emflow.schedulers.pool_setup import check_pools, rehearse_pool, relay_of
from emflow.schedulers.protocol import Finding, Rehearsal
from mpi_kernels.contract import CLAIM_FILE, ERROR_FILE, RESULT_FILE

log = logging.getLogger("emflow")

TURN_S = 1.0
"""Between two looks at the pools."""

AGAIN_S = 5.0
"""Between two tries to find a place for a job whose pool has ended (each may be a job that Slurm has to refuse), and
between two words to a pool that it is to stop a job: the second must not meet the end of that job."""

TROUBLE_S = 30.0
"""Pause after a turn that failed altogether."""


class PoolScheduler:
    """Gives jobs to pools, and keeps the pools alive in `tend`.

    Parameters
    ----------
    config : Config
        ``[pool]``, and ``[slurm]`` where Slurm is the launcher.
    stale_s : float
        Silence after which a pool that runs is ended.
    """

    name: ClassVar[str] = "pool"
    ends_with_service: ClassVar[bool] = False

    def __init__(self, config: Config, *, stale_s: float = STALE_S) -> None:
        self._config = config
        self._folder = PoolFolder(config.pool.folder)
        self._jobs = PoolJobs(self._folder, HANDS_S if is_local(self._folder.root) else LATE_S)
        self._fallback = Fallback(config)
        self._relay = relay_of(config, self._folder, stale_s=stale_s)
        self._sender = Sender(config.pool, self._folder, self._relay, self._fallback)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pools")
        self._turn: Future[None] | None = None
        self._turn_due = 0.0
        self._refused: dict[str, tuple[float, JobStatus]] = {}
        self._stop_again: dict[str, float] = {}

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
        return self._sender.send(sent).to

    def find(self, name: str, folder: Path) -> list[str]:
        """Where a job is: as its record says if that is so, in the hands of any pool, or where jobs go without one."""
        sent = self._folder.sent(name)
        pool = pool_of(sent.to) if sent is not None and sent.folder == str(folder) else None
        if sent is not None and pool is not None:
            self._jobs.look_again()
            over = any((folder / file).exists() for file in (RESULT_FILE, ERROR_FILE))
            verdict, _ = self._jobs.judge(sent)
            if over or holds(self._folder.of(pool), name) or (verdict == "said" and _claimed(folder)):
                return [sent.to]
        held = holder_of(self._folder, name)
        if held is not None:
            self._folder.write_sent(self._found(name, folder, held, sent))
            return [pool_id(held, name)]
        return self._fallback.find(name, folder)

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are; one that its pool never began is sent to another place on the way."""
        for end in self._sender.ended():
            self._jobs.let_go(end)
        self._jobs.look_again()
        said: dict[str, JobStatus] = {}
        elsewhere: dict[str, str] = {}
        for name, scheduler_id in jobs.items():
            sent = self._given(name, scheduler_id)
            if sent is not None:
                sent, status = self._followed(sent)
                if status is None:
                    elsewhere[name] = sent.to
                else:
                    said[name] = status
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

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs; a pool that does not let go of one is ended itself, and gives its other jobs back."""
        elsewhere, pools = [i for i in scheduler_ids if way_of(i) is not None], []
        for scheduler_id in scheduler_ids:
            sent = self._given(scheduler_id.rpartition("/")[2], scheduler_id)
            if sent is None:
                continue
            if pool_of(sent.to) is None:
                elsewhere += (
                    [sent.to] if not sent.to.endswith(":") else self._fallback.find(sent.job, Path(sent.folder))
                )
                continue
            self._folder.write_sent(msgspec.structs.replace(sent, cancelled=True))
            self._sender.stop(sent)
            pools.append(sent)
        self._fallback.cancel(*elsewhere)
        for sent in pools:
            self._sender.make_sure(sent)

    # --- the pools

    def tend(self) -> None:
        """Let the relay take its next turn, in a thread of its own: Slurm's commands may take seconds."""
        now = time.monotonic()
        if self._turn is not None and self._turn.done():
            error, self._turn = self._turn.exception(), None
            if error is not None:
                self._relay.signs.tell(f"the pools can't be looked after: {error}")
                self._turn_due = now + TROUBLE_S
        if self._turn is None and now >= self._turn_due:
            self._turn_due = now + TURN_S
            self._turn = self._worker.submit(self._relay.turn)

    def rehearse(self, resources: Resources) -> Rehearsal:  # noqa: ARG002
        """What a pool would be started with; a job itself is only a name that is sent to one."""
        return rehearse_pool(self._config)

    def check(self) -> list[Finding]:
        """The pool folder, the secret, the pools that are up, and what starts them."""
        return [*check_pools(self._config), *self._fallback.check()]

    def close(self) -> None:
        """Give resources back; pools and jobs go on."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._sender.close()
        self._fallback.close()

    def pools(self) -> tuple[Seen, ...]:
        """The pools as their own files say at this moment."""
        return self._relay.glance()

    def allocations(self) -> list[str]:
        """Slurm jobs into which a job may go as a step, since their pools take none."""
        return self._relay.allocations()

    @property
    def trouble(self) -> str:
        """Why there are not as many pools as there should be; empty if all is well."""
        return self._relay.signs.trouble

    # --- inside

    def _given(self, name: str, scheduler_id: str) -> Sent | None:
        """The record of a job that was given to a pool once; made anew if it was lost and a pool has the job."""
        if pool_of(scheduler_id) is None:
            return None
        sent = self._folder.sent(name)
        held = holder_of(self._folder, name) if sent is None else None
        folder = task_folder(self._folder.of(held), name) if held is not None else ""
        if held is None or not folder:
            return sent
        found = self._found(name, self._config.service.runs / folder, held, None)
        self._folder.write_sent(found)
        return found

    def _found(self, name: str, folder: Path, pool: str, sent: Sent | None) -> Sent:
        """The record of a job that a pool has, where the one that was written before was lost or says otherwise."""
        if sent is not None:
            return msgspec.structs.replace(sent, to=pool_id(pool, name), why="")
        most = self._config.scheduler
        return Sent(
            job=name, folder=str(folder), ranks=most.ranks, time_limit_s=most.time_limit_s, to=pool_id(pool, name)
        )

    def _followed(self, sent: Sent) -> tuple[Sent, JobStatus | None]:
        """A job that was given to a pool once: how it is, after what had to be done; None if it went another way."""
        until, told = self._refused.get(sent.job, (0.0, None))
        if told is not None and time.monotonic() < until:
            return sent, told
        try:
            if way_of(sent.to) is not None:
                return self._settled(sent), None
            verdict, status = self._jobs.judge(sent)
            if verdict == "give back":
                return self._sent_on(sent, status)
        except (SubmitError, Unavailable) as error:  # it waits until somebody takes it
            waits = SchedulerPhase.PENDING
            told = JobStatus(scheduler_id=sent.to, phase=waits, reason=f"its pool has ended; {error}")
            self._refused[sent.job] = time.monotonic() + AGAIN_S, told
            return sent, told
        if verdict == "overdue" and not sent.cancelled:
            log.warning("%s reached its time limit of %d s and is stopped", sent.job, sent.time_limit_s)
            sent = msgspec.structs.replace(sent, cancelled=True)
            self._folder.write_sent(sent)
        alive = status.phase in (SchedulerPhase.PENDING, SchedulerPhase.RUNNING)
        now = time.monotonic()
        if alive and sent.cancelled and now >= self._stop_again.get(sent.job, now):
            # until the pool lets go: it may not have heard, or we died before we said it; but not while it says so
            self._stop_again[sent.job] = now + AGAIN_S
            self._sender.stop(sent)
        self._sender.is_at(sent.job, pool_of(sent.to) if alive else None)
        return sent, status

    def _sent_on(self, sent: Sent, status: JobStatus) -> tuple[Sent, JobStatus | None]:
        """Give a job that its pool never began, and never will, to another one under the same name."""
        again = self._sender.send(sent, tried=(pool_of(sent.to) or "",))
        log.warning("%s: %s; sent on as %s", sent.job, status.reason, again.to)
        self._jobs.forget(sent.job)
        if pool_of(again.to) is None:
            return again, None
        return again, msgspec.structs.replace(status, scheduler_id=again.to)

    def _settled(self, sent: Sent) -> Sent:
        """A job that went another way, with its id: if that got lost, it is looked for before it is sent again."""
        if not sent.to.endswith(":"):
            return sent
        found = self._fallback.find(sent.job, Path(sent.folder))
        if not found:
            return self._sender.send(sent)
        settled = msgspec.structs.replace(sent, to=found[0])
        self._folder.write_sent(settled)
        return settled

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

    def _forget(self, name: str) -> None:
        self._sender.is_at(name, None)
        self._refused.pop(name, None)
        self._stop_again.pop(name, None)
        self._jobs.forget(name)
        self._folder.forget(name)


def _claimed(folder: Path) -> bool:
    return (folder / CLAIM_FILE).exists()
