"""The configuration: one TOML file, read once, passed and never global."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from emflow import registry, tomlfile
from emflow.config_template import template
from emflow.errors import ConfigError
from emflow.recipes import recipe_file

DAY_S = 86400.0
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

# The upper bound also refuses inf, which TOML can write; nan fails every comparison.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=30 * DAY_S)]


class Bytes(int):
    """A number of bytes; in the file a whole number or text such as ``"1 GiB"``."""


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[service]``: the service's own folders; relative ones belong to the folder of the file."""

    state: Path = Path("state")
    runs: Path = Path("runs")
    results: Path = Path("results")


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """``[[watch]]``: one share whose new files become acquisitions.

    ``match`` empty means the suffixes of all formats; ``ignore`` wins over ``match``.  ``share`` is the folder's name
    unless it is given, and is part of every acquisition's id.
    """

    root: Path
    share: str = ""
    match: tuple[str, ...] = ()
    ignore: tuple[str, ...] = (".*", "*.tmp", "*.part")
    recipe: str = "default"


class ScanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[scan]``: how often folders are read, and how long a file must rest before it is believed."""

    active_s: Seconds = 0.5
    recent_s: Seconds = 3.0
    whole_s: Seconds = 15.0
    settle_s: Seconds = 1.0
    stable_s: Seconds = 5.0
    stall_s: Seconds = 60.0
    quarantine_s: Seconds = 3600.0
    hints: Literal["auto", "inotify", "none"] = "auto"


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[transfer]``: the verified copy."""

    stage: Literal["copy", "none"] = "copy"
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    min_free: Bytes = Bytes(1 << 30)


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[scheduler]``: who runs the jobs, and how much one may use."""

    use: str = "local"
    ranks: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 2
    max_active: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    time_limit_s: Annotated[int, msgspec.Meta(ge=1, le=int(30 * DAY_S))] = 3600
    attempts: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    poll_s: Seconds = 0.2


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``[log]``: what is told on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = False


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The tables that ``emflow.toml`` may have."""

    watch: tuple[Watch, ...]
    service: ServiceSettings = ServiceSettings()
    scan: ScanSettings = ScanSettings()
    transfer: TransferSettings = TransferSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    log: LogSettings = LogSettings()


