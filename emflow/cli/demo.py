"""The command ``emflow demo``."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.live import Live

from emflow.cli.options import interruptible, json_option

if TYPE_CHECKING:
    from emflow.demo.mission import Told


@click.command()
@json_option
@click.option(
    "-o",
    "--figure",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("emflow-demo.png"),
    show_default=True,
    help="Where the figure goes.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=1,
    show_default=True,
    help="Chooses specimen, hidden aberrations and noise.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="Work in this new folder and leave it there.")
@click.pass_context
def demo(ctx: click.Context, as_json: bool, figure: Path, seed: int, keep: Path | None) -> None:
    """Show the closed loop: a simulated microscope with hidden aberrations, corrected scan by scan.

    Microscope, service and agent are processes of their own on this machine's loopback, in a temporary folder. What was
    wrong with the lens is asked from the simulator at the end only. The exit code is 0 only if the target was reached.
    """
    from emflow.demo.figure import require_matplotlib
    from emflow.demo.mission import show
    from emflow.demo.table import layout
    from emflow.errors import UsageError, printable

    if keep is not None and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise UsageError(f"{printable(str(keep))} is not empty, or no folder", next_step="Name a new folder")
    require_matplotlib()
    figure.absolute().parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=as_json)
    with interruptible(), _folder(keep) as folder, Live(console=console, refresh_per_second=8) as live:
        told = show(folder, figure.absolute(), seed, lambda rows: live.update(layout(rows, console.width)))
    console.print()
    for line in _summary(told):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if keep is not None:
        console.print(f"Everything is in {keep}: try emflow -c {keep}/emflow.toml status", soft_wrap=True)
    if as_json:
        click.echo(msgspec.json.encode(told.shown).decode())
    ctx.exit(0 if told.reached else 1)


def _summary(told: Told) -> Iterator[str]:
    from emflow.errors import printable

    shown, ended = told.shown, told.ended
    yield f"The experiment ended: {ended.ending.value}" + (f" ({printable(ended.reason)})" if ended.reason else "")
    yield "True aberrations, which only the simulator knows: " + ", ".join(
        f"|{name}| {shown.start_nm[name]:.1f} -> {left:.2f} nm" for name, left in shown.residuals_nm.items()
    )
    yield f"{shown.acquisitions} acquisitions in {shown.seconds:.1f} s. Figure: {shown.figure}"


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    # named before it is made: a Ctrl-C right after mkdtemp had made one would leave it
    folder = Path(tempfile.gettempdir()) / f"emflow-demo-{secrets.token_hex(8)}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
