"""``emflow replay``: make every decision of an experiment again and compare."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from emflow.cli.options import configuration, json_option, print_json
from emflow.errors import printable


@click.command()
@click.argument("experiment")
@json_option
@click.pass_context
def replay(ctx: click.Context, experiment: str, as_json: bool) -> int:
    """Make every decision of EXPERIMENT again from its log and results, without a microscope, and compare.

    EXPERIMENT is an id, the beginning of one, or a folder.  The exit code is 0 if all decisions are the same to the
    byte, 1 if any is not.
    """
    from emflow.agent.folders import find
    from emflow.agent.replay import Compared
    from emflow.agent.replay import replay as again

    config = configuration(ctx)
    folder = find(config.service.experiments, experiment)
    rows: list[Compared] = []
    for row in again(folder, config.service.runs):
        rows.append(row)
        if not as_json:
            _tell(row)
    different = [row for row in rows if not row.same]
    if as_json:
        print_json({"experiment": folder.name, "same": not different, "decisions": rows})
    else:
        what = (
            f"{len(different)} of {len(rows)} decisions differ" if different else f"{len(rows)} decisions, all the same"
        )
        click.echo(f"{folder.name}: {what}")
    return 1 if different else 0


def _tell(row: Any) -> None:
    basis = ", ".join(row.based_on) or "nothing yet"
    word = "same     " if row.same else "DIFFERENT"
    click.echo(f"{row.number:4d}  {word}  by {row.by} on {basis}: {printable(row.then.reason)}")
    if row.off:
        click.echo(f"        does not follow from the log: {row.off}")
    if row.now is not None:
        then, now = msgspec.to_builtins(row.then), msgspec.to_builtins(row.now)
        for name in then:
            if then[name] != now[name]:
                click.echo(printable(f"        {name}: then {then[name]!r}, now {now[name]!r}"))
