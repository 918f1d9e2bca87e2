"""How the pools are, for people: a line for each, and what they have cost."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime

import msgspec

from emflow.config import Config
from emflow.schedulers.pool_folder import PoolFolder
from emflow.schedulers.pool_launch import launchers
from emflow.schedulers.pool_look import Found, read_pool
from emflow.schedulers.pool_plan import Seen, successors
from emflow.schedulers.pool_setup import spec_of
from emflow.schedulers.pool_signs import GONE, Signs
from mpi_kernels.pool.records import HEARTBEAT_FILE


class PoolLine(msgspec.Struct, frozen=True, kw_only=True):
    """One pool that is not over.

    Attributes
    ----------
    state : str
        ``queued``, ``starting``, ``idle``, ``working``, ``draining``, or ``silent``: no sign of life.
    where : str
        Its nodes; of one that has none yet, why it waits.
    scheduler_id : str
        What it was started as; empty if that is not known.
    done : int
        Tasks that have ended.
    left_s : float or None
        Seconds of its walltime that are left; None before it has begun.
    successor : str
        Who takes over from it, if its time is nearly up.
    """

    name: str
    state: str
    where: str
    scheduler_id: str
    job: str
    queued: int
    done: int
    failed: int
    left_s: float | None
    successor: str
    nodes: int
    node_hours: float


class PoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``emflow pool status`` shows.

    Attributes
    ----------
    wanted : int
        Pools that there should be.
    stopped : bool
        A person has stopped them: none is started.
    last : str
        Why the last pool that is over has ended.
    node_hours : float
        Of all pools that started today (UTC).
    """

    wanted: int
    stopped: bool
    pools: tuple[PoolLine, ...]
    last: str
    node_hours: float
    trouble: str


def report(config: Config) -> PoolReport:
    """Look at all pools, and ask who started them about those that give no sign of life; nothing is done."""
    folder = PoolFolder(config.pool.folder)
    signs = Signs(folder, launchers(config), config.pool.launcher)
    found = {name: read_pool(folder.of(name)) for name in folder.open_names()}
    for name, one in found.items():
        signs.was_silent(name, one, _silence_s(folder, name))
    signs.ask()
    # without a service nobody may have noted yet that one is over
    over = [name for name in found if (said := signs.said.get(name)) is not None and said.phase in GONE]
    spec = spec_of(config)
    seen = {name: signs.seen(name, one, spec, signs.silence_s(name, one)) for name, one in found.items()}
    pools = [pool for name, pool in seen.items() if name not in over]
    after = successors(pools, config.pool.relay_s)
    return PoolReport(
        wanted=config.pool.count,
        stopped=folder.held,
        pools=tuple(_line(signs, pool, found[pool.name], after) for pool in pools),
        last=_last(folder, found, over),
        node_hours=_node_hours_today(folder, list(seen.values())),
        trouble=signs.trouble,
    )


def _last(folder: PoolFolder, found: dict[str, Found], over: list[str]) -> str:
    """Why the newest pool that is over has ended."""
    if over:
        ended = found[over[-1]].ended
        return ended.message if ended is not None else "its ranks are gone"
    closed = [one for name in folder.names() if (one := folder.closed(name)) is not None]
    last = max(closed, key=lambda one: one.wall_ns, default=None)
    return "" if last is None else last.reason


def _line(signs: Signs, pool: Seen, found: Found, after: dict[str, str]) -> PoolLine:
    said, launched, told = signs.said.get(pool.name), signs.folder.launched(pool.name), found.told
    return PoolLine(
        name=pool.name,
        state=pool.standing,
        where=pool.host or (said.reason or said.node if said is not None else ""),
        scheduler_id=launched.scheduler_id if launched is not None else "",
        job=pool.job,
        queued=told.queued if told is not None else 0,
        done=pool.done,
        failed=told.failed if told is not None else 0,
        left_s=pool.left_s,
        successor=after.get(pool.name, ""),
        nodes=pool.nodes,
        node_hours=pool.nodes * pool.age_s / 3600,
    )


def _silence_s(folder: PoolFolder, name: str) -> float:
    """Since the last heartbeat, by the clocks as they are: a hint for people, on which nothing is done."""
    with contextlib.suppress(OSError):
        return max(0.0, time.time() - (folder.of(name) / HEARTBEAT_FILE).stat().st_mtime)
    return 0.0


def _node_hours_today(folder: PoolFolder, pools: list[Seen]) -> float:
    today = datetime.now(UTC).strftime("%Y%m%d")  # a pool's name begins with the day of its start
    going = sum(pool.nodes * pool.age_s for pool in pools if pool.name.startswith(today))
    over = (folder.closed(name) for name in folder.names() if name.startswith(today))
    return (going + sum(closed.nodes * closed.seconds for closed in over if closed is not None)) / 3600
