"""``result.h5``: NeXus that is also EMD 1.0, opened with its calibrations by HyperSpy, silx, py4DSTEM and h5py.

The maps lie at ``/entry/<reduction>/<output>``, where EMD wants its tree and NeXus its entry; ``/<reduction>`` is a
soft link to ``/entry/<reduction>``, so that ``/<reduction>/<output>/data`` is the short way.  Readers that walk the
file do not follow soft links and see each map once.
Source: NeXus NXdata (manual.nexusformat.org), EMD 1.0 (emdatasets.com/format), and the readers themselves.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mpi_kernels import __version__, electrons
from mpi_kernels.backing import Backing
from mpi_kernels.contract import Axis, JobSpec, Scalar
from mpi_kernels.engine import Reduced
from mpi_kernels.errors import printable
from mpi_kernels.hdf5_nodes import attributes, dataset, group, hard_link, soft_link
from mpi_kernels.plan import Plan, Step, output_axes, parameters
from mpi_kernels.protocols import Output

PROGRAM = f"mpi_kernels {__version__}"


Axes = dict[tuple[Axis, int], Any]
"""Datasets of axes that are in the file already, by axis and length."""


def maps(plan: Plan, reduced: Reduced) -> Iterator[tuple[str, np.ndarray]]:
    """All maps as ``(<reduction>/<output>, array)``, in the recipe's order."""
    for step in plan.steps:
        for output in step.outputs:
            yield f"{step.spec.name}/{output}", reduced.arrays[step.spec.name][output]


