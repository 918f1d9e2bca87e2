"""The configuration: one TOML file, read once, passed and never global."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from emflow import registry, tomlfile
from emflow.config_tables import (
    OWN_FOLDERS,
    AgentSettings,
    Bytes,
    CapSettings,
    Config,
    File,
    KernelSettings,
    LogSettings,
    MicroscopeSettings,
    PoolSettings,
    ScanSettings,
    SchedulerSettings,
    ServiceSettings,
    SlurmSettings,
    TransferSettings,
    Watch,
)
from emflow.config_template import template
from emflow.errors import ConfigError
from emflow.recipes import recipe_file

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration.

    Raises
    ------
    ConfigError
        With the file and line, what is wrong, and what was probably meant.
    """
    document = tomlfile.read(Path(path), next_step="Write one with: emflow init")
    written = document.convert(File, _convert)
    folder = Path(os.path.normpath(Path(path).absolute().parent))
    config = Config(
        folder=folder,
        service=_service(written.service, folder),
        watch=tuple(_watch(document, n, w, folder) for n, w in enumerate(written.watch)),
        scan=written.scan,
        transfer=written.transfer,
        scheduler=written.scheduler,
        slurm=written.slurm,
        pool=msgspec.structs.replace(written.pool, folder=_absolute(folder, written.pool.folder)),
        caps=written.caps,
        kernels=written.kernels,
        microscope=_microscope(document, written, folder),
        agent=written.agent,
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
        experiments=_absolute(folder, service.experiments),
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


def _microscope(document: tomlfile.Document, written: File, folder: Path) -> MicroscopeSettings:
    shares = [w.share or _absolute(folder, w.root).name for w in written.watch]
    for table, address in (("microscope", written.microscope.address), ("agent", written.agent.address)):
        found = _ADDRESS.fullmatch(address)
        if found is None or int(found["port"]) > 65535:
            raise document.error((table, "address"), f"expected host:port, got {address!r:.60}")
    share = written.microscope.share or (shares[0] if shares else "")
    if written.microscope.share and share not in shares:
        raise document.error(
            ("microscope", "share"), f"no share is called {share!r}", next_step=f"Known: {', '.join(shares)}"
        )
    return msgspec.structs.replace(written.microscope, share=share)


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
    _check_caps(document, config)
    scan = config.scan
    for shorter, longer in (("active_s", "recent_s"), ("recent_s", "whole_s"), ("stall_s", "quarantine_s")):
        if getattr(scan, shorter) > getattr(scan, longer):
            raise document.error(("scan", shorter), f"{shorter} in [scan] must not be longer than {longer}")
    try:
        registry.target("schedulers", config.scheduler.use)
    except ConfigError as error:
        raise document.error(("scheduler", "use"), error.message, next_step=error.next_step) from None


def _check_caps(document: tomlfile.Document, config: Config) -> None:
    if config.caps.degraded:
        try:
            recipe_file(config.caps.degraded, relative_to=config.folder)
        except ConfigError as error:
            raise document.error(("caps", "degraded"), error.message, next_step=error.next_step) from None


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
    own = {name: Path(os.path.realpath(getattr(config.service, name))) for name in OWN_FOLDERS}
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
        raise document.error(("service",), f"{', '.join(OWN_FOLDERS)} in [service] must be different folders")


__all__ = [
    "OWN_FOLDERS",
    "AgentSettings",
    "Bytes",
    "CapSettings",
    "Config",
    "KernelSettings",
    "LogSettings",
    "MicroscopeSettings",
    "PoolSettings",
    "ScanSettings",
    "SchedulerSettings",
    "ServiceSettings",
    "SlurmSettings",
    "TransferSettings",
    "Watch",
    "default_match",
    "load",
    "parse_size",
    "template",
]
