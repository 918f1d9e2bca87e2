"""Slurm's commands: how they are called, and what their answers are.

Argument lists only, and an environment of our own: ``SBATCH_*``, ``SQUEUE_*`` and the like of whoever started the
service would change what the commands do.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from emflow.errors import SubmitError, Unavailable, printable
from emflow.schedulers.slurm_rows import SACCT_FORMAT, SQUEUE_FORMAT, Row, parse_memory, parse_sacct, parse_squeue

SUBMIT_S = 40.0
"""sbatch gives up by itself 10 s (MessageTimeout) after a controller stopped answering, and tries some errors again."""

ASK_S = 20.0
"""For questions, which end after MessageTimeout too: 10 s by default."""

PASSED_ON = ("PATH", "HOME", "SLURM_CONF")
NAMES_AT_ONCE = 4000
"""Job names in one argument: Linux takes 128 KiB (MAX_ARG_STRLEN), and a name has 19 characters."""

REMEMBERED_DAYS = 35
"""How far back sacct looks; without a start it looks at today only.  A job may take 30 days."""

_INSTALL = "Install Slurm's commands on this machine, or put them on the service's PATH"

_AWAY = re.compile(
    "Unable to contact slurm controller|Socket timed out|Communication connection failure|Zero Bytes were transmitted"
    "|Message (send|receive) failure|standby mode|Could not establish a configuration source|Protocol authentication"
    "|Connection refused|Failed to connect to authentication agent",
    re.IGNORECASE,
)
"""What is said when the controller (or munge) can't be reached; whether a job was taken is then not known."""

_ENDED = re.compile("Invalid job id|already completing or completed", re.IGNORECASE)

REFUSALS: Mapping[str, str] = {
    "Invalid partition name specified": "partition of [slurm]",
    "No partition specified or system default partition": "partition of [slurm]",
    "User's group not permitted to use this partition": "partition of [slurm], or ask the site",
    "Requested nodes not in this partition": "partition and flags of [slurm]",
    "Invalid account or account/partition combination specified": "account and partition of [slurm]",
    "Invalid qos specification": "qos of [slurm]",
    "Invalid feature specification": "constraint of [slurm]",
    "Requested reservation is invalid": "reservation of [slurm]",
    "Access denied to requested reservation": "reservation of [slurm], or ask the site",
    "Requested time limit is invalid (missing or exceeds some limit)": "time_limit_s of [scheduler], and the partition",
    "Time limit specification required, but not provided": "time_limit_s of [scheduler]",
    "Node count specification invalid": "nodes and partition of [slurm]",
    "More processors requested than permitted": "ranks of [scheduler], cpus_per_rank and partition of [slurm]",
    "CPU count specification invalid": "ranks of [scheduler] and cpus_per_rank of [slurm]",
    "Task count specification invalid": "ranks of [scheduler] and nodes of [slurm]",
    "Requested more tasks than available processors": "ranks of [scheduler] and nodes of [slurm]",
    "Memory specification can not be satisfied": "memory of [slurm]",
    "Memory required by task is not available": "memory of [slurm]",
    "Invalid generic resource (gres) specification": "gpus_per_rank of [slurm]",
    "Requested GRES option unsupported by configured SelectType plugin": "gpus_per_rank of [slurm]",
    "Invalid Trackable RESource (TRES) specification": "gpus_per_rank and flags of [slurm]",
    "Requested node configuration is not available": "ranks of [scheduler]; memory, constraint and nodes of [slurm]",
    "Invalid license specification": "flags of [slurm]",
    "Invalid wckey specification": "flags of [slurm]",
    "Invalid node name specified": "flags of [slurm]",
    "Invalid --nice value": "flags of [slurm]",
    "Access/permission denied": "account and partition of [slurm], or ask the site",
    "unrecognized option": "flags of [slurm]",
    "invalid option": "flags of [slurm]",
}
"""What sbatch says of a job that it will never take, and the settings to look at.

Anything that is not here is asked again, and told: "Job violates accounting/QOS policy" may be a limit on the number of
jobs, which passes.  Source: ``slurm_errno.c``, releases 22.05 to 26.05.
"""

_BAD_VALUE = re.compile(r"Invalid (--[a-z-]+) specification")


class Answer(NamedTuple):
    """What a command said, and its exit status."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What it complained of, in one line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return printable("; ".join(re.sub(r"^\w+: (error: )?", "", line) for line in lines))[:500]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command gets: where Slurm is, and English."""
    return {**{key: os.environ[key] for key in PASSED_ON if key in os.environ}, "LC_ALL": "C", **(more or {})}


