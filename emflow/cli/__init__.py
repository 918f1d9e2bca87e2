"""The command line: one file per group of commands, imported only when it is used."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click

from emflow import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("emflow.cli.work:run", "Watch the shares and carry every acquisition to its result."),
    "reduce": ("emflow.cli.work:reduce", "Reduce files now, without a service."),
    "status": ("emflow.cli.look:status", "Show where every acquisition is."),
    "trace": ("emflow.cli.look:trace", "Show everything that happened to one acquisition, with times."),
    "retry": ("emflow.cli.mend:retry", "Try again what was set aside, or run a finished one once more."),
    "rebuild": ("emflow.cli.mend:rebuild", "Make the journal anew from the run folders."),
    "pool": ("emflow.cli.pool:pool", "Keep MPI ranks warm, so that jobs start at once."),
    "microscope": ("emflow.cli.microscope:microscope", "Serve a microscope, look at it, abort, stop."),
    "agent": ("emflow.cli.agent:agent", "Let results steer the microscope by a policy."),
    "replay": ("emflow.cli.replay:replay", "Make every decision of an experiment again and compare."),
    "check": ("emflow.cli.setup:check", "Say what is found, what is missing and how to fix it."),
    "init": ("emflow.cli.setup:init", "Write a commented emflow.toml."),
    "demo": ("emflow.cli.demo:demo", "Show the whole way on made-up scans, in a temporary folder."),
    "completion": ("emflow.cli.setup:completion", "Print the shell completion script."),
}
"""Command -> where it is and its one line, so that ``emflow --help`` imports none of them."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order of a first day's use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command; a name that is not one is for click to explain."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Add the nearest name to click's complaint about an unknown one."""
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, 1) if args else []
        if near and args[0] not in COMMANDS:
            ctx.fail(f"no such command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="emflow")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path, readable=False),  # the loader says what is wrong with it
    envvar="EMFLOW_CONFIG",
    default=Path("emflow.toml"),
    show_default=True,
    help="The configuration; also from EMFLOW_CONFIG.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say more in the log.")
@click.pass_context
def cli(ctx: click.Context, config: Path, verbose: bool) -> None:
    """Join an electron microscope to a supercomputer: notice, move, reduce, steer."""
    ctx.obj = {"config": config, "verbose": verbose}


def main() -> None:
    """Run the command line; the exit code says what kind of trouble there was.

    0 fine, 1 failed, 2 usage, 69 unavailable, 75 busy, 77 permission, 78 configuration, 130 Ctrl-C.
    """
    sys.exit(_main())


def _main() -> int:
    from emflow.errors import EmflowError, printable
    from mpi_kernels.errors import KernelError

    try:
        code = cli.main(standalone_mode=False, prog_name="emflow")
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return 130
    except EmflowError as error:
        print(f"emflow: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KernelError as error:
        print(f"emflow: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"emflow: {printable(str(error))}. Check who owns it and who runs emflow", file=sys.stderr)
        return 77
    except BrokenPipeError:  # `emflow status | head`: what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"emflow: {printable(str(error))}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0
