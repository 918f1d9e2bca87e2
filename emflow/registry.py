"""Plug-ins by name: the entry points of installed packages, loaded on first use."""

from __future__ import annotations

import difflib
import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from emflow.errors import ConfigError

Group = Literal["formats", "reductions", "schedulers", "microscopes", "policies"]

ONE_OF: dict[Group, str] = {
    "formats": "format",
    "reductions": "reduction",
    "schedulers": "scheduler",
    "microscopes": "microscope",
    "policies": "policy",
}


@functools.cache
def _found(group: Group) -> dict[str, EntryPoint]:
    return {e.name: e for e in sorted(entry_points(group=f"emflow.{group}"), key=lambda e: e.name)}


def names(group: Group) -> tuple[str, ...]:
    """Names of all plug-ins of a group, sorted."""
    return tuple(_found(group))


def target(group: Group, name: str) -> str:
    """The ``module:attr`` behind a name; a name that already has that form is returned as it is."""
    if ":" in name:
        return name
    found = _found(group)
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no {ONE_OF[group]} is called {name!r}", next_step=f"{hint}known: {', '.join(found)}")
    return found[name].value


def load(group: Group, name: str) -> Any:
    """Import the object behind a name."""
    where = target(group, name)
    entry = EntryPoint(name=name, value=where, group=f"emflow.{group}")
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{ONE_OF[group]} {name!r} ({where}) can't be loaded: {error}") from error