def run(command: Sequence[str], *, timeout_s: float = ASK_S, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command to its end.

    Raises
    ------
    Unavailable
        It is not installed, or did not end in time and was killed.
    """
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            env=environment() if env is None else dict(env),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{command[0]} did not end within {timeout_s:g} s", next_step="See scontrol ping, and SLURM_CONF"
        ) from error
    except OSError as error:
        text = f"{command[0]} can't be run: {error.strerror}"
        raise Unavailable(text, next_step=_INSTALL) from error
    return Answer(done.returncode, done.stdout, done.stderr)


def ask(*command: str, timeout_s: float = ASK_S) -> Answer:
    """Run a command whose failure means that Slurm can't be asked.

    Raises
    ------
    Unavailable
        It failed; the text has what it said.
    """
    answer = run(command, timeout_s=timeout_s)
    if answer.code:
        raise Unavailable(f"{command[0]} failed: {answer.said or f'exit status {answer.code}'}")
    return answer


# --- submission


def submit(flags: Sequence[str], script: Path, folder: Path, env: Mapping[str, str]) -> str:
    """Send a job once, and return its id.

    Raises
    ------
    SubmitError
        Refused for good; or ``transient``: nobody knows whether there is a job now.
    Unavailable
        sbatch can't be run, or was killed because it did not end: likewise.
    """
    command = submission(flags, script, folder)
    answer = run(command, timeout_s=SUBMIT_S, env=env)
    # a site's wrapper may greet, or tell what is left of an allocation
    ids = [found[1] for line in answer.out.splitlines() if (found := re.fullmatch(r"([0-9]+)(;.*)?", line.strip()))]
    if answer.code == 0 and len(ids) == 1:
        return ids[0]
    if answer.code > 0 and (setting := refused(answer.said)):
        raise SubmitError(f"Slurm refuses the job: {answer.said}", next_step=f"Look at {setting}")
    if answer.code == 0:
        text = f"sbatch gave no id but {printable(answer.out.strip())[:100]!r}"
    elif answer.code < 0:
        text = f"sbatch was killed by signal {-answer.code} before it said anything"
    else:
        text = f"sbatch failed: {answer.said or f'exit status {answer.code}'}"
    raise SubmitError(text, transient=True, next_step="Slurm is asked for the job's name before it is sent again")


def submission(flags: Sequence[str], script: Path, folder: Path, *more: str) -> tuple[str, ...]:
    """The command that sends a job: the script's one argument is the run folder."""
    return ("sbatch", *more, "--parsable", *flags, "--", str(script), str(folder))


def refused(said: str) -> str:
    """The settings that make Slurm refuse a job for good; empty if it may take it later, or may have taken it."""
    if _AWAY.search(said):
        return ""
    if bad := _BAD_VALUE.search(said):
        return REFUSALS.get(bad[0], f"{bad[1]}, from [slurm]")
    return next((setting for text, setting in REFUSALS.items() if text.lower() in said.lower()), "")


def verbatim(path: Path) -> str:
    r"""A path as ``--output`` wants it: Slurm takes ``%j`` and ``\`` in it for its own.

    A backslash anywhere makes Slurm take away one level of them and expand nothing.  Source: ``remove_path_slashes``
    in ``fname.c``.
    """
    return str(path).replace("\\", "\\\\").replace("%", "\\%")


# --- questions


def listed(names: Iterable[str]) -> list[Row]:
    """Our jobs with these names that Slurm's controller remembers, ended ones too, in one question.

    By name and user, never by id alone: an id may be forgotten, and given to somebody else's job.
    """
    wanted, rows = list(names), list[Row]()
    for begin in range(0, len(wanted), NAMES_AT_ONCE):
        chosen = ",".join(wanted[begin : begin + NAMES_AT_ONCE])
        answer = ask(*_squeue(), f"--name={chosen}")
        rows += parse_squeue(answer.out)
    return rows


def accounted(names: Iterable[str]) -> list[Row] | None:
    """Our jobs with these names that Slurm's accounting knows; None where the site has none.

    Raises
    ------
    Unavailable
        There may be one, and it does not answer.
    """
    wanted, rows = list(names), list[Row]()
    span = ("-S", f"now-{REMEMBERED_DAYS}days", "-u", str(os.getuid()))
    for begin in range(0, len(wanted), NAMES_AT_ONCE):
        chosen = ",".join(wanted[begin : begin + NAMES_AT_ONCE])
        answer = run(("sacct", "-n", "-P", "-X", *span, f"--name={chosen}", "-o", SACCT_FORMAT))
        if "accounting storage is disabled" in answer.err:
            return None
        if answer.code:
            raise Unavailable(f"sacct failed: {answer.said or f'exit status {answer.code}'}")
        rows += parse_sacct(answer.out)
    return rows


def named(ids: Sequence[str]) -> list[Row]:
    """Our jobs with these ids, as far as the controller remembers."""
    answer = run((*_squeue(), "-j", ",".join(ids)))
    if answer.code and "Invalid job id" not in answer.err:  # said of a single job that is forgotten
        raise Unavailable(f"squeue failed: {answer.said or f'exit status {answer.code}'}")
    return list(parse_squeue(answer.out))


def memory_mib(job: str) -> int:
    """MiB of each node that a job was given; 0 if Slurm does not say, can't be asked, or does not look at memory."""
    try:
        answer = ask("scontrol", "-o", "show", "job", job)
    except Unavailable:
        return 0
    return parse_memory(answer.out)


def cancel(ids: Sequence[str]) -> None:
    """Tell Slurm to end jobs; that they are unknown or have ended is no error."""
    answer = run(("scancel", *ids))  # with --quiet it would not say why it failed
    if answer.code and (_AWAY.search(answer.err) or not _ENDED.search(answer.err)):
        raise Unavailable(f"scancel failed: {answer.said or f'exit status {answer.code}'}")


def _squeue() -> tuple[str, ...]:
    """The beginning of a question for our jobs; ``--all`` because partitions may be hidden from their users."""
    return ("squeue", "--all", "-h", "-t", "all", "-u", str(os.getuid()), "-o", SQUEUE_FORMAT)
