"""What ``emflow check`` asks Slurm, each part with its cure."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator

from emflow.config import Config
from emflow.errors import EmflowError, Unavailable, printable
from emflow.records import Resources
from emflow.schedulers import site, slurm_commands
from emflow.schedulers.protocol import Finding, Rehearsal
from emflow.schedulers.pyslurm_library import Library
from emflow.schedulers.slurm_rows import seconds

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
FORGETS_S = 60
"""A controller that forgets jobs sooner than this, with no accounting, leaves little time for a restart of ours."""

LIBRARY = "pyslurm"
"""The part that says whether the other way to Slurm is open."""

_INSTALL = "install Slurm's client commands here (Debian: slurm-client), or put them on the service's PATH"


def findings(config: Config, rehearse: Callable[[Resources], Rehearsal]) -> list[Finding]:
    """Look at all that jobs under Slurm need, and stop where the rest can't be asked."""
    return list(_findings(config, rehearse))


def _findings(config: Config, rehearse: Callable[[Resources], Rehearsal]) -> Iterator[Finding]:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        yield Finding(part="Slurm commands", ok=False, found=f"missing: {', '.join(missing)}", fix=_INSTALL)
        return
    try:
        version = slurm_commands.ask("sbatch", "--version").out.strip()
        yield Finding(part="Slurm commands", ok=True, found=printable(f"{version}, {shutil.which('sbatch')}"))
        controller = _controller()
        yield controller
        if not controller.ok:
            return
        yield _partition(config)
        yield _memory_of_jobs()
        yield _trial(config, rehearse)
        yield _library()
    except Unavailable as error:
        fix = error.next_step or "see scontrol ping, and SLURM_CONF"
        yield Finding(part="Slurm", ok=False, found=printable(error.message), fix=fix)
    except EmflowError as error:
        yield Finding(part="Slurm settings", ok=False, found=error.message, fix=error.next_step or "correct [slurm]")


def _controller() -> Finding:
    answer = slurm_commands.run(("scontrol", "ping"))
    said = answer.said
    up = any(line.rstrip().endswith("UP") for line in answer.out.splitlines())
    fix = "" if up else "ask the site; on a machine of your own: systemctl status slurmctld, and SLURM_CONF"
    return Finding(part="Slurm controller", ok=up, found=said or "no answer", fix=fix)


def _partition(config: Config) -> Finding:
    """Whether the partition is there, up, and gives the time that a job asks for."""
    wanted = site.settings(config).partition
    rows = [_fields(line) for line in slurm_commands.ask("scontrol", "-o", "-a", "show", "partition").out.splitlines()]
    names = [row["PartitionName"] for row in rows if "PartitionName" in row]
    chosen = [r for r in rows if r.get("PartitionName") in wanted.split(",")] if wanted else []
    chosen = chosen or ([] if wanted else [r for r in rows if r.get("Default") == "YES"])
    part = f"partition {printable(wanted)}" if wanted else "partition"
    if not chosen:
        found = f"none of that name; there are {', '.join(names)}" if wanted else "the site has no default partition"
        return Finding(part=part, ok=False, found=printable(found), fix=f"partition of [slurm]: {', '.join(names)}")
    told = "; ".join(
        f"{r['PartitionName']}: {r.get('State', '?')}, {r.get('TotalNodes', '?')} nodes, "
        f"{r.get('TotalCPUs', '?')} cores, at most {r.get('MaxTime', '?')}"
        for r in chosen
    )
    limit_s = config.scheduler.time_limit_s
    if not any(r.get("State") == "UP" for r in chosen):
        return Finding(part=part, ok=False, found=told, fix="ask the site, or name another partition in [slurm]")
    if all(_limit(r.get("MaxTime", "")) < limit_s for r in chosen):
        fix = f"lower time_limit_s of [scheduler] ({limit_s} s), or name another partition in [slurm]"
        return Finding(part=part, ok=False, found=told, fix=fix)
    return Finding(part=part, ok=True, found=told)


def _memory_of_jobs() -> Finding:
    """How long Slurm knows how a job ended."""
    age = re.search(r"^MinJobAge\s*=\s*([0-9]+)", slurm_commands.ask("scontrol", "show", "config").out, re.MULTILINE)
    kept_s = int(age[1]) if age else 0
    answer = slurm_commands.run(("sacct", "-n", "-P", "-X", "-o", "JobIDRaw")) if shutil.which("sacct") else None
    if answer is not None and answer.code == 0:
        return Finding(part="Slurm accounting", ok=True, found="on (sacct answers)")
    why = answer.said if answer is not None else "sacct is not installed"
    told = f"off ({why}): {kept_s} s after its end a job is forgotten, and only its run folder tells how it ended"
    if kept_s < FORGETS_S:
        told += "; ask the site for a longer MinJobAge"
    return Finding(part="Slurm accounting", ok=True, found=printable(told))


def _trial(config: Config, rehearse: Callable[[Resources], Rehearsal]) -> Finding:
    scheduler = config.scheduler
    tried = rehearse(Resources(ranks=scheduler.ranks, time_limit_s=scheduler.time_limit_s))
    setting = slurm_commands.refused(tried.said)
    fix = "" if tried.ok else f"look at {setting}" if setting else "emflow check --submit shows what is sent"
    return Finding(part="Slurm dry run", ok=tried.ok, found=tried.said or "taken", fix=fix)


def _library() -> Finding:
    """Whether Slurm's library could take the place of its commands; nothing is missing where it can't."""
    try:
        found = f'{Library().versions()}: [scheduler] use = "pyslurm" would do as well, and is quicker'
    except Unavailable as error:
        found = f"not used: {error.message}"
    return Finding(part=LIBRARY, ok=True, found=printable(found))


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _limit(text: str) -> float:
    return seconds(text) or float("inf")  # UNLIMITED
