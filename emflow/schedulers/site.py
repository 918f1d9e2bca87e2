"""What a site's Slurm is asked for: its profile, what ``emflow.toml`` lays over it, and what one job needs.

A profile is a TOML file with the keys of ``[slurm]`` (but ``site`` and ``warn_s``), and a table ``[gpu]`` of the same
keys that holds where jobs compute on cards.  What ``emflow.toml`` says wins; only ``flags`` add up.

A job must see exactly `Request.environment`.  For that sbatch itself is started with this environment (and with
``SLURM_CONF``, where that is set) and ``--export=ALL``.  ``--export=NIL`` and ``--export=NAME,NAME`` look stricter and
are not: Slurm then reads the login files of the user on the node too (``SLURM_GET_USER_ENV``; 2 s instead of 0.9 s from
sbatch to the end, and their PATH and variables in the job), and srun passes only those names on to the ranks.
Measured with Slurm 22.05.8.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from emflow import tomlfile
from emflow.config import Config, parse_size
from emflow.config_tables import Bytes, SiteKeys, SlurmSettings
from emflow.errors import ConfigError, printable
from emflow.records import Resources
from emflow.schedulers.local import shipped

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
INHERITED = ("PATH", "HOME", "LANG", "USER", "LOGNAME")
"""Of our own environment; srun must be on PATH, and a site's module files look for HOME and USER."""

OWNED = (
    *("array", "batch", "chdir", "cluster-constraint", "clusters", "comment", "error", "export", "export-file"),
    *("get-user-env", "gid", "help", "hold", "ignore-pbs", "input", "job-name", "kill-on-invalid-dep", "no-requeue"),
    *("open-mode", "output", "parsable", "quiet", "requeue", "signal", "test-only", "uid", "usage", "version", "wait"),
    "wrap",
)
"""Options of sbatch that say what runs, as whom and where its output goes, or that emflow itself rests on."""

_FLAG = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(=.*)?")
_EARLY_S = 60
"""Slurm may send the signal so much earlier than it was asked to.  Source: sbatch(1), --signal."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What sbatch is asked for, besides a job's own name and folder.

    Attributes
    ----------
    flags : tuple of str
        Each ``--name=value`` or ``--name``, one argument.
    environment : dict of str to str
        All that the job script gets, by the way that the module's text tells.
    script : Path
        ``reduce.sbatch``, ``reduce-gpu.sbatch`` or ``pool.sbatch``, as installed.
    """

    flags: tuple[str, ...]
    environment: dict[str, str]
    script: Path


class _Profile(SiteKeys, frozen=True, kw_only=True):
    """A profile's file."""

    gpu: SiteKeys = SiteKeys()


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings that count, and by key where each comes from that is not Slurm's own default."""

    settings: SlurmSettings
    origins: dict[str, str]


def site_names() -> tuple[str, ...]:
    """Names of the profiles that ship with emflow, sorted."""
    entries = files("emflow.slurm").joinpath("sites").iterdir()
    return tuple(sorted(e.name.removesuffix(".toml") for e in entries if e.name.endswith(".toml")))


def settings(config: Config) -> SlurmSettings:
    """The profile of ``[slurm] site``, and what the configuration says over it.

    Raises
    ------
    ConfigError
        No such profile, one that is wrong, or a value that can't be asked for.
    """
    return resolve(config).settings


def resolve(config: Config) -> Resolved:
    """The same, and where each value comes from."""
    own, default = config.slurm, SlurmSettings()
    where = profile_path(config)
    profile = tomlfile.read(where, next_step=f"Known: {', '.join(site_names())}").convert(_Profile, _convert)
    layers: list[tuple[str, Any]] = [(f"profile {where.stem}", _beside(profile, where.parent))]
    if config.kernels.device == "gpu":
        layers.append((f"profile {where.stem}, [gpu]", _beside(profile.gpu, where.parent)))
    layers.append(("emflow.toml", _beside(own, config.folder)))
    values: dict[str, Any] = {"site": own.site, "warn_s": own.warn_s}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for key in SiteKeys.__struct_fields__:
            value = getattr(layer, key)
            if value == getattr(default, key):
                continue
            values[key] = (*values.get(key, ()), *value) if key == "flags" else value
            origins[key] = " + ".join([origins[key], origin]) if key == "flags" and key in origins else origin
    if config.kernels.device == "gpu" and not values.get("gpus_per_rank"):
        values["gpus_per_rank"], origins["gpus_per_rank"] = 1, '[kernels] device = "gpu"'
    _check(values, origins)
    return Resolved(SlurmSettings(**values), origins)


def profile_path(config: Config) -> Path:
    """The file of ``[slurm] site``: a name of ours, or a path (anything with a slash or ``.toml``)."""
    site = config.slurm.site
    if "/" in site or site.endswith(".toml"):
        return Path(os.path.normpath(config.folder / Path(site).expanduser()))
    if site not in site_names():
        known = tomlfile.meant(site, site_names())
        raise ConfigError(f"no site is called {site!r} ([slurm] site){known}", next_step="Or give the path of a file")
    return Path(str(files("emflow.slurm") / "sites" / f"{site}.toml"))


