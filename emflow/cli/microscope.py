"""``emflow microscope``: serve one, look at it, abort, stop."""

from __future__ import annotations

import getpass
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from emflow.cli.options import ENDINGS, json_option, print_json
from emflow.errors import UsageError, printable
from emflow.microscope.client import MicroscopeClient
from emflow.microscope.protocol import Role, Status

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS_FILE = Path("microscope.toml")
PATIENCE_S = 2.0
"""How long a person waits for a server that does not answer."""


def address_option(command: F) -> F:
    """``--address``: of the server; else the one of emflow.toml."""
    return click.option("--address", help="Of the server, such as 127.0.0.1:7763; else from emflow.toml.")(command)


@click.group()
def microscope() -> None:
    """Serve a microscope, look at it, abort, stop."""


@microscope.command()
@click.option("--backend", help="A name of emflow.microscopes, such as simulated, or module:attr.")
@click.option("--settings", "path", type=click.Path(path_type=Path), help="Default: microscope.toml, if it is there.")
@click.option("--address", help="Where to listen; port 0 takes a free one.")
@click.option("--folder", type=click.Path(), help="Where scans are written.")
@click.option("--state", type=click.Path(), help="The server's memory.")
@click.pass_context
def serve(
    ctx: click.Context,
    backend: str | None,
    path: Path | None,
    address: str | None,
    folder: str | None,
    state: str | None,
) -> int:
    """Serve a microscope until Ctrl-C; options win over the settings file, and without one there are defaults."""
    from emflow.log import set_up
    from emflow.microscope.server import serving

    settings = _settings(path, backend, address=address, folder=folder, state=state)
    set_up(level="DEBUG" if ctx.obj and ctx.obj["verbose"] else "INFO")
    ended, signals = threading.Event(), []

    def end(number: int, _frame: object) -> None:
        signals.append(number)
        ended.set()

    before = {number: signal.signal(number, end) for number in ENDINGS}
    try:
        with serving(settings) as real:
            click.echo(f"emflow microscope {printable(settings.backend.use)} listens on {real}; Ctrl-C ends it")
            while not ended.wait(1.0):  # a wait without end hides signals on Windows
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if signals[:1] == [signal.SIGINT] else 0


def _settings(path: Path | None, backend: str | None, **server: str | None) -> Any:
    """The settings of the file, else the default ones, with what the command line says."""
    import msgspec

    from emflow.microscope import settings as records

    found = path or (SETTINGS_FILE if SETTINGS_FILE.exists() else None)
    settings = records.load(found) if found else records.default(Path.cwd())
    given = {key: value for key, value in server.items() if value is not None}
    given |= {key: str(Path(given[key]).absolute()) for key in ("folder", "state") if key in given}
    changed = msgspec.structs.replace(settings.server, **given)
    if Path(changed.folder).is_relative_to(changed.state) or Path(changed.state).is_relative_to(changed.folder):
        raise UsageError("--folder and --state lie inside each other", next_step="Keep them apart")
    settings = msgspec.structs.replace(settings, server=changed)
    if backend is not None and backend != settings.backend.use:  # the file's parameters are another backend's
        settings = msgspec.structs.replace(settings, backend=records.BackendSettings(use=backend))
    return settings


@microscope.command()
@address_option
@json_option
@click.pass_context
def status(ctx: click.Context, address: str | None, as_json: bool) -> None:
    """Show how the microscope is."""
    with _client(ctx, address, "viewer") as client:
        _show(client.status(), as_json)


@microscope.command()
@address_option
@json_option
@click.option("-m", "--reason", default="", help="Told to everybody who asks.")
@click.pass_context
def abort(ctx: click.Context, address: str | None, as_json: bool, reason: str) -> None:
    """End the command that runs; the next one follows."""
    with _client(ctx, address, "operator") as client:
        _show(client.abort(reason), as_json)


@microscope.command()
@address_option
@json_option
@click.option("-m", "--reason", default="", help="Told to everybody who asks.")
@click.pass_context
def stop(ctx: click.Context, address: str | None, as_json: bool, reason: str) -> None:
    """End everything and blank the beam; it stays so until emflow microscope release."""
    with _client(ctx, address, "operator") as client:
        _show(client.stop(reason), as_json)


