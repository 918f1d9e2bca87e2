"""``emflow check --submit``: what would be sent, for reading."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click

from emflow.errors import printable
from emflow.submission import Submission


def show(found: Submission, *, verbose: bool) -> None:
    """Print a submission; the job script's own text only where it is asked for."""
    for line in _lines(found, verbose=verbose):
        click.echo(line)


def _lines(found: Submission, *, verbose: bool) -> Iterator[str]:
    yield from _column("scheduler", [found.scheduler])
    if found.profile:
        yield from _column("profile", [printable(found.profile)])
    widths = [max(len(getattr(setting, name)) for setting in found.settings) for name in ("key", "value")]
    yield from _column(
        "settings",
        [
            f"{setting.key:{widths[0]}}  {printable(setting.value):{widths[1]}}  {setting.origin}"
            for setting in found.settings
        ],
    )
    parts = [printable(shlex.quote(part)) for part in found.command]
    last = len(parts) - 1
    yield from _column("command", [f"{part} \\" if n < last else part for n, part in enumerate(parts)])
    yield from _column(
        "environment", [f"{name}={printable(shlex.quote(value))}" for name, value in found.environment.items()]
    )
    if found.script:
        yield from _column("script", [f"{printable(found.script)} ({found.text.count(chr(10))} lines)"])
    if verbose:
        yield from _column("", [printable(line) for line in found.text.splitlines()])
    yield from _column("answer", [printable(line) for line in found.said.splitlines()])
    yield from _column("note", list(found.remarks))
    yield "nothing was sent; it would be taken" if found.ok else "nothing was sent; it would be REFUSED"


def _column(name: str, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{name if not number else '':12} {line}".rstrip()
