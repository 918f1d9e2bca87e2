"""The live table of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from emflow.demo.progress import COLUMNS, Stage
from emflow.errors import printable

WIDE = 110
NARROW = ("write", "staged", "reduced", "decided")


def layout(rows: Sequence[Stage], width: int) -> Group:
    """One line for each acquisition: seconds of each step, what the policy measured, what it decided.

    Where the terminal is narrow, two steps are left out and the decisions stand below the table.
    """
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("acquisition", no_wrap=True)
    columns = tuple(COLUMNS) if wide else NARROW
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("residual", justify="right", no_wrap=True)
    if wide:
        table.add_column("decision", overflow="fold")
    for row in rows:
        table.add_row(
            str(row.number),
            row.acquisition,
            *(f"{row.seconds[name]:.2f}" if name in row.seconds else "" for name in columns),
            _residual(row),
            *([_decision(row)] if wide else []),
        )
    below = [] if wide else [Text(f"{row.number}: ").append_text(_decision(row)) for row in rows if row.decision]
    return Group(Text("emflow demo: seconds of each step, and what is left as the policy measured it"), table, *below)


def _residual(row: Stage) -> str:
    if row.decision is None or row.decision.merit is None:
        return ""
    return f"{row.decision.merit:.2f} {printable(row.decision.merit_unit)}"


def _decision(row: Stage) -> Text:
    if row.decision is None:
        return Text("")
    return Text(printable(row.decision.reason), style="" if row.decision.trusted else "yellow")