def write(
    path: str | os.PathLike[str],
    job: JobSpec,
    plan: Plan,
    reduced: Reduced,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> str:
    """Write the result file as a whole or not at all: temporary, fsync, rename.

    That its name survives a power cut is left to the JSON that is published after it in the same folder.

    Parameters
    ----------
    path : path
    job, plan, reduced
        What it tells.
    meanwhile : callable
        Called while the bytes go to the disk.

    Returns
    -------
    sha256 : str
        Of the file's bytes.
    """
    from concurrent.futures import ThreadPoolExecutor  # brings logging along: only for who publishes

    import h5py

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        backing = Backing(temporary)
        try:
            with h5py.File(backing, "w") as file:
                _write(file, job, plan, reduced)
            with ThreadPoolExecutor(1) as beside:
                digest = beside.submit(backing.finish)
                meanwhile()
            found = digest.result()
        finally:
            backing.close()
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return found


def _write(file: Any, job: JobSpec, plan: Plan, reduced: Reduced) -> None:
    root, first = file.id, plan.steps[0].spec.name
    facts: dict[str, str | int] = {"NX_class": "NXroot", "default": "entry", "emd_group_type": "file"}
    facts |= {"version_major": 1, "version_minor": 0, "UUID": str(uuid.uuid4())}
    facts |= {"authoring_program": PROGRAM, "authoring_user": "emflow", "creator": PROGRAM}
    attributes(root, **facts)
    entry = group(root, "entry", NX_class="NXentry", default=first, emd_group_type="root", python_class="Root")
    dataset(entry, "title", plan.recipe.name)
    known: Axes = {}
    for step in plan.steps:
        _write_step(entry, step, plan, reduced, known)
        soft_link(root, step.spec.name, f"/entry/{step.spec.name}")
    if not reduced.covered.all():
        _write_coverage(group(entry, "covered"), plan, reduced, known)
    for name, events in reduced.events.items():
        electrons.write(file["entry"][name], events, plan.header)
        if electrons.GROUP not in file:  # stempy opens this file as one of its own
            soft_link(root, electrons.GROUP, f"/entry/{name}/{electrons.GROUP}")
            attributes(root, version=electrons.STEMPY_VERSION)
    _write_process(group(entry, "process", NX_class="NXprocess"), job, plan, reduced)


def _write_step(entry: Any, step: Step, plan: Plan, reduced: Reduced, known: Axes) -> None:
    name, default = step.spec.name, next(iter(step.outputs), "")
    maps = group(entry, name, NX_class="NXcollection", default=default, emd_group_type="node", python_class="Node")
    for output, declared in step.outputs.items():
        axes, path = output_axes(declared, plan.header), f"/entry/{name}/{output}"
        _write_map(group(maps, output), path, name, declared, axes, reduced.arrays[name][output], known)
    scalars = group(maps, "scalars", NX_class="NXcollection")
    for key, value in reduced.scalars[name].items():
        dataset(scalars, printable(key).replace("/", "_"), _stored(value))


def _write_coverage(at: Any, plan: Plan, reduced: Reduced, known: Axes) -> None:
    """Which positions of a partial result are measured: 1, else 0; the maps are 0 or NaN there."""
    declared = Output(over="scan", dtype="uint8", long_name="1 where a frame was there")
    covered, axes = reduced.covered.astype(np.uint8), output_axes(declared, plan.header)
    _write_map(at, "/entry/covered", "covered", declared, axes, covered, known)


def _write_map(
    at: Any, path: str, title: str, output: Output, axes: tuple[Axis, ...], array: np.ndarray, known: Axes
) -> None:
    if array.ndim == 0:  # no reader knows a map without axes
        array, axes = array.reshape(1), (Axis(name="index", unit=""),)
    names = _names(axes)
    kind = _interpretation(output, array)
    long_name = f"{title}: {output.long_name or path.rpartition('/')[2]}"
    long_name += f" ({output.unit})" if output.unit else ""
    attributes(at, NX_class="NXdata", signal="data", emd_group_type="array", python_class="Array")
    attributes(at, axes=names, interpretation=kind, title=long_name)
    dataset(at, "data", array, units=output.unit, long_name=long_name, interpretation=kind)
    for i, (name, axis, n) in enumerate(zip(names, axes, array.shape, strict=True)):
        positions = axis.offset + axis.scale * np.arange(max(n, 2), dtype=np.float64)
        _write_axis(at, name, axis, positions[:n], known)
        if n > 1:
            soft_link(at, f"dim{i}", f"{path}/{name}")
        else:  # a step can be read from two positions only; EMD takes two for a linear axis of any length
            _write_axis(at, f"dim{i}", axis, positions, known)


def _write_axis(at: Any, name: str, axis: Axis, positions: np.ndarray, known: Axes) -> None:
    """An axis of a map; maps with the same axis have the same dataset, by another hard link."""
    same = known.get((axis, len(positions)))
    if same is not None:
        hard_link(at, name, same)
        return
    label = f"{axis.name} ({axis.unit})" if axis.unit else axis.name
    said = {"units": axis.unit, "long_name": label, "name": axis.name}
    known[axis, len(positions)] = dataset(at, name, positions, **said)


def _names(axes: tuple[Axis, ...]) -> list[str]:
    """Names of the axes' datasets: the axes' own where they are plain and different, else numbered."""
    names: list[str] = []
    for i, axis in enumerate(axes):
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", axis.name, re.ASCII) is not None
        taken = axis.name in {"data", *names} or re.fullmatch(r"(dim|axis_)\d+", axis.name) is not None
        names.append(axis.name if plain and not taken else f"axis_{i}")
    return names


def _interpretation(output: Output, array: np.ndarray) -> str:
    """What the last dimensions are, for programs that split scan from signal (HyperSpy reads it from the group)."""
    entry = len(output.shape) or array.ndim
    return "image" if entry >= 2 and array.ndim >= 2 else "spectrum"


def _write_process(at: Any, job: JobSpec, plan: Plan, reduced: Reduced) -> None:
    values = {
        "program": "mpi_kernels",
        "version": __version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sequence_index": 1,
        "requested_by": job.program,
        "job": job.job,
        "acquisition": job.acquisition,
        "trace": job.trace,
        "source_format": plan.header.format,
        "source_digest": job.source.digest or "",
    }
    for name, value in values.items():
        dataset(at, name, printable(value) if isinstance(value, str) else value)
    dataset(at, "scan_shape", np.array(plan.header.scan_shape, np.int64))
    dataset(at, "det_shape", np.array(plan.header.det_shape, np.int64))
    facts = {
        "recipe": asdict(plan.recipe),
        "parameters": {s.spec.name: {"use": s.spec.use, **parameters(s)} for s in plan.steps},
        "orientation": asdict(plan.recipe.orientation),
        "warnings": plan.warnings,
        "skipped": plan.skipped,
        "metadata": plan.header.metadata,
        "method": reduced.method,
    }
    for name, value in facts.items():
        dataset(at, name, json.dumps(value))  # ASCII: undecodable text survives as escapes
    source = group(at, "source", NX_class="NXcollection")
    attributes(source, **{printable(k) or "_": v for k, v in job.attributes.items()})


def _stored(value: Scalar) -> Any:
    """A scalar as HDF5 has it: None as NaN, integers beyond 64 bits as text."""
    if value is None:
        return float("nan")
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return str(value)
    return value


def finite_scalars(scalars: Mapping[str, Mapping[str, Scalar]]) -> dict[str, dict[str, Scalar]]:
    """Scalars as JSON has them: None for what is not finite, Python's own numbers for numpy's."""
    return {name: {k: _plain(v) for k, v in values.items()} for name, values in scalars.items()}


def _plain(value: Scalar) -> Scalar:
    value = getattr(value, "item", lambda: value)()  # a plug-in's numpy number
    return None if isinstance(value, float) and not np.isfinite(value) else value
