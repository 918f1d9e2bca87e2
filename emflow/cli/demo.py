"""The command ``emflow demo``."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from emflow.cli.options import interruptible, json_option, print_json
from emflow.timeline import Row


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
@click.option("--keep", type=click.Path(path_type=Path), help="Work in this new folder and leave it there.")
def demo(as_json: bool, figure: Path, keep: Path | None) -> None:
    """Show the whole way on made-up scans: noticed, staged, submitted, running, reduced.

    The service runs as its own process on a temporary folder; another process writes scans of several formats into
    it as slowly as a detector would.
    """
    from emflow.demo.figure import require_matplotlib
    from emflow.demo.show import show
    from emflow.errors import UsageError, printable

    if keep is not None and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise UsageError(f"{printable(str(keep))} is not empty, or no folder", next_step="Name a new folder")
    require_matplotlib()
    figure.absolute().parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=as_json)
    with interruptible(), _folder(keep) as folder, Live(console=console, refresh_per_second=8) as live:
        shown = show(folder, figure.absolute(), lambda rows: live.update(_shown(rows, console.width)))
    if as_json:
        print_json(shown)
        return
    console.print(f"\n{len(shown.acquisitions)} acquisitions reduced in {shown.seconds:.1f} s. Figure: {shown.figure}")
    if keep is not None:
        console.print(f"Everything is in {keep}: try emflow -c {keep}/emflow.toml status")


def _shown(rows: list[Row], width: int) -> Group:
    from emflow.cli.look import status_rows

    return Group(Text("emflow demo: seconds after each file was noticed"), status_rows(rows, width))


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="emflow-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
