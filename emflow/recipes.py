"""Recipes: named lists of reductions in TOML, built in or beside the configuration."""

from __future__ import annotations

import math
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from emflow import registry, tomlfile
from emflow.errors import ConfigError, printable
from mpi_kernels import plugins
from mpi_kernels.contract import Orientation, Recipe, ReductionSpec
from mpi_kernels.errors import RecipeError

NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Names of recipes and reductions: they become groups of the result file."""

_FOLDER = "recipes_builtin"

_FILES = {"count_electrons": "dark", "pacbed": "file", "virtual_image": "file"}
"""The parameter of a reduction that is a path."""


class _Orientation(msgspec.Struct, frozen=True, kw_only=True):
    transpose: bool = False
    flip_y: bool = False
    flip_x: bool = False


class _Reduction(msgspec.Struct, frozen=True, kw_only=True):
    use: str
    name: str
    parameters: dict[str, Any] = {}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The tables that a recipe's file may have."""

    name: str
    reduction: tuple[_Reduction, ...]
    scan_shape: tuple[int, ...] | None = None
    orientation: _Orientation = _Orientation()


def recipe_names() -> tuple[str, ...]:
    """Names of the built-in recipes, sorted."""
    entries = resources.files("emflow").joinpath(_FOLDER).iterdir()
    return tuple(sorted(e.name.removesuffix(".toml") for e in entries if e.name.endswith(".toml")))


def load_recipe(name_or_path: str, *, relative_to: Path) -> Recipe:
    """A built-in recipe by its name, or the one of a TOML file (anything with a slash or ``.toml``).

    Parameters
    ----------
    name_or_path : str
        Such as ``default`` or ``recipes/strain.toml``.
    relative_to : Path
        The folder that a relative path belongs to.

    Raises
    ------
    ConfigError
        With the file and line, what is wrong, and what was probably meant.
    """
    path = recipe_file(name_or_path, relative_to=relative_to)
    if path is not None:
        return _recipe(tomlfile.read(path), path.absolute().parent)
    file = f"{name_or_path}.toml"
    data = resources.files("emflow").joinpath(_FOLDER, file).read_bytes()
    return _recipe(tomlfile.Document(file, data), Path.cwd())


def recipe_file(name_or_path: str, *, relative_to: Path) -> Path | None:
    """The file of a recipe that `load_recipe` would read, or None for a built-in one; no plug-in is loaded.

    Raises
    ------
    ConfigError
        There is no recipe of this name, or no file.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = relative_to / Path(name_or_path).expanduser()
        if not path.exists():
            raise ConfigError(f"{printable(str(path))}: no such file")
        return path
    names = recipe_names()
    if name_or_path not in names:
        raise ConfigError(
            f"no recipe is called '{printable(name_or_path)}'{tomlfile.meant(name_or_path, names)}",
            next_step="For one of your own give its path, such as ./mine.toml",
        )
    return None


def _recipe(document: tomlfile.Document, folder: Path) -> Recipe:
    file = document.convert(_File)
    if not NAME.fullmatch(file.name):
        raise document.error(("name",), f"'{printable(file.name)}' can't name a recipe", next_step=_naming())
    if not file.reduction:
        raise document.error(("reduction",), "a recipe needs a [[reduction]]")
    shape = file.scan_shape
    if shape is not None and (not 1 <= len(shape) <= 2 or min(shape) < 1):
        raise document.error(("scan_shape",), f"scan_shape is [scan_y, scan_x] or [frames], got {list(shape)}")
    names: dict[str, int] = {}
    for number, reduction in enumerate(file.reduction):
        where = ("reduction", number, "name")
        if not NAME.fullmatch(reduction.name):
            raise document.error(where, f"'{printable(reduction.name)}' can't name a reduction", next_step=_naming())
        if reduction.name in names:
            first = document.line(("reduction", names[reduction.name], "name"))
            raise document.error(where, f"name {reduction.name!r} is already the one of line {first}")
        names[reduction.name] = number
    return Recipe(
        name=file.name,
        reductions=tuple(_spec(document, n, r, folder) for n, r in enumerate(file.reduction)),
        scan_shape=shape,
        orientation=Orientation(**msgspec.structs.asdict(file.orientation)),
    )


def _naming() -> str:
    return "Use small letters, digits and _, a letter first"


def _spec(document: tomlfile.Document, number: int, reduction: _Reduction, folder: Path) -> ReductionSpec:
    """One reduction with ``use`` in full, so that compute nodes look up no registry."""
    where: tomlfile.Key = ("reduction", number)
    try:
        use = registry.target("reductions", reduction.use)
    except ConfigError as error:
        raise document.error((*where, "use"), error.message, next_step=error.next_step) from None
    _check_plain(document, (*where, "parameters"), reduction.parameters)
    parameters = reduction.parameters
    name = next((p for n, p in _FILES.items() if registry.target("reductions", n) == use), "")
    file = parameters.get(name)
    if isinstance(file, str) and file:
        # beside the recipe, wherever the job runs
        parameters = {**parameters, name: os.path.normpath(folder / Path(file).expanduser())}
    spec = ReductionSpec(use=use, name=reduction.name, parameters=parameters)
    try:
        plugins.load(use)
    except RecipeError:
        return spec  # it may live on the compute nodes only; the job says so if it does not
    try:
        plugins.make_reduction(spec)
    except RecipeError as error:
        wrong = next((p for p in reduction.parameters if f"{p!r}" in error.message or f".{p}" in error.message), None)
        at = (*where, "parameters", wrong) if wrong else where
        told = "known are " in error.message  # then it lists the parameters, and the next step would list them again
        raise document.error(at, error.message, next_step="" if told else error.next_step) from None
    return spec


def _check_plain(document: tomlfile.Document, where: tomlfile.Key, value: Any) -> None:
    """Refuse what TOML can write and JSON can't: dates, nan, inf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(document, (*where, key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_plain(document, (*where, index), inner)
    elif not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
        raise document.error(where, f"{value} can't be a parameter", next_step="Use numbers, text, true/false, lists")
