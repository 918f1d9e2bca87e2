"""``result.h5``: NeXus that is also EMD 1.0, opened with its calibrations by HyperSpy, silx, py4DSTEM and h5py.

The maps lie at ``/entry/<reduction>/<output>``, where EMD wants its tree and NeXus its entry; ``/<reduction>`` is a
soft link to ``/entry/<reduction>``, so that ``/<reduction>/<output>/data`` is the short way.  Readers that walk the
file do not follow soft links and see each map once.
Source: NeXus NXdata (manual.nexusformat.org), EMD 1.0 (emdatasets.com/format), and the readers themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mpi_kernels import __version__, electrons, jsonfile
from mpi_kernels.backing import Backing
from mpi_kernels.contract import Axis, JobSpec, Scalar
from mpi_kernels.engine import Reduced
from mpi_kernels.errors import printable
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


def write(path: str | os.PathLike[str], job: JobSpec, plan: Plan, reduced: Reduced) -> str:
    """Write the result file as a whole or not at all: temporary, fsync, rename.

    Returns
    -------
    sha256 : str
        Of the file's bytes.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        backing = Backing(temporary)
        try:
            _write(backing, job, plan, reduced)
            backing.check()
        finally:
            backing.close()
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    jsonfile.sync_folder(target.parent)
    return digest


def _write(backing: Backing, job: JobSpec, plan: Plan, reduced: Reduced) -> None:
    import h5py

    with h5py.File(backing, "w") as file:
        _attributes(
            file,
            NX_class="NXroot",
            default="entry",
            emd_group_type="file",
            version_major=1,
            version_minor=0,
            UUID=str(uuid.uuid4()),
            authoring_program=PROGRAM,
            authoring_user="emflow",
            creator=PROGRAM,
        )
        entry = file.create_group("entry")
        first = plan.steps[0].spec.name
        _attributes(entry, NX_class="NXentry", default=first, emd_group_type="root", python_class="Root")
        entry["title"] = plan.recipe.name
        known: Axes = {}
        for step in plan.steps:
            _write_step(entry, step, plan, reduced, known)
            file[step.spec.name] = h5py.SoftLink(f"/entry/{step.spec.name}")
        if not reduced.covered.all():
            _write_coverage(entry.create_group("covered"), plan, reduced, known)
        for name, events in reduced.events.items():
            electrons.write(entry[name], events, plan.header)
            if electrons.GROUP not in file:  # stempy opens this file as one of its own
                file[electrons.GROUP] = h5py.SoftLink(f"/entry/{name}/{electrons.GROUP}")
                _attributes(file, version=electrons.STEMPY_VERSION)
        _write_process(entry.create_group("process"), job, plan, reduced)


def _write_step(entry: Any, step: Step, plan: Plan, reduced: Reduced, known: Axes) -> None:
    name = step.spec.name
    group = entry.create_group(name)
    default = next(iter(step.outputs), "")
    _attributes(group, NX_class="NXcollection", default=default, emd_group_type="node", python_class="Node")
    for output, declared in step.outputs.items():
        axes = output_axes(declared, plan.header)
        _write_map(group.create_group(output), name, declared, axes, reduced.arrays[name][output], known)
    scalars = group.create_group("scalars")
    _attributes(scalars, NX_class="NXcollection")
    for key, value in reduced.scalars[name].items():
        scalars[printable(key).replace("/", "_")] = _stored(value)


def _write_coverage(group: Any, plan: Plan, reduced: Reduced, known: Axes) -> None:
    """Which positions of a partial result are measured: 1, else 0; the maps are 0 or NaN there."""
    declared = Output(over="scan", dtype="uint8", long_name="1 where a frame was there")
    _write_map(group, "covered", declared, output_axes(declared, plan.header), reduced.covered.astype(np.uint8), known)


def _write_map(group: Any, title: str, output: Output, axes: tuple[Axis, ...], array: np.ndarray, known: Axes) -> None:
    import h5py

    if array.ndim == 0:  # no reader knows a map without axes
        array, axes = array.reshape(1), (Axis(name="index", unit=""),)
    names = _names(axes)
    kind = _interpretation(output, array)
    long_name = f"{title}: {output.long_name or group.name.rpartition('/')[2]}"
    long_name += f" ({output.unit})" if output.unit else ""
    _attributes(group, NX_class="NXdata", signal="data", emd_group_type="array", python_class="Array")
    group.attrs["axes"] = np.array(names, h5py.string_dtype())
    _attributes(group, interpretation=kind, title=long_name)
    data = group.create_dataset("data", data=array)
    _attributes(data, units=output.unit, long_name=long_name, interpretation=kind)
    for i, (name, axis, n) in enumerate(zip(names, axes, array.shape, strict=True)):
        positions = axis.offset + axis.scale * np.arange(max(n, 2), dtype=np.float64)
        _write_axis(group, name, axis, positions[:n], known)
        if n > 1:
            group[f"dim{i}"] = h5py.SoftLink(f"{group.name}/{name}")
        else:  # a step can be read from two positions only; EMD takes two for a linear axis of any length
            _write_axis(group, f"dim{i}", axis, positions, known)


def _write_axis(group: Any, name: str, axis: Axis, positions: np.ndarray, known: Axes) -> None:
    """An axis of a map; maps with the same axis have the same dataset, by another hard link."""
    same = known.get((axis, len(positions)))
    if same is not None:
        group[name] = same
        return
    known[axis, len(positions)] = dataset = group.create_dataset(name, data=positions)
    label = f"{axis.name} ({axis.unit})" if axis.unit else axis.name
    _attributes(dataset, units=axis.unit, long_name=label, name=axis.name)


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


def _write_process(group: Any, job: JobSpec, plan: Plan, reduced: Reduced) -> None:
    _attributes(group, NX_class="NXprocess")
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
        group[name] = printable(value) if isinstance(value, str) else value
    group["scan_shape"] = np.array(plan.header.scan_shape, np.int64)
    group["det_shape"] = np.array(plan.header.det_shape, np.int64)
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
        group[name] = json.dumps(value)  # ASCII: undecodable text survives as escapes
    source = group.create_group("source")
    _attributes(source, NX_class="NXcollection")
    _attributes(source, **{printable(k) or "_": v for k, v in job.attributes.items()})


def _attributes(target: Any, /, **values: str | int) -> None:
    for name, value in values.items():
        target.attrs[name] = printable(value) if isinstance(value, str) else value


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
