"""The folder of each experiment: its name, who runs it, and where that one listens."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from emflow.agent.log import LOG_FILE
from emflow.errors import Busy, UsageError, printable
from emflow.microscope.protocol import EXPERIMENT_ID
from emflow.runs import holder, lock
from mpi_kernels import jsonfile

AGENT_FILE = "agent.json"


class AgentFile(msgspec.Struct, frozen=True, kw_only=True):
    """``agent.json``: where the agent listens that runs an experiment, or waits for one."""

    address: str
    host: str
    pid: int
    experiment: str


def new_experiment() -> str:
    """A fresh id."""
    return f"e{secrets.token_hex(6)}"


def folder_of(experiments: Path, experiment: str) -> Path:
    """Folder of an experiment, there or not.

    Raises
    ------
    UsageError
        It can't be the id of one.
    """
    if not EXPERIMENT_ID.fullmatch(experiment):
        raise UsageError(
            f"'{printable(experiment)}' is no id of an experiment",
            next_step="It is e and 12 digits 0-9 a-f; see them with: emflow agent list",
        )
    return experiments / experiment


def existing(experiments: Path) -> list[Path]:
    """Folders of all experiments with a log, the newest log first."""
    try:
        found = [f for f in experiments.iterdir() if EXPERIMENT_ID.fullmatch(f.name) and _begun(f)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda f: ((f / LOG_FILE).stat().st_mtime_ns, f.name), reverse=True)


def _begun(folder: Path) -> bool:
    try:
        return (folder / LOG_FILE).stat().st_size > 0
    except FileNotFoundError:
        return False


def find(experiments: Path, name: str) -> Path:
    """The folder of an experiment by its id, the beginning of it, or its path.

    Raises
    ------
    UsageError
        There is none, or more than one.
    """
    path = Path(name)
    if (path / LOG_FILE).is_file():
        return path
    found = [f for f in existing(experiments) if name and f.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    many = ", ".join(f.name for f in found[:5])
    what = f"more than one experiment begins with '{printable(name)}': {many}" if found else ""
    raise UsageError(
        what or f"no experiment is called '{printable(name)}' in {printable(str(experiments))}",
        next_step="See them with: emflow agent list",
    )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Run an experiment alone.

    Raises
    ------
    Busy
        Another agent runs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(folder))
        except Busy as busy:
            who = f"process {busy.pid}" if busy.pid else "another process"
            raise Busy(
                f"experiment {folder.name}: {who} runs it",
                pid=busy.pid,
                next_step=f"Ask it with: emflow agent status --experiment {folder.name}",
            ) from None
        yield


def write_agent(folder: Path, record: AgentFile) -> None:
    """Say where the agent listens."""
    folder.mkdir(parents=True, exist_ok=True)
    jsonfile.publish(folder / AGENT_FILE, msgspec.json.encode(record))


def read_agent(folder: Path) -> AgentFile | None:
    """Where the agent of a folder listens, if one said so that is still there."""
    try:
        found = msgspec.json.decode((folder / AGENT_FILE).read_bytes(), type=AgentFile)
    except (OSError, ValueError):
        return None
    running = holder(folder) == found.pid if (folder / LOG_FILE).exists() else _alive(found.pid)
    return found if running else None


def running(experiments: Path, experiment: str | None) -> AgentFile:
    """The agent of an experiment; without a name the newest one that runs, else one that waits for a start.

    Raises
    ------
    UsageError
        None runs.
    """
    folders = [find(experiments, experiment)] if experiment else [*existing(experiments), experiments]
    found = next((a for a in map(read_agent, folders) if a), None)
    if found is None:
        what = f"no agent runs experiment {printable(experiment)}" if experiment else "no agent is running"
        raise UsageError(what, next_step="Start one with: emflow agent --policy NAME")
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
