"""The files of a pool's folder as records, and how its names are checked; standard library only.

``<pool>/<name>/`` holds ``pool.json`` (written by who starts it), ``endpoint.json``, ``heartbeat``, ``spool/`` (tasks
come in), ``taken/`` (tasks that are the pool's) and ``ended.json``.  A task is in the pool's hands exactly while its
file is in ``spool/`` or ``taken/`` and there is no ``ended.json``.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpi_kernels import jsonfile
from mpi_kernels.contract import JOB_NAME, SCHEMA, Device
from mpi_kernels.pool.errors import PoolRefused, WrongSecret

POOL_FILE = "pool.json"
ENDPOINT_FILE = "endpoint.json"
HEARTBEAT_FILE = "heartbeat"
ENDED_FILE = "ended.json"
SPOOL = "spool"
TAKEN = "taken"
DRAIN_FILE = "drain"
"""In the spool: drain, where TCP does not get through."""
CANCEL_SUFFIX = ".cancel"
"""In the spool, after a job's name: stop it."""

POOL_NAME = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]{2}")
RUN_FOLDER = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}/(?P<acquisition>[0-9a-f]{16})/(?P<attempt>[0-9]{2})")
SECRET = re.compile(r"[0-9a-f]{64}")

Reach = Literal["auto", "tcp", "spool"]
State = Literal["starting", "idle", "working", "draining"]
How = Literal["result", "error", "claimed", "cancelled", "refused", "lost"]
"""How a task ended: ``claimed`` by another attempt before; ``lost`` with the ranks that had claimed it."""
Why = Literal["drained", "time", "stopped", "gave-up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """``pool.json``: what a pool is, written once before it is started.

    Attributes
    ----------
    runs : str
        Absolute root of the run folders, the same on every node.
    secret : str
        Path of the secret.
    walltime_s : float
        Seconds from its first start to its end; 0: it ends when it is told to.  What Slurm says itself wins.
    warn_s : float
        So long before its end it takes nothing new.
    nap_ms : float
        How long an idle rank sleeps between two looks.
    reach : {"auto", "tcp", "spool"}
        How tasks come.
    gateway : str
        `mpi_kernels.events.host_name` of who wrote this.  A pool whose rank 0 runs there listens on loopback, any other
        one on all IPv4 addresses of rank 0's node.
    device : {"cpu", "gpu"}
        ``gpu``: each rank opens its card before the pool says that it is idle.
    """

    name: str
    runs: str
    ranks: int
    secret: str
    walltime_s: float = 0.0
    warn_s: float = 60.0
    nap_ms: float = 0.5
    reach: Reach = "auto"
    gateway: str = ""
    device: Device = "cpu"
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """``endpoint.json``: published by rank 0 once it takes tasks, again after every restart.

    Attributes
    ----------
    addresses : tuple of str
        Where it listens, best first; empty if tasks come as files only, and then ``port`` is 0.
    scheduler_id : str
        The Slurm job; empty without Slurm.
    nodes : tuple of str
        Host of each rank.
    stops_ns : int
        Wall time of its end; 0 if it has none.
    life : int
        How often its ranks were started in this instance, from 1.
    """

    host: str
    addresses: tuple[str, ...]
    port: int
    pid: int
    scheduler_id: str
    ranks: int
    nodes: tuple[str, ...]
    wall_ns: int
    stops_ns: int
    life: int = 1
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """``heartbeat``: rewritten once a second, whatever the ranks do; also the answer to ``beat`` over TCP.

    Attributes
    ----------
    job : str
        What is being reduced; empty if nothing is.
    queued : int
        Tasks that wait.
    done, failed : int
        Tasks that ended since the ranks were started, and how many of them without a result.
    task_ns, progress_ns : int
        Wall time at which the task began, and at which it last showed progress; 0 without a task.
    """

    state: State
    job: str
    queued: int
    done: int
    failed: int
    wall_ns: int
    task_ns: int = 0
    progress_ns: int = 0
    life: int = 1
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``spool/<job>.json`` and ``taken/<job>.json``: a job, and its folder below ``PoolSpec.runs``.

    Shortly before ``time_limit_s`` (0: none) it ends by itself, and leaves what it has.
    """

    job: str
    folder: str
    time_limit_s: float = 0.0
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnd:
    """A task is no longer in the pool's hands; a hint, the run folder is the truth.

    Attributes
    ----------
    dispatch_ms : float
        Milliseconds from the taking of the task to its start on the last rank of rank 0's machine, the wait for tasks
        before it included; 0 if it never began.
    """

    job: str
    how: How
    why: str = ""
    dispatch_ms: float = 0.0
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """``ended.json``: the pool takes nothing any more, and nothing of ``left`` was begun by it.

    Attributes
    ----------
    left : tuple of str
        Jobs that were handed over and not begun.
    """

    why: Why
    message: str
    left: tuple[str, ...]
    done: int
    wall_ns: int
    v: int = SCHEMA


def check_task(task: Task) -> None:
    """Raise `PoolRefused` unless both names are what they should be, and belong together."""
    job, folder = JOB_NAME.fullmatch(task.job), RUN_FOLDER.fullmatch(task.folder)
    if job is None or folder is None or job.groups() != folder.groups():
        raise PoolRefused(
            f"{task.job!r:.80} in {task.folder!r:.80} is no job in its run folder",
            next_step="a task is <acquisition>-<nn> in <day>/<acquisition>/<nn>",
        )


def run_folder(runs: str | os.PathLike[str], task: Task) -> Path:
    """The run folder of a task, below ``runs`` and reached through no link.

    Raises
    ------
    PoolRefused
        The names are not what they should be, or the folder is not there, or is somewhere else.
    """
    check_task(task)
    root = os.path.realpath(runs)
    folder = Path(root, task.folder)
    if os.path.realpath(folder) != str(folder):
        raise PoolRefused("a part of the run folder's path is a link", path=folder, next_step="emflow makes none")
    if not folder.is_dir():
        step = "does this node see the run folders where the gateway does?"
        raise PoolRefused("there is no such run folder", path=folder, next_step=step)
    return Path(runs, task.folder)


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """The secret of pool and client.

    Raises
    ------
    WrongSecret
        Somebody else owns it or may read it, or it is no secret of ours.
    FileNotFoundError
        It is not there.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077 or not stat.S_ISREG(found.st_mode):
            raise WrongSecret(
                f"the secret has mode {stat.S_IMODE(found.st_mode):04o} and belongs to user {found.st_uid}: others may "
                f"have read it",
                path=path,
                next_step="remove it, and start the pools again: a new one is made",
            )
        text = file.read(1024).decode("ascii", "replace").strip()
    if not SECRET.fullmatch(text):
        raise WrongSecret("this is not 32 bytes in hex", path=path, next_step="remove it, and start the pools again")
    return bytes.fromhex(text)


def read_spec(folder: Path) -> PoolSpec:
    """``pool.json`` of an instance folder, checked.

    Raises
    ------
    FormatError
        It is no such record.
    PoolRefused
        It belongs to another folder, or names no absolute root.
    """
    spec = jsonfile.read(PoolSpec, folder / POOL_FILE)
    if spec.name != folder.name or not POOL_NAME.fullmatch(spec.name):
        raise PoolRefused(f"it describes {spec.name!r:.60}", path=folder / POOL_FILE, next_step="start a new pool")
    if not Path(spec.runs).is_absolute() or spec.ranks < 1 or not 0 <= spec.nap_ms <= 1000:
        raise PoolRefused("runs, ranks or nap_ms can't be", path=folder / POOL_FILE, next_step="start a new pool")
    return spec
