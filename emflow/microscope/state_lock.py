"""One server for one state folder: a lock that the system drops when its holder dies, on Linux and Windows."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from emflow.errors import Busy, NotAllowed, printable

FILE = "server.lock"


class StateLock:
    """Holds ``server.lock`` of a folder; the file stays when it is given back.

    Raises
    ------
    Busy
        Another process holds it; the error carries its pid (exit code 75).
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except PermissionError as error:
            raise NotAllowed(f"{printable(str(path))}: {error.strerror}") from error
        if not _taken(self._file):
            pid = _pid(path)
            self._file.close()
            raise Busy(
                f"{printable(str(folder))}: {f'process {pid}' if pid else 'another process'} serves this microscope",
                pid=pid,
                next_step=f"Stop it first: kill {pid}" if pid else "Try again",
            )
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n".encode())

    def __enter__(self) -> StateLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.truncate(0)
        self._file.close()


def _taken(file: BinaryIO) -> bool:
    """Lock a file without waiting; whether it worked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # a byte beyond the content, which others may still read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # between its lock and its number
        return None
