"""How a job of a pool is, from its run folder and the pool's: who claimed it, in whose hands it is, who has ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from emflow.records import EndCause, JobStatus, SchedulerPhase
from emflow.schedulers.pool_folder import PoolFolder, Sent
from emflow.schedulers.pool_look import Found, hands, read_pool
from mpi_kernels import jsonfile
from mpi_kernels.contract import CLAIM_FILE, ERROR_FILE, JOB_NAME, RESULT_FILE, Claim, ResultManifest
from mpi_kernels.errors import FormatError
from mpi_kernels.pool.records import POOL_NAME, TaskEnd

T = TypeVar("T")

HANDS_S = 3.0
"""How long a job that was sent may be in nobody's hands before that is believed."""

LATE_S = 65.0
"""The same where the file system may show files late.  Source: nfs(5), acdirmax, 60 s by default."""

_ID = re.compile(rf"pool:(?P<pool>{POOL_NAME.pattern})/(?P<job>{JOB_NAME.pattern})")

Verdict = Literal["said", "overdue", "give back"]


def pool_id(pool: str, job: str) -> str:
    """The id of a job that was given to a pool."""
    return f"pool:{pool}/{job}"


def pool_of(scheduler_id: str) -> str | None:
    """Which pool an id names; None if it is not of this kind."""
    found = _ID.fullmatch(scheduler_id)
    return None if found is None else found["pool"]


