"""One service for one state folder: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from emflow.errors import Busy, NotAllowed, printable

LOCK_FILE = "service.lock"


class _Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the lock; ``ticks``: its start in clock ticks since boot, so that a reused pid is told apart."""

    pid: int
    started_ns: int
    ticks: int


@contextlib.contextmanager
def lock(state_folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``service.lock`` of a state folder on a local disk.

    The file stays when the lock is given back: unlinking it would let two services lock two files of that name.

    Raises
    ------
    Busy
        Another process holds it; the error carries its pid (exit code 75).
    """
    path = Path(state_folder) / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except PermissionError as error:
        raise NotAllowed(f"{printable(str(path))}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(path) from None
        me = _Holder(pid=os.getpid(), started_ns=time.time_ns(), ticks=_start_ticks(os.getpid()) or 0)
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(me), 0)
        try:
            yield
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def holder(state_folder: str | os.PathLike[str]) -> int | None:
    """Pid of the service on a state folder, if one runs; never touches the lock, so it can't be in a start's way."""
    try:
        found = msgspec.json.decode((Path(state_folder) / LOCK_FILE).read_bytes(), type=_Holder)
    except (OSError, msgspec.DecodeError):
        return None
    return found.pid if _start_ticks(found.pid) == found.ticks else None


def _busy(path: Path) -> Busy:
    try:
        pid = msgspec.json.decode(path.read_bytes(), type=_Holder).pid
    except (OSError, msgspec.DecodeError):  # between its lock and its record
        pid = None
    who = f"process {pid}" if pid else "another process"
    return Busy(
        f"{printable(str(path.parent))}: {who} holds the lock of this state folder",
        pid=pid,
        next_step=f"Stop it first: kill {pid}" if pid else "Try again",
    )


def _start_ticks(pid: int) -> int | None:
    """Start of a process, field 22 of proc(5)'s stat; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # the name in field 2 may hold spaces and brackets
