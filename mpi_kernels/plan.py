"""A recipe made ready for one acquisition: the header as the reductions see it, and what each of them needs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpi_kernels import terms
from mpi_kernels.contract import Axis, Header, Kind, Orientation, Recipe, ReductionSpec
from mpi_kernels.errors import MissingData, RecipeError
from mpi_kernels.plugins import make_reduction, parameter_names
from mpi_kernels.protocols import Output, Reduction, Term

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
RESERVED = frozenset({"covered", "electron_events", "entry", "metadata", "process", "title"})
"""Groups of the result file that a reduction can't be called."""
TAKEN = frozenset({"electron_events", "events", "scalars"})
"""What lies beside the outputs of a reduction."""


@dataclass(frozen=True, slots=True)
class Step:
    """One reduction of the plan."""

    spec: ReductionSpec
    reduction: Reduction
    outputs: Mapping[str, Output]
    terms: Mapping[str, Term]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one read of the data computes.

    Attributes
    ----------
    header : Header
        With the recipe's scan shape and oriented detector axes.
    steps : tuple of Step
        Reductions that apply.
    skipped : tuple of str
        Names of those that do not apply to this kind of data.
    warnings : tuple of str
        The format's, and what the plan had to drop.
    """

    recipe: Recipe
    header: Header
    steps: tuple[Step, ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]


def make(recipe: Recipe, header: Header) -> Plan:
    """Fit a recipe to a header.

    Raises
    ------
    RecipeError
        Scan shape, names, parameters or masks do not fit, or no reduction applies to this kind of data.
    MissingData
        The acquisition has no frames.
    """
    _check_names(recipe)
    header, warnings = scanned(header, recipe.scan_shape)
    header = oriented_header(header, recipe.orientation)
    if header.frames < 1 or math.prod(header.det_shape) < 1:
        raise MissingData(f"no frames: scan {header.scan_shape}, frame {header.det_shape}", frame=0)
    if np.dtype(header.dtype).kind not in "biuf":
        raise RecipeError(f"pixels of type {header.dtype} can't be reduced", next_step="integers and floats can")
    if header.dtype == "bool":
        header = replace(header, dtype="uint8")
    made = [(spec, make_reduction(spec)) for spec in recipe.reductions]
    fits = [(spec, reduction) for spec, reduction in made if header.kind in reduction.kinds]
    if not fits:
        raise RecipeError(
            f"no reduction of recipe {recipe.name!r} applies to data of kind {header.kind!r}",
            next_step="; ".join(f"{s.name} is for {', '.join(sorted(r.kinds))}" for s, r in made),
        )
    skipped = tuple(s.name for s, r in made if header.kind not in r.kinds)
    return Plan(recipe, header, tuple(_step(s, r, header) for s, r in fits), skipped, (*header.warnings, *warnings))


def scanned(header: Header, shape: tuple[int, ...] | None) -> tuple[Header, tuple[str, ...]]:
    """Apply a recipe's scan shape; its order of belief is recipe, then header, and nothing is guessed beyond that.

    A stack whose number of frames is a square stays a stack and is only mentioned: a tilt series of 64 frames is not
    an 8 by 8 scan.
    """
    if shape is None:
        side = math.isqrt(header.frames)
        if header.kind == "stack" and side > 1 and side * side == header.frames:
            return header, (f"{header.frames} frames are taken as a stack; scan_shape = [{side}, {side}] makes a scan",)
        return header, ()
    if len(shape) not in (1, 2) or min(shape) < 1 or math.prod(shape) != header.frames:
        raise RecipeError(
            f"scan shape {list(shape)} does not hold the {header.frames} frames of this {header.kind}",
            next_step="correct scan_shape in the recipe, or leave it out",
        )
    if shape == header.scan_shape:
        return header, ()
    kind: Kind = "4d" if len(shape) == 2 else "stack"
    dropped = ("the recipe's scan shape replaces the file's: its scan calibration is dropped",)
    return replace(header, kind=kind, scan_shape=shape, scan_axes=()), dropped if header.scan_axes else ()


def oriented_header(header: Header, orientation: Orientation) -> Header:
    """Header of the frames after `oriented`.

    A transposition takes the calibrations along, but not the names: y comes first.  A flip corrects the direction in
    which a frame was stored, so the calibration of the axis is kept: index 0 of the turned frame is at ``offset``.
    """
    if not orientation.transpose:
        return header
    names = [a.name for a in header.det_axes]
    turned = tuple(replace(a, name=n) for a, n in zip(header.det_axes[::-1], names, strict=True))
    return replace(header, det_shape=header.det_shape[::-1], det_axes=turned)


def oriented(frames: np.ndarray, orientation: Orientation) -> np.ndarray:
    """View of (n, det_y, det_x) frames: transposed first, then flipped."""
    if orientation.transpose:
        frames = frames.swapaxes(1, 2)
    y, x = (slice(None, None, -1) if flip else slice(None) for flip in (orientation.flip_y, orientation.flip_x))
    return frames[:, y, x]


def unturned(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """View of an array over the turned frame (last two axes) as one over the frame in the file: undoes `oriented`."""
    y, x = (slice(None, None, -1) if flip else slice(None) for flip in (orientation.flip_y, orientation.flip_x))
    array = array[..., y, x]
    return array.swapaxes(-1, -2) if orientation.transpose else array


def output_shape(output: Output, header: Header) -> tuple[int, ...]:
    """Shape of the whole array of an output."""
    return (*header.scan_shape, *output.shape) if output.over == "scan" else output.shape


def output_axes(output: Output, header: Header) -> tuple[Axis, ...]:
    """Calibrations of an output, one per dimension; plain indices where nothing is known."""
    own = output.axes
    if not own:
        known = output.shape == header.det_shape
        own = det_axes(header) if known else tuple(Axis(name=f"index_{i}", unit="") for i in range(len(output.shape)))
    return (*scan_axes(header), *own) if output.over == "scan" else own


def scan_axes(header: Header) -> tuple[Axis, ...]:
    """The scan's calibrations, or indices."""
    names = {0: (), 1: ("frame",), 2: ("scan_y", "scan_x")}[len(header.scan_shape)]
    unit = "px" if header.kind == "4d" else ""
    return header.scan_axes or tuple(Axis(name=n, unit=unit) for n in names)


