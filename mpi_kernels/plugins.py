"""Plug-ins by ``module:attr``, and reductions made from the parameters of a recipe."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

from mpi_kernels import jsonfile
from mpi_kernels.contract import ReductionSpec
from mpi_kernels.errors import FormatError, RecipeError
from mpi_kernels.protocols import Format, Reduction

TARGET = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<attribute>[A-Za-z_]\w*)", re.ASCII)


def load(target: str) -> Any:
    """Import the object behind ``module:attr``.

    Raises
    ------
    RecipeError
        The text has another form, or there is no such module or attribute on this node.
    """
    match = TARGET.fullmatch(target)
    if not match:
        raise RecipeError(
            f"{target!r} is not module:attr", next_step="nodes look up no registry: the job names plug-ins in full"
        )
    try:
        return getattr(importlib.import_module(match["module"]), match["attribute"])
    except (ImportError, AttributeError) as error:
        step = "install the plug-in in the environment of the compute node: jobs inherit no PYTHONPATH"
        raise RecipeError(f"plug-in {target!r} can't be loaded: {error}", next_step=step) from error


def parameter_names(cls: Any) -> tuple[str, ...]:
    """Parameters of a reduction: its fields, where it is a dataclass."""
    return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


def make_reduction(spec: ReductionSpec) -> Reduction:
    """Build a reduction from the parameters of a recipe, strictly.

    Raises
    ------
    RecipeError
        The plug-in is not a reduction, or a parameter is unknown, missing or of another type: names the valid ones.
    """
    cls = load(spec.use)
    if not (isinstance(cls, type) and issubclass(cls, Reduction)):
        raise RecipeError(f"{spec.use!r} is not a Reduction", next_step="Derive it from protocols.Reduction")
    valid = ", ".join(parameter_names(cls)) or "none"
    try:
        if hasattr(cls, "__dataclass_fields__"):
            return jsonfile.from_plain(cls, spec.parameters)
    except FormatError as error:
        raise RecipeError(f"{spec.name}: {error.message}", next_step=f"parameters of {spec.use}: {valid}") from error
    if spec.parameters:
        raise RecipeError(f"{spec.name}: {spec.use!r} takes no parameters, got {', '.join(spec.parameters)}")
    return cls()


def make_format(target: str) -> Format:
    """Build the format behind ``module:attr``."""
    cls = load(target)
    if not isinstance(cls, Format):  # true of a class as well: it has the same attributes
        raise RecipeError(f"{target!r} is not a Format", next_step="it needs suffixes, probe(path) and open(path)")
    return cls() if isinstance(cls, type) else cls
