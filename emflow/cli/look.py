"""Commands that only look: status, trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from emflow.cli.options import configuration, journal_of, json_option, print_json
from emflow.config import Config
from emflow.errors import UsageError, printable
from emflow.journal import Journal
from emflow.journal_usage import day_of
from emflow.microscope.protocol import COMMAND_ID
from emflow.records import Acquisition, AcquisitionState, JobState
from emflow.runs import holder
from emflow.steps.context import open_alarms
from emflow.steps.economy import waiting
from emflow.timeline import STEPS, Row, acquisition_events, row_of, trace_of
from mpi_kernels.contract import Event

WIDE = 130
NARROW_STEPS = ("staged", "submitted", "running", "reduced")
COLOURS = {"DONE": "green", "QUARANTINED": "red", "STALLED": "yellow", "SUPERSEDED": "dim"}


@click.command()
@json_option
@click.option("--watch", "watch_", is_flag=True, help="Keep the table up to date until Ctrl-C.")
@click.option("-n", "--limit", default=20, show_default=True, help="Newest acquisitions to show.")
@click.pass_context
def status(ctx: click.Context, as_json: bool, watch_: bool, limit: int) -> None:
    """Show where every acquisition is."""
    config = configuration(ctx)
    with journal_of(config, read_only=True) as journal:
        if as_json:
            print_json(overview(config, journal, limit))
        elif not watch_:
            console = Console()
            console.print(status_table(overview(config, journal, limit), console.width))
        else:
            with Live(refresh_per_second=4, screen=False) as live:
                while True:
                    live.update(status_table(overview(config, journal, limit), live.console.width))
                    time.sleep(0.25)


def overview(config: Config, journal: Journal, limit: int) -> dict[str, Any]:
    """All that ``emflow status`` shows, as plain values."""
    acquisitions, jobs = journal.counts()
    newest = journal.acquisitions(limit=limit, newest_first=True)
    pid = holder(config.service.state)
    caps, day = config.caps, day_of(time.time_ns())
    return {
        "service": {"running": pid is not None, "pid": pid},
        "acquisitions": {state.value: acquisitions[state] for state in AcquisitionState},
        "jobs": {state.value: jobs[state] for state in JobState},
        "node_hours": {
            "day": day,
            "spent": round(journal.usage.of_day(day), 6),
            "cap": caps.node_hours_per_day,
            "cap_per_experiment": caps.node_hours_per_experiment,
        },
        "backlog": {"waiting": waiting(journal), "limit": caps.backlog},
        "alarms": open_alarms(journal),
        "newest": [row_of(journal, a) for a in newest],
    }


def status_table(view: dict[str, Any], width: int) -> Group:
    """Lay the overview out for a terminal."""
    service = f"service running, pid {view['service']['pid']}" if view["service"]["running"] else "service not running"
    counts = "  ".join(f"{state} {n}" for state, n in view["acquisitions"].items() if n) or "nothing seen yet"
    head = [Text(line) for line in (f"emflow: {service}", counts, spending(view), "seconds since first sight:")]
    table = status_rows(view["newest"], width)
    notes = [Text(f"{row.id[:8]}: {printable(row.reason)}") for row in view["newest"] if row.reason]
    for name, text in view["alarms"].items():
        notes.append(Text(f"ALARM {name}: {printable(text)}", style="bold red"))
    return Group(*head, table, *notes)


def spending(view: dict[str, Any]) -> str:
    """What jobs have cost today, and how many acquisitions wait."""
    hours, backlog = view["node_hours"], view["backlog"]
    day = f"{hours['spent']:.3f} node-hours on {hours['day']} (UTC)" + (f" of {hours['cap']:g}" if hours["cap"] else "")
    return f"{day}, {backlog['waiting']} waiting" + (f" of {backlog['limit']}" if backlog["limit"] else "")


def status_rows(rows: list[Row], width: int) -> Table:
    """One line for each acquisition, with the seconds from its first sight to each step; fewer columns if narrow."""
    wide = width >= WIDE
    steps = STEPS[1:] if wide else NARROW_STEPS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("id", no_wrap=True)
    table.add_column("file", overflow="fold")
    table.add_column("state", no_wrap=True)
    if wide:
        table.add_column("data", no_wrap=True)
    for step in steps:
        table.add_column(step, justify="right", no_wrap=True)
    if wide:
        table.add_column("job", no_wrap=True)
        table.add_column("node-h", justify="right", no_wrap=True)
    for row in rows:
        data = f"{row.kind} {row.format}, {row.frames} frames" if row.format else ""
        table.add_row(
            row.id[:8],
            Text(printable(row.path)),
            Text(row.state, style=COLOURS.get(row.state, "cyan")),
            *([data] if wide else []),
            *(f"{row.seconds[step]:.2f}" if step in row.seconds else "" for step in steps),
            *([f"{row.job[17:]} {row.job_state}", f"{row.node_hours:.3f}"] if wide else []),
        )
    return table


@click.command()
@click.argument("id_", metavar="ID")
@json_option
@click.pass_context
def trace(ctx: click.Context, id_: str, as_json: bool) -> None:
    """Show everything that happened to one acquisition, with times; of a commanded one, the whole loop.

    ID is an acquisition's id or its beginning, a job's name, a command's id, or a path on the share.
    """
    config = configuration(ctx)
    with journal_of(config, read_only=True) as journal:
        acquisition = one(journal, trace_of(config, id_))
        events = acquisition_events(journal, config, acquisition)
    if as_json:
        print_json({"acquisition": acquisition, "events": events})
        return
    click.echo(f"{acquisition.id}  {printable(acquisition.name)}  {acquisition.state}")
    for line in trace_lines(events):
        click.echo(line)
    if acquisition.reason:
        click.echo(f"reason: {printable(acquisition.reason)}")


def trace_lines(events: Sequence[Event]) -> Iterator[str]:
    """One line for each event: seconds since the first, since the one before, where, what, and its facts."""
    zero = before = events[0].wall_ns if events else 0
    width = max([3, *(len(_whose(event)) for event in events)])
    for event in events:
        facts = ", ".join(f"{name}={_fact(value)}" for name, value in event.attrs.items() if name != "from")
        yield printable(
            f"{(event.wall_ns - zero) / 1e9:9.3f} s {(event.wall_ns - before) / 1e6:+10.1f} ms  {event.plane:10}  "
            f"{event.name:11} {_whose(event):{width}}  {event.host}:{event.pid}  {facts}"
        ).rstrip()
        before = event.wall_ns


def _whose(event: Event) -> str:
    """The end of a subject's id that tells it from the others of its trace: attempt of a job, number of a command."""
    command = COMMAND_ID.fullmatch(event.subject)
    return f"{command['decision']}-{command['number']}" if command else event.subject[16:]


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_fact(one)}" for name, one in value.items()) + "}"
    return str(value)


def one(journal: Journal, id_: str) -> Acquisition:
    """Find the one acquisition that an id, its beginning, a job's name or a path means."""
    found = journal.find(id_)
    if not found:
        raise UsageError(f"no acquisition is called {printable(id_)!r}", next_step="See what there is: emflow status")
    if len(found) > 1:
        names = ", ".join(a.id for a in found[:5])
        raise UsageError(f"{printable(id_)!r} could be any of {names}", next_step="Give more of the id")
    return found[0]
