"""What to do about the pools that there are, as pure functions: no clock, no files.

A pool that is near its end keeps taking tasks until its successor takes them; only then it is drained.  So there is
always somebody who takes tasks, and nobody is told to stop before somebody else has begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emflow.schedulers.pool_folder import Closed

Standing = Literal["queued", "starting", "idle", "working", "draining", "silent"]
TAKING: frozenset[Standing] = frozenset({"idle", "working"})
"""Standings of a pool that takes tasks."""

EARLIEST_RELAY = 0.5
"""Part of a pool's walltime after which, at the earliest, a successor is asked for: where ``relay_s`` is longer than
the rest, each pool would be replaced as soon as it has begun."""

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One pool that is not closed, as it was seen last.

    Attributes
    ----------
    standing : str
        ``queued`` (its launcher waits), ``starting``, ``idle``, ``working``, ``draining``, or ``silent``: no sign of
        life although it runs.
    warn_s : float
        So long before its end it takes nothing new.
    left_s : float or None
        Until its walltime is up; None before it has begun.
    age_s : float
        Since it was started; 0 before it has begun.
    nodes : int
        That it has; 0 before it has begun.
    allocation : str
        Id of its Slurm job while that runs and the pool itself gives no sign of life, else empty.
    deaf : bool
        It was told to take no more tasks, and still does.
    """

    name: str
    standing: Standing
    ranks: int
    walltime_s: float
    warn_s: float = 0.0
    left_s: float | None = None
    age_s: float = 0.0
    nodes: int = 0
    host: str = ""
    job: str = ""
    done: int = 0
    allocation: str = ""
    deaf: bool = False

    @property
    def takes(self) -> bool:
        """Whether tasks may be sent to it."""
        return self.standing in TAKING and (self.left_s is None or self.left_s > self.warn_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many pools to start, and which to drain."""

    start: int = 0
    drain: tuple[str, ...] = ()


def relay_time_s(walltime_s: float, relay_s: float) -> float:
    """How long before its end a pool's successor is asked for."""
    return min(relay_s, EARLIEST_RELAY * walltime_s)


def is_old(pool: Seen, relay_s: float) -> bool:
    """Whether it is time for a pool's successor."""
    return pool.left_s is not None and pool.left_s <= relay_time_s(pool.walltime_s, relay_s)


def plan(pools: Sequence[Seen], count: int, relay_s: float) -> Plan:
    """Keep ``count`` pools, replace those whose time is nearly up, and drain an old one once it has been replaced.

    Parameters
    ----------
    pools : sequence of Seen
        All that are not closed, oldest first.
    """
    going = [pool for pool in pools if pool.standing not in ("draining", "silent")]
    young = [pool for pool in going if not is_old(pool, relay_s)]
    old = [pool.name for pool in going if pool.takes and is_old(pool, relay_s)]
    spare = sum(pool.takes for pool in young) + len(old) - count
    return Plan(start=max(0, count - len(young)), drain=tuple(old[: max(0, spare)]))


def successors(pools: Sequence[Seen], relay_s: float) -> dict[str, str]:
    """Who takes over from each pool that is near its end or drains, as far as there is somebody."""
    leaving = [pool.name for pool in pools if pool.standing == "draining" or is_old(pool, relay_s)]
    coming = [pool.name for pool in pools if pool.name not in leaving and pool.standing != "silent"]
    return dict(zip(leaving, coming, strict=False))


def pause_s(closed: Sequence[Closed]) -> float:
    """How long to wait after the last pool's end before the next start: the longer, the more died young in a row.

    Parameters
    ----------
    closed : sequence of Closed
        Pools that have ended, oldest first.
    """
    young = 0
    for record in reversed(closed):
        if not record.young:
            break
        young += 1
    return 0.0 if not young else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (young - 1))


def choose(pools: Sequence[Seen], ranks: int, load: dict[str, int]) -> list[Seen]:
    """Pools that may take a job of so many ranks or fewer, the best first: least to do, then most time left."""
    able = [pool for pool in pools if pool.takes and pool.ranks >= ranks]
    return sorted(able, key=lambda pool: (load.get(pool.name, 0), -(pool.left_s or 0.0), pool.name))
