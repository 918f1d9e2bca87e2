"""``microscope.toml``: where the server listens, what it drives, and the limits that nobody passes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from emflow import registry, rpc_wire, tomlfile
from emflow.errors import ConfigError
from emflow.microscope.protocol import Name
from emflow.microscope.settings_template import template

Whole = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[server]``; see the template for what each key means."""

    address: str = "127.0.0.1:7763"
    folder: str = "share"
    state: str = "microscope-state"
    lease_s: Annotated[float, msgspec.Meta(ge=0.1, le=30)] = 10.0
    on_lease_lost: Literal["finish", "abort"] = "finish"


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[backend]``: which one, and what it is given; the backend checks its parameters itself."""

    use: str = "simulated"
    parameters: dict[str, Any] = {}


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Smallest and largest value that is allowed."""

    min: float
    max: float


class ControlLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[limits.controls.NAME]``: range, largest change at once, moves per minute, and what counts as equal."""

    min: float
    max: float
    max_step: Annotated[float, msgspec.Meta(gt=0)]
    per_minute: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    tolerance: Annotated[float, msgspec.Meta(ge=0)]
    note: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """``[limits]``: the envelope; None means that there is no such limit, a control that is not named can't be set."""

    max_dose_e: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_total_dose_e: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_frames: Whole | None = None
    max_queue: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 16
    step_nm: Range | None = None
    dwell_us: Range | None = None
    exposure_us: Range | None = None
    centre_nm: Range | None = None
    controls: dict[Name, ControlLimits] = {}


class _WrittenLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`Limits` as they stand in the file: the tables of controls are read one by one, so that errors name them."""

    max_dose_e: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_total_dose_e: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_frames: Whole | None = None
    max_queue: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 16
    step_nm: dict[str, Any] | None = None
    dwell_us: dict[str, Any] | None = None
    exposure_us: dict[str, Any] | None = None
    centre_nm: dict[str, Any] | None = None
    controls: dict[Name, dict[str, Any]] = {}


class _File(msgspec.Struct, frozen=True, kw_only=True):
    server: ServerSettings = ServerSettings()
    backend: BackendSettings = BackendSettings()
    limits: _WrittenLimits = _WrittenLimits()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All of ``microscope.toml``, checked; ``folder`` and ``state`` are absolute."""

    server: ServerSettings
    backend: BackendSettings
    limits: Limits


def load(path: str | os.PathLike[str]) -> Settings:
    """Read and check a settings file.

    Raises
    ------
    ConfigError
        With the file and line, what is wrong, and what was probably meant.
    """
    document = tomlfile.read(Path(path), next_step="Write one with: emflow microscope init")
    return _settings(document, Path(path).absolute().parent)


def default(folder: str | os.PathLike[str] = ".") -> Settings:
    """The settings of the template, for a server without a file; relative paths belong to ``folder``."""
    return _settings(tomlfile.Document("(the default settings)", template().encode()), Path(folder).absolute())


def _settings(document: tomlfile.Document, folder: Path) -> Settings:
    written = document.convert(_File)
    server = msgspec.structs.replace(
        written.server,
        folder=_folder(document, folder, "folder", written.server.folder),
        state=_folder(document, folder, "state", written.server.state),
    )
    _check(document, server, written.backend)
    limits = _limits(document, written.limits)
    return Settings(server=server, backend=written.backend, limits=limits)


def _folder(document: tomlfile.Document, base: Path, key: str, value: str) -> str:
    if not value.strip() or "\0" in value:
        raise document.error(("server", key), f"{key}: expected the path of a folder")
    return os.path.normpath(base / Path(value).expanduser())


def _check(document: tomlfile.Document, server: ServerSettings, backend: BackendSettings) -> None:
    try:
        rpc_wire.loopback(server.address)
    except ConfigError as error:
        raise document.error(("server", "address"), error.message, next_step=error.next_step) from None
    share, state = Path(server.folder), Path(server.state)
    if share.is_relative_to(state) or state.is_relative_to(share):
        raise document.error(
            ("server", "state"),
            "state and folder lie inside each other",
            next_step="Keep them apart: everything in the folder of scans is taken for a scan",
        )
    try:
        registry.target("microscopes", backend.use)
    except ConfigError as error:
        raise document.error(("backend", "use"), error.message, next_step=error.next_step) from None


def _limits(document: tomlfile.Document, written: _WrittenLimits) -> Limits:
    for key in ("max_dose_e", "max_total_dose_e"):
        value = getattr(written, key)
        if value is not None and not math.isfinite(value):
            raise document.error(("limits", key), f"{key}: {value} is no limit; leave the line out for none")
    ranges = {
        key: None if value is None else _table(document, Range, ("limits", key), value)
        for key in ("step_nm", "dwell_us", "exposure_us", "centre_nm")
        for value in [getattr(written, key)]
    }
    controls = {
        name: _table(document, ControlLimits, ("limits", "controls", name), value)
        for name, value in written.controls.items()
    }
    return Limits(
        max_dose_e=written.max_dose_e,
        max_total_dose_e=written.max_total_dose_e,
        max_frames=written.max_frames,
        max_queue=written.max_queue,
        controls=controls,
        **ranges,
    )


def _table(document: tomlfile.Document, cls: Any, where: tomlfile.Key, value: dict[str, Any]) -> Any:
    """One table with ``min`` and ``max`` in it."""
    fields = {f.name: f for f in msgspec.structs.fields(cls)}
    for key, inner in value.items():
        if key not in fields:
            raise document.unknown((*where, key), fields)
        if isinstance(inner, float) and not math.isfinite(inner):
            raise document.error((*where, key), f"{key}: {inner} is no limit")
    for key, field in fields.items():
        if key not in value and field.required:
            raise document.error(where, f"{key!r} is missing in [{'.'.join(map(str, where))}]")
    try:
        made = msgspec.convert(value, cls, strict=True)
    except msgspec.ValidationError as error:
        what, _, key = str(error).partition(" - at `$.")
        text = what[:1].lower() + what[1:].replace("`", "")
        raise document.error((*where, key.rstrip("`")), f"{key.rstrip('`') or where[-1]}: {text}") from None
    if made.min > made.max:
        raise document.error((*where, "min"), f"min {made.min:g} is above max {made.max:g}")
    return made


__all__ = [
    "BackendSettings",
    "ControlLimits",
    "Limits",
    "Range",
    "ServerSettings",
    "Settings",
    "default",
    "load",
    "template",
]