class Config(_File, frozen=True, kw_only=True):
    """All of ``emflow.toml``, checked, with absolute paths; ``folder`` is where the file lies."""

    folder: Path


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration.

    Raises
    ------
    ConfigError
        With the file and line, what is wrong, and what was probably meant.
    """
    document = tomlfile.read(Path(path), next_step="Write one with: emflow init")
    written = document.convert(_File, _convert)
    folder = Path(os.path.normpath(Path(path).absolute().parent))
    config = Config(
        folder=folder,
        service=_service(written.service, folder),
        watch=tuple(_watch(document, n, w, folder) for n, w in enumerate(written.watch)),
        scan=written.scan,
        transfer=written.transfer,
        scheduler=written.scheduler,
        log=written.log,
    )
    _check(document, config)
    return config


def default_match() -> tuple[str, ...]:
    """Patterns for an empty ``match``: the suffixes of all registered formats, such as ``*.h5``."""
    suffixes = {suffix for name in registry.names("formats") for suffix in registry.load("formats", name).suffixes}
    return tuple(f"*{suffix}" for suffix in sorted(suffixes))


def _convert(kind: type, value: Any) -> Any:
    """Give msgspec the two types that TOML does not have."""
    if kind is Path:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise ValueError("expected the path of a folder")
        return Path(value).expanduser()
    if kind is Bytes:
        return parse_size(value)
    raise NotImplementedError(kind)


def parse_size(value: Any) -> Bytes:
    """Bytes from a whole number or text with a unit: ``512 MB`` is 512e6, ``1.5 GiB`` is 1.5 * 2**30.

    >>> parse_size("1.5 KiB")
    1536
    """
    if type(value) is int and value >= 0:
        return Bytes(value)
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = _UNITS.get((found[2] or "B").upper()) if found else None
    if found is None or unit is None:
        raise ValueError(f"expected a size such as '1 GiB' or '500 MB', got {value!r:.40}")
    return Bytes(round(float(found[1]) * unit))


def _service(service: ServiceSettings, folder: Path) -> ServiceSettings:
    return ServiceSettings(
        state=_absolute(folder, service.state),
        runs=_absolute(folder, service.runs),
        results=_absolute(folder, service.results),
    )


def _watch(document: tomlfile.Document, number: int, watch: Watch, folder: Path) -> Watch:
    root = _absolute(folder, watch.root)
    share = watch.share or root.name
    where = ("watch", number, "share" if watch.share else "root")
    # part of ids, logs and results: nothing that a terminal or a reader could mistake
    if not (0 < len(share) <= 64 and share.isprintable() and "/" not in share and share.strip() == share):
        raise document.error(where, f"{share!r} can't name a share", next_step='Give one: share = "scope1"')
    for key, globs in (("match", watch.match), ("ignore", watch.ignore)):
        for position, glob in enumerate(globs):
            if not glob or glob.startswith("/"):
                raise document.error(
                    ("watch", number, key, position), f"{glob!r}: expected a pattern such as '*.h5' or 'scans/*.mib'"
                )
    try:
        recipe_file(watch.recipe, relative_to=folder)
    except ConfigError as error:
        raise document.error(("watch", number, "recipe"), error.message, next_step=error.next_step) from None
    return msgspec.structs.replace(watch, root=root, share=share)


def _absolute(folder: Path, path: Path) -> Path:
    return Path(os.path.normpath(folder / path))


def _check(document: tomlfile.Document, config: Config) -> None:
    """What two values have to do with each other."""
    if not config.watch:
        raise document.error(("watch",), "nothing is watched", next_step='Add [[watch]] with root = "FOLDER"')
    shares: dict[str, int] = {}
    for number, watch in enumerate(config.watch):
        if watch.share in shares:
            first = document.line(("watch", shares[watch.share]))
            raise document.error(
                ("watch", number, "share"),
                f"share {watch.share!r} is already the one of line {first}",
                next_step="Give each [[watch]] its own share name",
            )
        shares[watch.share] = number
    _check_roots(document, config.watch)
    _check_folders(document, config)
    scan = config.scan
    for shorter, longer in (("active_s", "recent_s"), ("recent_s", "whole_s"), ("stall_s", "quarantine_s")):
        if getattr(scan, shorter) > getattr(scan, longer):
            raise document.error(("scan", shorter), f"{shorter} in [scan] must not be longer than {longer}")
    try:
        registry.target("schedulers", config.scheduler.use)
    except ConfigError as error:
        raise document.error(("scheduler", "use"), error.message, next_step=error.next_step) from None


def _check_roots(document: tomlfile.Document, watches: tuple[Watch, ...]) -> None:
    """Keep the watched folders apart: a file in two of them would become two acquisitions."""
    roots = [Path(os.path.realpath(watch.root)) for watch in watches]
    for number, root in enumerate(roots):
        for before, other in enumerate(roots[:number]):
            if root.is_relative_to(other) or other.is_relative_to(root):
                how = "is" if root == other else "lies inside" if root.is_relative_to(other) else "lies around"
                raise document.error(
                    ("watch", number, "root"),
                    f"watched folder {str(root)!r} {how} the one of line {document.line(('watch', before, 'root'))}",
                    next_step="Keep them apart: each file belongs to one share",
                )


def _check_folders(document: tomlfile.Document, config: Config) -> None:
    """Keep the service's own folders outside every share: it would find its own files, and a share is only read."""
    own = {name: Path(os.path.realpath(getattr(config.service, name))) for name in ("state", "runs", "results")}
    for name, path in own.items():
        for number, watch in enumerate(config.watch):
            root = Path(os.path.realpath(watch.root))
            if path.is_relative_to(root) or root.is_relative_to(path):
                inside = "inside the watched" if path.is_relative_to(root) else "around the watched"
                written = document.line(("service", name)) != document.line(("service",))
                raise document.error(
                    ("service", name) if written else ("watch", number, "root"),
                    f"{name} folder {str(path)!r} lies {inside} folder {str(root)!r}",
                    next_step="Keep them apart: a share is only ever read",
                )
    if len(set(own.values())) < len(own):
        raise document.error(("service",), "state, runs and results in [service] must be three different folders")


__all__ = [
    "Bytes",
    "Config",
    "LogSettings",
    "ScanSettings",
    "SchedulerSettings",
    "ServiceSettings",
    "TransferSettings",
    "Watch",
    "default_match",
    "load",
    "parse_size",
    "template",
]
