"""What several commands share: the configuration, the journal, output as JSON."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import msgspec

from emflow.config import Config, load
from emflow.journal import Journal
from emflow.log import set_up

ENDINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What a terminal, an operator and a closed connection send to end a command; Windows has no SIGHUP."""

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """``--json``: one object on standard output, for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def configuration(ctx: click.Context) -> Config:
    """Load the configuration that the group's option names, and start the log it asks for."""
    config = load(ctx.obj["config"])
    set_up(level="DEBUG" if ctx.obj["verbose"] else config.log.level, as_json=config.log.json)
    return config


def journal_of(config: Config, *, read_only: bool) -> Journal:
    """Open the journal beside a service that may be running."""
    path = config.service.state / "journal.sqlite"
    return Journal(path, read_only=read_only or not path.exists())  # only a service makes one


def print_json(value: object) -> None:
    """Print one JSON object; records become tables, bytes and paths become text."""
    plain = _valid(msgspec.to_builtins(value, str_keys=True, enc_hook=str))
    click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=1).decode())


def _valid(value: Any) -> Any:
    """Write what is not Unicode as an escape, in all text: a file's name may be any bytes, JSON may not."""
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # a surrogate that stands for no byte
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_valid(key): _valid(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(inner) for inner in value]
    return value


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does: KeyboardInterrupt, and everything is cleaned up on its way.

    The first signal counts; what comes while it is being obeyed is ignored, so that a closed terminal (SIGHUP, then
    SIGTERM) can't cut the cleaning short.  A signal that was ignored before (nohup) stays ignored.
    """

    def interrupt(_number: int, _frame: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in ENDINGS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
