"""Commands that do the work: run, reduce."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from emflow.cli.options import configuration, interruptible, json_option, print_json
from emflow.errors import printable
from emflow.records import AcquisitionState
from mpi_kernels.contract import ResultManifest

FINISHED = (AcquisitionState.DONE, AcquisitionState.SUPERSEDED)
"""Where nothing is left to do."""


@click.command()
@click.option("--once", is_flag=True, help="Do all that is there now, then end.")
@json_option
@click.pass_context
def run(ctx: click.Context, once: bool, as_json: bool) -> int:
    """Watch the shares and carry every acquisition to its result.

    With --once the exit code is 0 only if everything is DONE or SUPERSEDED, 1 if anything else is left (GROWING,
    STALLED, QUARANTINED, ...; emflow status says why), and 69 if alarms are open (room, a share, the scheduler).
    """
    from emflow.pipeline import open_pipeline, stopped_by_signals

    config = configuration(ctx)
    with open_pipeline(config) as pipeline, stopped_by_signals(pipeline) as signals:
        if once:
            pipeline.run_once()
        else:
            click.echo(
                f"emflow watches {', '.join(printable(str(w.root)) for w in config.watch)}; Ctrl-C stops", err=True
            )
            pipeline.run_forever()
        counts, _ = pipeline.context.journal.counts()
        alarms = dict(pipeline.context.alarms)
    if as_json:
        print_json({"acquisitions": {s.value: counts[s] for s in AcquisitionState}, "alarms": alarms})
    elif once:
        click.echo("  ".join(f"{s.value} {counts[s]}" for s in AcquisitionState if counts[s]) or "nothing found")
    if signals:
        return 128 + signals[0]
    if not once:
        return 0
    return 69 if alarms else int(any(n for state, n in counts.items() if state not in FINISHED))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(), help="A file; a folder with several inputs or a final slash.")
@click.option("-r", "--recipe", default="default", show_default=True, help="A recipe's name or TOML file.")
@click.option("-n", "--ranks", default=1, show_default=True, type=click.IntRange(1, 4096), help="MPI ranks.")
@click.option("--scan-shape", help="Rows and columns of the scan, such as 256,256, where the file does not say.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "gpu"]), help="Where to compute.")
@click.option("--threads", default=0, type=click.IntRange(0, 1024), help="Of each rank; all cores if left out.")
@json_option
def reduce(
    files: tuple[Path, ...],
    output: str | None,
    recipe: str,
    ranks: int,
    scan_shape: str | None,
    device: Literal["cpu", "gpu"],
    threads: int,
    as_json: bool,
) -> int:
    """Reduce files now with the same kernels, without a service or a configuration."""
    from rich.console import Console

    from emflow.direct import reduce_file
    from emflow.errors import EmflowError
    from emflow.recipes import load_recipe
    from mpi_kernels.contract import Method
    from mpi_kernels.errors import KernelError

    targets = _targets(files, output)
    chosen = load_recipe(recipe, relative_to=Path.cwd())
    facts: dict[str, Any] = {
        "ranks": ranks,
        "scan_shape": None if scan_shape is None else _shape(scan_shape),
        "method": Method(device=device, threads=threads),
    }
    console = Console(stderr=True, quiet=as_json or not sys.stderr.isatty())
    done, failed = [], []
    for path, target in zip(files, targets, strict=True):
        try:
            with interruptible(), console.status(f"reducing {printable(path.name)}"):
                manifest = reduce_file(path, chosen, target, **facts)
        except (EmflowError, KernelError) as error:
            failed.append({"file": str(path), "error": str(error), "code": getattr(error, "code", "")})
            click.echo(f"emflow: {printable(str(error))}", err=True)
            continue
        done.append({"file": str(path), "result": str(target), "manifest": manifest})
        if not as_json:
            frames = "1 frame" if manifest.frames == 1 else f"{manifest.frames} frames"
            click.echo(
                f"{printable(str(path))} -> {printable(str(target))}  {frames}, "
                f"{manifest.seconds['total']:.2f} s, {manifest.quality}"
                + "".join(f"\n  {reason}" for reason in (*manifest.quality_reasons, *_instead(manifest, device)))
            )
    if as_json:
        print_json({"done": done, "failed": failed})
    return 1 if failed else 0


def _instead(manifest: ResultManifest, device: str) -> tuple[str, ...]:
    """What was asked for and could not be had."""
    return (f"on the CPU: {manifest.method.get('why', '')}",) if manifest.method.get("device") != device else ()


def _targets(files: tuple[Path, ...], output: str | None) -> list[Path]:
    """Where each result goes, before anything is computed; no two in one place."""
    from emflow.direct import output_path
    from emflow.errors import UsageError

    folder = output is not None and (len(files) > 1 or output.endswith("/"))
    place = None if output is None else Path(output)
    if place is not None and folder and place.exists() and not place.is_dir():
        raise UsageError(
            f"-o {printable(str(place))} is a file, but a folder is needed for {len(files)} results",
            next_step="Name a folder; it is made",
        )
    targets = [output_path(path, place, folder=folder) for path in files]
    twice = next((t for n, t in enumerate(targets) if t in targets[:n]), None)
    if twice is not None:
        raise UsageError(
            f"two results would be called {printable(str(twice))}", next_step="Reduce them one by one, each with its -o"
        )
    return targets


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (1, 2) or any(n < 1 for n in shape):
        raise click.BadParameter(f"{text!r} is not like 256,256", param_hint="--scan-shape")
    return shape
