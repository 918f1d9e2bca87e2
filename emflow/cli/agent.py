"""``emflow agent``: run an experiment, or talk to the agent that runs one."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from emflow.agent.protocol import AgentMode, Ending
from emflow.agent.records import AgentStatus
from emflow.cli.agent_table import LiveTable, status_table
from emflow.cli.options import configuration, interruptible, json_option, print_json
from emflow.errors import UsageError, printable

if TYPE_CHECKING:
    from emflow.agent.server import Agent

F = TypeVar("F", bound=Callable[..., Any])

MODES = ("observe", "propose", "approve", "auto")
LOOK_S = 0.2
"""How often the live table is drawn."""

PATIENCE_S = 10.0


@click.group(invoke_without_command=True)
@click.option("--policy", help="A name of emflow.policies, such as correct_aberrations, or module:attr.")
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="KEY=VALUE", help="Of the policy; repeatable.")
@click.option("--mode", type=click.Choice(MODES), help="How far it may go; else [agent] mode of the configuration.")
@click.option("--experiment", help="Go on with this one; with --policy, the id of a new one.")
@json_option
@click.pass_context
def agent(
    ctx: click.Context,
    policy: str | None,
    parameters: tuple[str, ...],
    mode: AgentMode | None,
    experiment: str | None,
    as_json: bool,
) -> int | None:
    """Let results steer the microscope by a policy, and show how it goes.

    The exit code is 0 if the target was reached, 130 after Ctrl-C, else 1.  Ctrl-C stops: nothing is left running at
    the microscope.  Without --policy and --experiment it waits until somebody starts an experiment.
    """
    if ctx.invoked_subcommand is not None:
        if policy or parameters or mode or experiment or as_json:
            raise click.UsageError(f"options of 'agent' go behind {ctx.invoked_subcommand!r}")
        return None
    from emflow.agent.server import served

    config = configuration(ctx)
    given = dict(_parameter(text) for text in parameters)
    with served(config, waiting=not (policy or experiment)) as running:
        if policy or experiment:
            begun = running.begin(policy=policy, parameters=given, mode=mode, experiment=experiment)
            click.echo(f"experiment {begun}, its agent listens on {running.address}; Ctrl-C stops it", err=True)
            return _foreground(running, as_json)
        if given or mode:
            raise click.UsageError("-p and --mode need --policy")
        click.echo(f"the agent waits for a start on {running.address}; Ctrl-C ends it", err=True)
        return _waiting(running)


def _parameter(text: str) -> tuple[str, Any]:
    """``key=value``; the value is JSON where it is that, else text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise click.BadParameter(f"{text!r} is not like key=value", param_hint="-p")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _foreground(running: Agent, as_json: bool) -> int:
    interrupted = _until_end(running, None if as_json else LiveTable())
    status = running.status()
    if as_json:
        click.echo(msgspec.json.encode(_summary(status)).decode())
    else:
        click.echo(f"{status.ending or 'no end'}: {printable(status.reason)}")
    running.check()
    if interrupted:
        return 130
    return 0 if status.ending == Ending.TARGET.value else 1


def _until_end(running: Agent, show: LiveTable | None) -> bool:
    """Wait for the end of an experiment; whether somebody interrupted it."""
    try:
        with interruptible():
            while not running.join(LOOK_S):
                if show:
                    show.update(running.status())
    except KeyboardInterrupt:
        _stop(running)
        return True
    finally:
        if show:
            show.update(running.status())
            show.close()
    return False


def _stop(running: Agent) -> None:
    from emflow.agent.control import Wish

    try:
        running.control().stop(Wish(by=f"operator {printable(getpass.getuser())}", reason="Ctrl-C"))
    except UsageError:
        return  # it has just ended
    running.join()


def _waiting(running: Agent) -> int:
    try:
        with interruptible():
            while True:
                time.sleep(1.0)
    except KeyboardInterrupt:
        _stop(running)
        return 130


def _summary(status: AgentStatus) -> dict[str, Any]:
    names = ("experiment", "ending", "reason", "acquisitions", "seconds", "measured", "merit", "merit_unit", "dose_e")
    return {name: getattr(status, name) for name in names} | {"decisions": status.number + 1}


# --- talk to a running one


def experiment_option(command: F) -> F:
    """``--experiment``: which one; else the newest that runs."""
    return click.option("--experiment", help="Id or its beginning; else the newest one that runs.")(command)


def _ask(ctx: click.Context, experiment: str | None, method: str, *arguments: Any) -> AgentStatus:
    from emflow import rpc
    from emflow.agent.folders import running
    from emflow.agent.server import OBJECT

    config = configuration(ctx)
    found = running(config.service.experiments, experiment)
    role: rpc.Role = "viewer" if method == "status" else "operator"
    with rpc.Connection(found.address, OBJECT, role=role, name=getpass.getuser(), timeout_s=PATIENCE_S) as connection:
        return msgspec.convert(connection.call(method, *arguments), AgentStatus)


def _show(status: AgentStatus, as_json: bool) -> None:
    if as_json:
        print_json(status)
        return
    from rich.console import Console

    Console().print(status_table(status))
    if status.reason:
        click.echo(printable(status.reason))


@agent.command()
@experiment_option
@json_option
@click.pass_context
def status(ctx: click.Context, experiment: str | None, as_json: bool) -> None:
    """Show how the experiment is."""
    _show(_ask(ctx, experiment, "status"), as_json)


def _wish(name: str, text: str) -> None:
    @agent.command(name, help=text)
    @experiment_option
    @click.option("-m", "--reason", default="", help="Goes into the log.")
    @json_option
    @click.pass_context
    def wish(ctx: click.Context, experiment: str | None, reason: str, as_json: bool) -> None:
        _show(_ask(ctx, experiment, name, reason), as_json)


_wish("pause", "Decide and send nothing until resume.")
_wish("resume", "Go on after a pause or a hold.")
_wish("stop", "End the experiment; nothing of it is left running at the microscope.")


@agent.command()
@click.argument("number", type=int)
@experiment_option
@click.option("-m", "--reason", default="", help="Goes into the log.")
@json_option
@click.pass_context
def approve(ctx: click.Context, number: int, experiment: str | None, reason: str, as_json: bool) -> None:
    """Agree to decision NUMBER, which waits for it."""
    _show(_ask(ctx, experiment, "approve", number, reason), as_json)


@agent.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """List all experiments, the newest first."""
    rows = list(_experiments(ctx))
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo("  ".join(printable(str(value)) for value in row.values()))
    if not rows:
        click.echo("no experiments yet")


def _experiments(ctx: click.Context) -> Iterator[dict[str, Any]]:
    from emflow.agent.folders import existing, read_agent
    from emflow.agent.log import LOG_FILE, LogError, read_log
    from emflow.agent.progress import Progress

    for folder in existing(configuration(ctx).service.experiments):
        try:
            progress = Progress(line.record for line in read_log(folder / LOG_FILE))
        except LogError as error:
            yield {"experiment": folder.name, "policy": "", "state": "damaged", "reason": str(error)}
            continue
        ended, started = progress.ended, progress.started
        state = ended.ending.value if ended else "running" if read_agent(folder) else "interrupted"
        yield {
            "experiment": folder.name,
            "policy": started.policy if started else "",
            "state": state,
            "reason": ended.reason if ended else f"{progress.number} decisions, {progress.acquisitions} acquisitions",
        }