def request(config: Config, resources: Resources) -> Request:
    """What to ask for a job that reduces one run folder."""
    found = settings(config)
    script = shipped("reduce-gpu.sbatch" if found.gpus_per_rank else "reduce.sbatch")
    flags = _flags(found, resources.ranks, resources.time_limit_s, resources.memory_mib)
    return Request(flags=flags, environment=_environment(config, found), script=script)


def pool_request(config: Config, name: str = "emflow-pool") -> Request:
    """What to ask for a job that holds the ranks of a pool; its flags begin with its name."""
    found = settings(config)
    flags = _flags(found, config.scheduler.ranks, config.pool.walltime_s, 0)
    environment = _environment(config, found)
    return Request(flags=(f"--job-name={name}", *flags), environment=environment, script=shipped("pool.sbatch"))


def _flags(found: SlurmSettings, ranks: int, time_limit_s: int, memory_mib: int) -> tuple[str, ...]:
    memory_mib = memory_mib or math.ceil(found.memory / (1 << 20))
    wanted: dict[str, object] = {
        "account": found.account,
        "partition": found.partition,
        "qos": found.qos,
        "constraint": found.constraint,
        "reservation": found.reservation,
        "nodes": found.nodes,
        "ntasks": ranks,
        "cpus-per-task": found.cpus_per_rank,
        "gpus-per-task": found.gpus_per_rank,
        "mem": f"{memory_mib}M" if memory_mib else "",
        "time": _time(time_limit_s),
        "signal": _signal(time_limit_s, found.warn_s),
    }
    return (*(f"--{name}={value}" for name, value in wanted.items() if value), *found.flags)


def _time(seconds: int) -> str:
    """``days-hours:minutes:seconds``; Slurm itself rounds up to minutes."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"


def _signal(time_limit_s: int, warn_s: int) -> str:
    """When the ranks are told that their time is nearly up, but never in the first half of it.

    Without ``B:`` it goes to the processes of the steps, the ranks, and not to the job script.
    """
    warn_s = min(warn_s, time_limit_s // 2 - _EARLY_S)
    return f"USR1@{warn_s}" if warn_s > 0 else ""


def _environment(config: Config, found: SlurmSettings) -> dict[str, str]:
    python = found.python or ("python3" if found.container else sys.executable)
    environment = {"PATH": DEFAULT_PATH, **{key: os.environ[key] for key in INHERITED if os.environ.get(key)}}
    environment |= {"EMFLOW_PYTHON": python, "EMFLOW_SITE": str(shipped("site.sh"))}
    optional = {"EMFLOW_MPI": found.mpi, "EMFLOW_SETUP": found.setup, "EMFLOW_CONTAINER": found.container}
    if found.gpus_per_rank:  # sbatch of Slurm 26.05 does not tell its job by SLURM_GPUS_PER_TASK
        optional["EMFLOW_GPUS_PER_RANK"] = str(found.gpus_per_rank)
    if found.container:
        optional["EMFLOW_BIND"] = _folders([config.service.runs, config.pool.folder], "runs of [service]")
        optional["EMFLOW_BIND_RO"] = _folders([config.folder, *(w.root for w in config.watch)], "root of [[watch]]")
    return environment | {key: value for key, value in optional.items() if value}


def _folders(folders: Iterable[Path], what: str) -> str:
    """Folders as one value; Apptainer has no way to write a colon or a comma in the name of one."""
    names = [str(folder) for folder in dict.fromkeys(folders)]
    for name in names:
        if re.search(r"[:,\n]", name):
            raise ConfigError(f"{printable(name)} ({what}) can't be bound into a container: it has a colon or a comma")
    return ":".join(names)


def _convert(kind: type, value: Any) -> Any:
    if kind is Bytes:
        return parse_size(value)
    raise NotImplementedError(kind)


def _beside(layer: Any, folder: Path) -> Any:
    """A layer whose files are absolute: relative ones belong to the folder of the file that names them."""
    named = {key: getattr(layer, key) for key in ("setup", "container") if getattr(layer, key)}
    if "/" in layer.python:  # a bare name is looked for on PATH
        named["python"] = layer.python
    absolute = {key: os.path.normpath(folder / Path(value).expanduser()) for key, value in named.items()}
    return msgspec.structs.replace(layer, **absolute)


def _check(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Refuse what would be another option than it seems, or break a line of what people read."""
    for key, value in values.items():
        texts = value if isinstance(value, tuple) else (value,)
        for text in texts:
            if isinstance(text, str) and text and not text.isprintable():
                raise ConfigError(f"{key} of [slurm] ({origins.get(key)}) is no plain text: {printable(text)}")
    for flag in values.get("flags", ()):
        match = _FLAG.fullmatch(flag)
        step = f"Write it as --name=value ({origins['flags']})"
        if match is None:
            raise ConfigError(f"{printable(flag)!r} in flags of [slurm] is no flag for sbatch", next_step=step)
        # sbatch takes the beginning of a name for the name
        if owned := [name for name in OWNED if name.startswith(match["name"])]:
            step = f"--{owned[0]} is left to emflow ({origins['flags']})"
            raise ConfigError(f"flags of [slurm] must not have {printable(flag)!r}", next_step=step)
