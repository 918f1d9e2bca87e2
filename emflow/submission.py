"""What would be sent for a job, to the letter, where each part comes from, and what the scheduler says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from emflow import registry
from emflow.config import Config
from emflow.errors import SubmitError, Unavailable, printable
from emflow.records import Resources
from emflow.schedulers import site

_EVERYBODY = 0o002


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value that the submission is made of, and where it was said."""

    key: str
    value: str
    origin: str


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A job that was not sent.

    Attributes
    ----------
    ok : bool
        Whether it would be taken, as far as can be told without sending it.
    profile : str
        File of the site's profile; empty where the scheduler has none.
    settings : tuple of Setting
        What is not left to Slurm's own defaults.
    command : tuple of str
        The argument list; no shell sees it.
    environment : dict of str to str
        All that the job gets of our environment.
    script : str
        Where the job script lies.
    text : str
        What stands in it.
    said : str
        The scheduler's answer, an estimate of the start included.
    remarks : tuple of str
        What can't be told from here, and what is wrong with the files that are named.
    """

    ok: bool
    scheduler: str
    profile: str
    settings: tuple[Setting, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    script: str
    text: str
    said: str
    remarks: tuple[str, ...]


def submission(config: Config) -> Submission:
    """Make a job as the service would, and let the scheduler try it.

    Raises
    ------
    ConfigError
        The profile or a value that it is made of is wrong.
    """
    chosen = config.scheduler
    scheduler: Any = registry.load("schedulers", chosen.use).from_config(config)
    try:
        said = scheduler.rehearse(Resources(ranks=chosen.ranks, time_limit_s=chosen.time_limit_s))
        ok, answer, command, environment, text = said.ok, said.said, said.command, said.environment, said.script
    except (SubmitError, Unavailable) as error:
        ok, answer, command, environment, text = False, str(error), (), {}, ""
    finally:
        scheduler.close()
    settings = [
        Setting(key="ranks", value=str(chosen.ranks), origin="[scheduler]"),
        Setting(key="time_limit_s", value=str(chosen.time_limit_s), origin="[scheduler]"),
    ]
    profile = ""
    wrong: list[str] = []
    unseen: list[str] = []
    if asks_slurm(config):
        found = site.resolve(config)
        profile = str(site.profile_path(config))
        settings += [_setting(key, getattr(found.settings, key), origin) for key, origin in found.origins.items()]
        settings.append(_setting("warn_s", found.settings.warn_s, "[slurm]"))
        wrong, unseen = _files({key: getattr(found.settings, key) for key in ("setup", "container", "python")})
    return Submission(
        ok=ok and not wrong,
        scheduler=chosen.use,
        profile=profile,
        settings=tuple(settings),
        command=command,
        environment=environment,
        script=next((part for part in command if part.endswith(".sbatch")), ""),
        text=text,
        said=answer,
        remarks=(*wrong, *unseen),
    )


def asks_slurm(config: Config) -> bool:
    """Whether ``[slurm]`` and its profile say what jobs ask for."""
    use = config.scheduler.use
    return use in ("slurm", "pyslurm") or (use == "pool" and config.pool.launcher == "slurm")


def _setting(key: str, value: object, origin: str) -> Setting:
    text = " ".join(value) if isinstance(value, tuple) else str(value)
    return Setting(key=key, value=text, origin=origin)


def _files(named: dict[str, str]) -> tuple[list[str], list[str]]:
    """What is wrong with the files that the job script will use, and which of them only the nodes can have."""
    wrong, unseen = [], []
    for key, path in named.items():
        if not path.startswith("/"):
            continue
        try:
            mode = Path(path).stat().st_mode
        except OSError as error:
            where = f"{key} of [slurm]: {printable(path)}: {error.strerror}"
            unseen.append(f"{where} on this machine; the job script refuses to go on where a node has none either")
            continue
        if key == "setup" and mode & _EVERYBODY:
            wrong.append(
                f"setup of [slurm]: {printable(path)} can be written by everybody: chmod o-w, or no job runs it"
            )
    return wrong, unseen
