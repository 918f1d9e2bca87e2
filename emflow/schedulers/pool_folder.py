"""The pool folder as the service keeps it: which pools there are, what was done about each, and where jobs were sent.

All that the relay knows is in these files, so that another process, or the next one, goes on from them:

    <pool>/secret                 shared by a pool and its clients
    <pool>/service                whose pools these are
    <pool>/held                   a person has stopped the pools: none is started
    <pool>/sent/<job>.json        where a job was sent: written before it is sent
    <pool>/<name>/pool.json       the intent to have a pool: written before it is started
    <pool>/<name>/launched.json   the id under which it was started
    <pool>/<name>/leaving         it is to take no more tasks
    <pool>/<name>/closed.json     nothing of it runs any more: the launcher was asked, and told to end it, before

The other files of a pool are its own (`mpi_kernels.pool.records`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from emflow.errors import NotAllowed, Unavailable, printable
from emflow.records import EndCause
from mpi_kernels.contract import JOB_NAME
from mpi_kernels.failure import publish_once
from mpi_kernels.jsonfile import publish
from mpi_kernels.pool.records import POOL_NAME

T = TypeVar("T")
Kind = Literal["slurm", "mpiexec"]
"""Of what starts pools."""

SENT_FOLDER = "sent"
OWNER_FILE = "service"
HELD_FILE = "held"
LAUNCHED_FILE = "launched.json"
LEAVING_FILE = "leaving"
CLOSED_FILE = "closed.json"

OURS = 0o700
"""Mode of our folders: whoever may write into one gives pools tasks, or has us delete what a link leads to."""

KEPT_S = 2 * 86400.0
"""How long the folder of a pool that has ended is kept."""

SENT_KEPT_S = 40 * 86400.0
"""How long the record of a job that was sent is kept: one may wait long in the queue, and run for 30 days."""

_LOST = "If nothing is left of it on the compute nodes, delete the file"


class Launched(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``launched.json``: what a pool was started as; ``wall_ns`` of the service's host."""

    launcher: Kind
    scheduler_id: str
    wall_ns: int
    v: int = 1


class Closed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``closed.json``: why a pool ended, and what it cost.

    ``young`` says that it never took a task, or not for long: another one would probably fare no better.
    """

    reason: str
    wall_ns: int
    cause: EndCause = EndCause.UNSAID
    young: bool = False
    nodes: int = 0
    seconds: float = 0.0
    v: int = 1


class Sent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``sent/<job>.json``: where a job is, as far as its sender knows.

    Attributes
    ----------
    folder : str
        Its run folder.
    to : str
        Scheduler's id; one that ends in a colon was meant to be sent there, and its id is not known.
    why : str
        Why it did not go to a pool; empty if it did.
    cancelled : bool
        It was told to end.
    """

    job: str
    folder: str
    ranks: int
    time_limit_s: int
    to: str
    memory_mib: int = 0
    why: str = ""
    cancelled: bool = False
    v: int = 1