def det_axes(header: Header) -> tuple[Axis, ...]:
    """The detector's calibrations, or pixels."""
    return header.det_axes or (Axis(name="det_y"), Axis(name="det_x"))


def _step(spec: ReductionSpec, reduction: Reduction, header: Header) -> Step:
    outputs, wanted = dict(reduction.outputs(header)), dict(reduction.terms(header))
    for name, output in outputs.items():
        if not NAME.fullmatch(name) or name in TAKEN:
            raise RecipeError(f"{spec.name}: {name!r} is no name for an output")
        if output.axes and len(output.axes) != len(output.shape):
            raise RecipeError(f"{spec.name}/{name}: {len(output.axes)} axes for shape {output.shape}")
    terms.check(spec.name, wanted, header)
    return Step(spec, reduction, outputs, wanted)


def _check_names(recipe: Recipe) -> None:
    seen: set[str] = set()
    for name in (s.name for s in recipe.reductions):
        if not NAME.fullmatch(name) or name in RESERVED:
            raise RecipeError(f"{name!r} is no name for a reduction", next_step="use letters, digits and underscores")
        if name in seen:
            raise RecipeError(f"two reductions of the recipe are called {name!r}")
        seen.add(name)


def parameters(step: Step) -> dict[str, object]:
    """All parameters of a reduction, defaults included."""
    return {name: getattr(step.reduction, name) for name in parameter_names(type(step.reduction))}
