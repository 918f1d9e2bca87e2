"""Commands for the first day: init, check, completion."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from emflow.cli.options import configuration, json_option, print_json

PIPED_WIDTH = 10_000
"""Columns where there is no terminal: more than any line needs."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("emflow.toml"))
@click.option("--root", type=click.Path(path_type=Path), help="Folder to watch; made if it is not there.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(path: Path, root: Path | None, force: bool) -> None:
    """Write a commented emflow.toml with every setting and its default."""
    from emflow.config_template import template
    from emflow.errors import UsageError, printable

    if path.exists() and not force:
        raise UsageError(f"{printable(str(path))} is there already", next_step="Use --force to replace it")
    text = template()
    if root is not None:
        if not str(root).isprintable():
            raise UsageError(
                f"{printable(str(root))!r} cannot be written into a TOML file", next_step="Rename the folder"
            )
        quoted = str(root.absolute()).replace("\\", "\\\\").replace('"', '\\"')
        text = text.replace('root = "incoming"', f'root = "{quoted}"', 1)
    folder = root or path.parent / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    click.echo(f"wrote {printable(str(path))}, which watches {printable(str(folder))}")
    click.echo("next: emflow check, then emflow run")


@click.command()
@click.option("--submit", is_flag=True, help="Show what would be sent for a job, and try it without running anything.")
@json_option
@click.pass_context
def check(ctx: click.Context, submit: bool, as_json: bool) -> int:
    """Say what is found, what is missing and how to fix it; exit code 69 if something needed is missing."""
    if submit:
        return _check_submission(ctx, as_json=as_json)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from emflow.checks import findings

    found = list(findings(configuration(ctx)))
    missing = [f for f in found if not f.ok]
    if as_json:
        print_json({"ok": not missing, "findings": found})
        return 69 if missing else 0
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")  # nothing is cut
    for one in found:
        mark = Text("found", style="green") if one.ok else Text("MISSING", style="bold red")
        table.add_row(mark, one.part, Text(one.found))
        if one.fix:
            table.add_row("", "", Text(f"fix: {one.fix}", style="yellow"))
    # what is piped is for grep: one line each
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)
    click.echo(f"{len(missing)} missing" if missing else "all there")
    return 69 if missing else 0


def _check_submission(ctx: click.Context, *, as_json: bool) -> int:
    from emflow.cli.submission import show
    from emflow.submission import submission

    found = submission(configuration(ctx))
    if as_json:
        print_json(found)
    else:
        show(found, verbose=ctx.obj["verbose"])
    return 0 if found.ok else 69


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion script: eval "$(emflow completion bash)"."""
    from click.shell_completion import get_completion_class

    from emflow.cli import cli

    found = get_completion_class(shell)
    if found is not None:
        click.echo(found(cli, {}, "emflow", "_EMFLOW_COMPLETE").source())