class PoolFolder:
    """Reads and writes the service's part of a pool folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._closed: dict[str, Closed] = {}
        self._sent: dict[str, Sent] = {}

    # --- the folder

    def make(self) -> None:
        """Make the folder, for our user only, if it is not there."""
        self.root.mkdir(mode=OURS, parents=True, exist_ok=True)

    def own(self, service: str) -> None:
        """Make sure that what stands in the folder was written by us: it is acted on.

        Parameters
        ----------
        service : str
            Host and state folder.

        Raises
        ------
        NotAllowed
            Others may write to the folder, or another service keeps its pools in it.
        """
        self.make()
        found, where = self.root.stat(), printable(str(self.root))
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise NotAllowed(
                f"{where} has mode {stat.S_IMODE(found.st_mode):04o} and belongs to user {found.st_uid}: others may "
                "write to it, and so end pools or give them tasks",
                next_step=f"Close it to others (chmod go-w {where}), or name another folder in [pool]",
            )
        path = self.root / OWNER_FILE
        if not path.exists():
            publish_once(path, service.encode("utf-8", "surrogateescape"))
        owner = path.read_bytes().decode("utf-8", "surrogateescape")
        if owner != service:
            raise NotAllowed(
                f"the pools in {where} are those of the service {printable(owner):.200}, not of {printable(service)}",
                next_step=f"Name another folder in [pool]; or, if it is gone for good, delete {OWNER_FILE} there",
            )

    # --- pools

    def of(self, name: str) -> Path:
        """The folder of a pool."""
        if not POOL_NAME.fullmatch(name):
            raise ValueError(f"no name of a pool: {name!r}")
        return self.root / name

    def names(self) -> list[str]:
        """All pools that there are or were, oldest first."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(e.name for e in entries if POOL_NAME.fullmatch(e.name))
        except FileNotFoundError:
            return []

    def open_names(self) -> list[str]:
        """Pools of which something may run, oldest first."""
        return [name for name in self.names() if self.closed(name) is None]

    def new_name(self) -> str:
        """Make the folder of a new pool; its name says when, and no two processes get the same one."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.make()
        for number in range(100):
            with contextlib.suppress(FileExistsError):
                (self.root / f"{now}-{number:02d}").mkdir(mode=OURS)
                return f"{now}-{number:02d}"
        raise Unavailable("a hundred pools were started in one second")

    def launched(self, name: str) -> Launched | None:
        """What a pool was started as; None if that is not known."""
        return _read(Launched, self.of(name) / LAUNCHED_FILE)

    def write_launched(self, name: str, launcher: Kind, scheduler_id: str) -> None:
        """Record the fact that a pool was started."""
        record = Launched(launcher=launcher, scheduler_id=scheduler_id, wall_ns=time.time_ns())
        publish(self.of(name) / LAUNCHED_FILE, msgspec.json.encode(record))

    def closed(self, name: str) -> Closed | None:
        """Why a pool ended; None while something of it may run."""
        if name not in self._closed:
            found = _read(Closed, self.of(name) / CLOSED_FILE)
            if found is None:
                return None
            self._closed[name] = found
        return self._closed[name]

    def write_closed(self, name: str, closed: Closed) -> None:
        """Record that nothing of a pool runs any more."""
        publish(self.of(name) / CLOSED_FILE, msgspec.json.encode(closed))

    def leaving(self, name: str) -> bool:
        """Whether a pool was told to take no more tasks."""
        return (self.of(name) / LEAVING_FILE).exists()

    def write_leaving(self, name: str) -> None:
        """Record that a pool is to take no more tasks: nothing is sent to it from now on."""
        (self.of(name) / LEAVING_FILE).touch()

    @property
    def held(self) -> bool:
        """Whether a person has stopped the pools."""
        return (self.root / HELD_FILE).exists()

    def hold(self, held: bool) -> None:
        """Let nobody start pools, or let them again."""
        if held:
            self.make()
            (self.root / HELD_FILE).touch()
        else:
            (self.root / HELD_FILE).unlink(missing_ok=True)

    # --- jobs

    def sent(self, job: str) -> Sent | None:
        """Where a job was sent; None if it never was, or long ago."""
        if not JOB_NAME.fullmatch(job):
            return None
        if job not in self._sent:
            try:
                self._sent[job] = msgspec.json.decode((self.root / SENT_FOLDER / f"{job}.json").read_bytes(), type=Sent)
            except (FileNotFoundError, msgspec.MsgspecError):  # a power cut may have torn it: the pools are asked
                return None
        return self._sent[job]

    def write_sent(self, sent: Sent) -> None:
        """Record where a job is sent; only the service that holds the journal does so."""
        path = self.root / SENT_FOLDER / f"{sent.job}.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        data = msgspec.json.encode(sent)
        # not to last a power cut, for which a job would have to wait: what is lost is found in the pools' own folders
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:
            self.make()
            path.parent.mkdir(mode=OURS, exist_ok=True)
            temporary.write_bytes(data)
        temporary.replace(path)
        self._sent[sent.job] = sent

    def forget(self, job: str) -> None:
        """Keep the record of a job that has ended on disk only."""
        self._sent.pop(job, None)

    # --- what is old

    def clean(self, kept_s: float = KEPT_S) -> None:
        """Delete what ended long ago."""
        before_ns = time.time_ns() - int(kept_s * 1e9)
        for name in self.names():
            closed = self.closed(name)
            if closed is not None and closed.wall_ns < before_ns:
                shutil.rmtree(self.of(name), ignore_errors=True)
                self._closed.pop(name, None)
        for path in _old_files(self.root / SENT_FOLDER, time.time_ns() - int(SENT_KEPT_S * 1e9)):
            path.unlink(missing_ok=True)


def _old_files(folder: Path, before_ns: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            found = [e.path for e in entries if e.stat().st_mtime_ns < before_ns]
    except FileNotFoundError:
        return
    yield from map(Path, found)


def _read(kind: type[T], path: Path) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise Unavailable(f"{printable(str(path))} can't be read: {error}", next_step=_LOST) from error