@microscope.command()
@address_option
@json_option
@click.option("-m", "--reason", default="", help="Told to everybody who asks.")
@click.pass_context
def release(ctx: click.Context, address: str | None, as_json: bool, reason: str) -> None:
    """End STOP."""
    with _client(ctx, address, "operator") as client:
        _show(client.release(reason), as_json)


@microscope.command()
@address_option
@json_option
@click.pass_context
def limits(ctx: click.Context, address: str | None, as_json: bool) -> None:
    """Show the limits that nobody can pass."""
    with _client(ctx, address, "viewer") as client:
        found = client.limits()
    if as_json:
        print_json(found)
        return
    controls = found.pop("controls")
    for name, value in found.items():
        shown = (
            f"{value['min']:g} to {value['max']:g}" if isinstance(value, dict) else "none" if value is None else value
        )
        click.echo(f"{name:<18} {shown}")
    for name, one in controls.items():
        click.echo(
            f"{printable(name):<18} {one['min']:g} to {one['max']:g}, at most {one['max_step']:g} at once, "
            f"{one['per_minute']} moves a minute" + (f"  ({printable(one['note'])})" if one["note"] else "")
        )


@microscope.command()
@address_option
@json_option
@click.option("--after", default=0, show_default=True, type=click.IntRange(0), help="Number of the first one to show.")
@click.option("--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.pass_context
def events(ctx: click.Context, address: str | None, as_json: bool, after: int, follow: bool) -> None:
    """Show what happened, one line each; with --json one object a line."""
    from mpi_kernels import jsonfile

    with _client(ctx, address, "viewer") as client:
        while True:
            found, following = client.events(after, wait_s=10.0 if follow else 0.0)
            for event in found:
                attrs = "  ".join(f"{key} {printable(str(value))}" for key, value in event.attrs.items() if value != "")
                line = f"{event.wall_ns / 1e9:.3f}  {event.name:<9} {printable(event.subject)}  {attrs}".rstrip()
                click.echo(jsonfile.encode(event).decode() if as_json else line)
            if following == after and not follow:
                return
            after = following


@microscope.command()
@click.argument("path", type=click.Path(path_type=Path), default=SETTINGS_FILE)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(path: Path, force: bool) -> None:
    """Write a commented microscope.toml with every setting, its default, and limits to be looked over."""
    from emflow.microscope.settings_template import template

    if path.exists() and not force:
        raise UsageError(f"{printable(str(path))} is there already", next_step="Use --force to replace it")
    path.write_text(template(), encoding="utf-8")
    click.echo(f"wrote {printable(str(path))}: look its limits over")
    click.echo(f"next: emflow microscope serve --settings {printable(str(path))}")


def _client(ctx: click.Context, address: str | None, role: Role) -> MicroscopeClient:
    """A client of the server that the command line, else emflow.toml, else the default names."""
    from emflow.config import MicroscopeSettings, load

    if address is None:
        path = ctx.obj["config"] if ctx.obj else Path("emflow.toml")
        address = load(path).microscope.address if path.exists() else MicroscopeSettings().address
    return MicroscopeClient(address, role=role, name=f"{_user()} (command line)", patience_s=PATIENCE_S)


def _user() -> str:
    try:
        return printable(getpass.getuser())[:32] or "somebody"
    except (KeyError, OSError):  # no name for this user id
        return "somebody"


def _show(found: Status, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    why = f" ({printable(found.reason)})" if found.reason else ""
    click.echo(f"{printable(found.backend)}: {found.mode.value}{why}")
    click.echo(f"beam      {'blanked' if found.blanked else 'on'}, {found.dose_e:.4g} electrons so far")
    if found.holder:
        left = f"epoch {found.epoch}, {found.lease_left_s:.1f} s left"
        click.echo(f"lease     {printable(found.role)} {printable(found.holder)}, {left}")
    if found.command or found.queued:
        click.echo(f"command   {printable(found.command) or 'none'}, {found.queued} waiting")
    for name, value in found.controls.items():
        click.echo(f"{printable(name):<12} {value:g}")