@dataclass(slots=True)
class PoolJobs:
    """Judges the jobs that were given to pools.

    Parameters
    ----------
    folder : PoolFolder
        Where they were sent.
    hands_s : float
        How long a job may be in nobody's hands before that is believed.
    """

    folder: PoolFolder
    hands_s: float = HANDS_S
    clock: Callable[[], float] = time.monotonic
    _let_go: set[str] = field(default_factory=set)
    _since: dict[tuple[str, str], float] = field(default_factory=dict)
    _looks: dict[str, tuple[Found, frozenset[str]]] = field(default_factory=dict)

    def look_again(self) -> None:
        """Read the pools' folders anew when they are needed next; each is read once for all jobs."""
        self._looks.clear()

    def judge(self, sent: Sent) -> tuple[Verdict, JobStatus]:
        """How a job is, and whether anything is to be done about it.

        ``give back``: its pool never began it and never will, so that it may go to another one; ``overdue``: it runs
        for longer than it may.
        """
        folder, pool = Path(sent.folder), pool_of(sent.to)
        assert pool is not None
        if (folder / ERROR_FILE).exists():
            return "said", self._ended(sent, "", EndCause.FAILED)
        if (folder / RESULT_FILE).exists():
            return "said", self._ended(sent, "", EndCause.COMPLETED)
        claim = _record(Claim, folder / CLAIM_FILE)
        if claim is not None:
            return self._claimed(sent, claim, pool)
        return self._waits(sent, pool)

    def let_go(self, end: TaskEnd) -> None:
        """Believe a pool that says that a job has no end in its run folder, and that it does not have it any more."""
        if end.how not in ("result", "error"):  # these are seen there, though maybe later
            self._let_go.add(end.job)

    def forget(self, job: str) -> None:
        """Forget since when things have been so; the job has ended, or is somewhere else."""
        self._let_go.discard(job)
        for key in [key for key in self._since if key[0] == job]:
            del self._since[key]

    def _claimed(self, sent: Sent, claim: Claim, pool: str) -> tuple[Verdict, JobStatus]:
        """Only who has claimed a job can give it a result; whoever else it was sent to leaves it alone."""
        owner = self._owner(claim, pool)
        if owner is None:  # neither of our pools
            if self._in_hands(sent, pool):
                return "said", self._status(sent, SchedulerPhase.RUNNING, "claimed by another attempt", node=claim.host)
            return "said", self._ended(sent, f"{claim.host} had claimed it as {claim.scheduler_id or 'a job'}")
        closed = self.folder.closed(owner)
        if closed is not None:
            told, cause = f"with pool {owner}: {closed.reason}", closed.cause or EndCause.FAILED
            if cause is EndCause.TIMEOUT:  # the pool's time, and not the job's
                told, cause = f"{told}. Raise relay_s in [pool] above the time of a job", EndCause.FAILED
            return "said", self._ended(sent, told, cause)
        if not self._in_hands(sent, owner):
            cause = EndCause.CANCELLED if sent.cancelled else EndCause.FAILED
            return "said", self._ended(sent, f"pool {owner} has lost its ranks, or was told to end it", cause)
        status = self._status(sent, SchedulerPhase.RUNNING, "", node=claim.host)
        return ("overdue" if self._for_s(sent.job, "runs") > sent.time_limit_s else "said"), status

    def _waits(self, sent: Sent, pool: str) -> tuple[Verdict, JobStatus]:
        over = self._over(sent, pool)
        if not over and self._in_hands(sent, pool):
            return "said", self._status(sent, SchedulerPhase.PENDING, f"waits in pool {pool}")
        if sent.cancelled:
            return "said", self._ended(sent, "cancelled before it began", EndCause.CANCELLED)
        why = f"pool {pool} has ended: {over}" if over else f"pool {pool} did not take it"
        return "give back", self._status(sent, SchedulerPhase.PENDING, why)

    def _over(self, sent: Sent, pool: str) -> str:
        """Why a pool will never begin a job, since it has ended; empty if it still may."""
        closed = self.folder.closed(pool)
        if closed is not None:
            return closed.reason
        found, held = self._look(pool)
        if found.ended is None:
            return ""
        # what it says that it left was not begun; the rest is judged when nothing of it runs any more
        return found.ended.message if sent.job in found.ended.left or sent.job not in held else ""

    def _look(self, pool: str) -> tuple[Found, frozenset[str]]:
        """What a pool has written, and the jobs in its hands."""
        if pool not in self._looks:
            held = hands(self.folder.of(pool))  # first: what it lets go of after this has its end by then
            self._looks[pool] = read_pool(self.folder.of(pool)), held
        return self._looks[pool]

    def _in_hands(self, sent: Sent, pool: str) -> bool:
        """Whether a pool has a job, or had it a moment ago."""
        key = (sent.job, f"not held by {pool}")
        if sent.job in self._look(pool)[1]:
            self._since.pop(key, None)
            return True
        if sent.cancelled or sent.job in self._let_go:  # whoever cancelled it has waited for that
            return False
        now = self.clock()
        return now - self._since.setdefault(key, now) < self.hands_s

    def _owner(self, claim: Claim, pool: str) -> str | None:
        """The pool that claimed a job; a claim bears the pool's id, or what the pool itself was started as."""
        named = pool_of(claim.scheduler_id)
        if named is not None:
            return named
        others = (name for name in reversed(self.folder.names()) if name != pool)
        for name in (pool, *others):
            launched = self.folder.launched(name)
            if launched is not None and launched.scheduler_id == claim.scheduler_id:
                return name
        return None

    def _for_s(self, job: str, what: str) -> float:
        now = self.clock()
        return now - self._since.setdefault((job, what), now)

    def _ended(self, sent: Sent, reason: str, cause: EndCause = EndCause.UNSAID) -> JobStatus:
        """ENDED, with the nodes and the time that it has had."""
        folder, claim = Path(sent.folder), None
        manifest = _record(ResultManifest, folder / RESULT_FILE)
        if manifest is not None:
            claim = _record(Claim, folder / CLAIM_FILE)
        seconds = (manifest.wall_ns - claim.wall_ns) / 1e9 if manifest is not None and claim is not None else 0.0
        pool = pool_of(sent.to)
        nodes = self._look(pool)[0].nodes if pool is not None else 0
        return JobStatus(
            scheduler_id=sent.to,
            phase=SchedulerPhase.ENDED,
            reason=reason,
            cause=cause,
            nodes=nodes,
            elapsed_s=max(0.0, seconds),
        )

    @staticmethod
    def _status(sent: Sent, phase: SchedulerPhase, reason: str, node: str = "") -> JobStatus:
        return JobStatus(scheduler_id=sent.to, phase=phase, reason=reason, node=node)


def _record(kind: type[T], path: Path) -> T | None:
    try:
        return jsonfile.read(kind, path)
    except (OSError, FormatError):
        return None
