"""``emflow pool``: start pools of warm ranks, look at them, drain them, stop them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from emflow.cli.options import configuration, interruptible, json_option, print_json
from emflow.errors import Unavailable, UsageError, printable

if TYPE_CHECKING:
    from emflow.schedulers.pool_plan import Seen
    from emflow.schedulers.pool_relay import Relay
    from emflow.schedulers.pool_report import PoolLine, PoolReport

LOOK_S = 0.3
"""How often it is looked at what is waited for."""

END_S = 60.0
"""How long the end of a pool may take after it was told to: Slurm kills after 30 s by default."""

PIPED_WIDTH = 10_000
"""Columns where there is no terminal: more than any line needs."""

HEADS = ("pool", "where", "state", "job", "done", "left", "successor")


@click.group()
def pool() -> None:
    """Keep MPI ranks warm, so that jobs start at once."""


@pool.command()
@click.option("--count", type=click.IntRange(1, 64), help="Pools that there should be; else [pool] count.")
@click.option("--wait", is_flag=True, help="Until they take tasks.")
@json_option
@click.pass_context
def start(ctx: click.Context, count: int | None, wait: bool, as_json: bool) -> int:
    """Start the pools that are missing, and let a service start more again after a stop."""
    from emflow.schedulers.pool_plan import is_old

    config = configuration(ctx)
    relay = _relay(ctx)
    wanted = count or config.pool.count
    with relay.locked():
        relay.folder.hold(False)
        up = [
            p for p in relay.look() if p.standing not in ("draining", "silent") and not is_old(p, config.pool.relay_s)
        ]
        started = [relay.start() for _ in range(max(0, wanted - len(up)))]
    names = [one.name for one in up] + started
    if not as_json:
        click.echo("\n".join(f"started {name}" for name in started) or f"{len(up)} already there, none is missing")
    if wait:
        _wait(relay, f"{len(names)} pools to take tasks", lambda pools: _ready(pools, names))
    if as_json:
        print_json({"started": started, "there": [one.name for one in up]})
    return 0


@pool.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> int:
    """Show the pools, what they do, how long they have left and what they cost; 69 if none takes tasks."""
    from emflow.schedulers.pool_report import report

    found = report(configuration(ctx))
    if as_json:
        print_json(found)
    else:
        _show(found)
    return 0 if any(line.state in ("idle", "working") for line in found.pools) else 69


@pool.command()
@click.argument("names", nargs=-1)
@json_option
@click.pass_context
def drain(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> int:
    """Let pools finish the task that runs and end; all if none is named.  A running service replaces them."""
    relay = _relay(ctx)
    with relay.locked():
        known = [one.name for one in relay.look()]
        if unknown := [name for name in names if name not in known]:
            raise UsageError(
                f"no pool is called {printable(unknown[0])!r}", next_step=f"There are: {', '.join(known) or 'none'}"
            )
        chosen = list(names) or known
        for name in chosen:
            relay.drain(name)
    if as_json:
        print_json({"draining": chosen})
    else:
        click.echo("\n".join(f"draining {name}" for name in chosen) or "no pool is there")
    return 0


@pool.command()
@click.option("--timeout", default=60, show_default=True, type=click.IntRange(0, 86400), help="Seconds for what runs.")
@json_option
@click.pass_context
def stop(ctx: click.Context, timeout: int, as_json: bool) -> int:
    """Drain all pools, wait for what runs, and end them; none is started again until emflow pool start."""
    relay = _relay(ctx)
    with relay.locked():
        relay.folder.hold(True)
        names = [one.name for one in relay.look()]
        for name in names:
            relay.drain(name)
        _end(relay, [one for one in relay.pools if one.standing in ("queued", "starting", "silent")])
    if not _wait(relay, "pools to finish what runs", lambda pools: not pools, timeout):
        with relay.locked():
            _end(relay, list(relay.look()))
    if not _wait(relay, "pools to end", lambda pools: not pools, END_S):
        raise Unavailable(
            f"it is not certain that pool {relay.pools[0].name} has ended: {relay.signs.trouble or 'it still runs'}",
            next_step="See emflow pool status, and try again",
        )
    if as_json:
        print_json({"stopped": names})
    else:
        click.echo("\n".join(f"stopped {name}" for name in names) or "no pool was there")
    return 0


def _relay(ctx: click.Context) -> Relay:
    from emflow.schedulers.pool_folder import PoolFolder
    from emflow.schedulers.pool_setup import relay_of

    config = configuration(ctx)
    return relay_of(config, PoolFolder(config.pool.folder))


def _end(relay: Relay, pools: list[Seen]) -> None:
    for one in pools:
        relay.end(one.name, "stopped by a person")


def _ready(pools: tuple[Seen, ...], names: list[str]) -> bool:
    taking = {one.name for one in pools if one.takes}
    if lost := set(names) - {one.name for one in pools}:
        raise Unavailable(f"pool {min(lost)} has ended", next_step="See job.out in its folder, and emflow pool status")
    return set(names) <= taking


def _wait(relay: Relay, what: str, over: Callable[[tuple[Seen, ...]], bool], seconds: float | None = None) -> bool:
    """Look at the pools until it is over, with a line that tells people so; False if that takes too long."""
    from rich.console import Console

    until = None if seconds is None else time.monotonic() + seconds
    console = Console(stderr=True)
    with interruptible(), console.status(f"waiting for {what}") as line:
        while True:
            with relay.locked():
                pools = relay.look()
            if over(pools):
                return True
            if until is not None and time.monotonic() > until:
                return False
            told = ", ".join(f"{one.name} {one.standing}{' ' + one.job if one.job else ''}" for one in pools)
            line.update(f"waiting for {what}: {told}")
            time.sleep(LOOK_S)


def _show(found: PoolReport) -> None:
    from rich.console import Console
    from rich.table import Table

    if found.pools:
        table = Table(*HEADS, box=None, padding=(0, 2, 0, 0))
        for line in found.pools:
            table.add_row(*_cells(line))
        Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)
    else:
        last = f"; the last one: {printable(found.last)}" if found.last else ""
        click.echo(f"no pool is there{last}")
    stopped = "; stopped: none is started until emflow pool start" if found.stopped else ""
    click.echo(f"{len(found.pools)} of {found.wanted} pools, {found.node_hours:.2f} node-hours today{stopped}")
    if found.trouble:
        click.echo(printable(found.trouble))


def _cells(line: PoolLine) -> tuple[str, ...]:
    waits = f" (+{line.queued})" if line.queued else ""
    failed = f" ({line.failed} failed)" if line.failed else ""
    left = "" if line.left_s is None else f"{max(0.0, line.left_s):.0f} s"
    where = printable(line.where or line.scheduler_id)
    return line.name, where, line.state, f"{line.job}{waits}", f"{line.done}{failed}", left, line.successor
