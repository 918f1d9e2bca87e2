"""The table of an experiment: one line a decision, live on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec

from emflow.agent.records import AgentStatus, Row
from emflow.errors import printable
from emflow.microscope.protocol import Action

if TYPE_CHECKING:
    from rich.table import Table


class LiveTable:
    """The live table on a terminal, one line a decision elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._told = -1
        self._live: Any = None
        if sys.stdout.isatty():
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()

    def update(self, status: AgentStatus) -> None:
        """Show the newest status."""
        if self._live is not None:
            self._live.update(status_table(status), refresh=True)
            return
        for row in status.rows:
            if row.number > self._told:
                self._told = row.number
                click.echo(" ".join(cell for cell in _cells(row) if cell))

    def close(self) -> None:
        """Leave the last table on the terminal."""
        if self._live is not None:
            self._live.stop()


def status_table(status: AgentStatus) -> Table:
    """The decisions of an experiment, one a line, for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rest = f"{status.acquisitions} acquisitions, {status.dose_e:.3g} e, {status.seconds:.1f} s"
    head = f"{status.experiment} {status.policy} {status.mode}: {status.ending or status.state}; {rest}"
    table = Table(title=head, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("decision", "scans", "seconds", "merit", "measured", "why"):
        table.add_column(name, justify="right" if name in ("decision", "scans", "seconds", "merit") else "left")
    for row in status.rows:
        style = "" if row.trusted and row.by == "policy" else "yellow"
        table.add_row(*(Text(cell) for cell in _cells(row)), style=style)
    if status.pending is not None:
        actions = ", ".join(_action(a) for a in status.pending.actions)
        what = f"emflow agent approve {status.number}" if status.state == "asking" else "proposed"
        table.caption = f"{what}: {actions}"
    elif status.state == "held":
        table.caption = f"held: {status.held}; goes on by itself, see emflow status"
    elif status.state == "hold":
        table.caption = "on hold: look at the microscope, then: emflow agent resume"
    return table


def _cells(row: Row) -> tuple[str, ...]:
    measured = "  ".join(f"{name}={value:.4g}" for name, value in row.measured.items())
    merit = "" if row.merit is None else f"{row.merit:.4g}"
    return (str(row.number), str(row.acquisitions), f"{row.seconds:.2f}", merit, measured, printable(row.reason))


def _action(action: Action) -> str:
    plain = msgspec.to_builtins(action)
    verb = plain.pop("verb")
    return printable(f"{verb} " + " ".join(f"{name}={value}" for name, value in plain.items()))
