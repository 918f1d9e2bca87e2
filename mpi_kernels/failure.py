"""``error.json``: why an attempt has no result, written once by whichever rank fails first."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import time
import traceback
from pathlib import Path

from mpi_kernels import jsonfile
from mpi_kernels.contract import ERROR_FILE, ErrorRecord
from mpi_kernels.errors import KernelError, printable
from mpi_kernels.events import host_name


class Stopped(KernelError):
    """The scheduler or a person asked this process to end."""

    code = "stopped"
    retryable = True

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}", next_step="a new attempt starts from the beginning"
        )
        self.number = number


FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
OS_CODES = {errno.ENOENT: "no-file", errno.EACCES: "permission", errno.EPERM: "permission", errno.EROFS: "permission"}


def describe(error: BaseException, *, job: str, rank: int) -> ErrorRecord:
    """The record of an error; what is not foreseen has the code "unexpected" and its traceback."""
    code, message, path, step, retryable = _facts(error)
    return ErrorRecord(
        job=job,
        code=code,
        message=message,
        path=path,
        frame=error.frame if isinstance(error, KernelError) else None,
        next_step=step,
        retryable=retryable,
        rank=rank,
        host=host_name(),
        traceback="".join(traceback.format_exception(error))[-20000:],
        wall_ns=time.time_ns(),
    )


def _facts(error: BaseException) -> tuple[str, str, str | None, str, bool]:
    if isinstance(error, KernelError):
        return error.code, error.message, error.path, error.next_step, error.retryable
    if isinstance(error, KeyboardInterrupt):
        return _facts(Stopped(signal.SIGINT))
    if isinstance(error, MemoryError):
        return "memory", "not enough memory", None, "start it on a node with more memory, or with more ranks", True
    if isinstance(error, OSError):
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if error.errno in FULL:
            return "no-space", f"the disk is full: {error}", path, "make room; the next attempt starts by itself", True
        code = OS_CODES.get(error.errno or 0, "io")
        return code, str(error), path, "check the file and the mount from this node", code == "io"
    return "unexpected", f"{type(error).__name__}: {error}", None, "a mistake in a plug-in or in mpi_kernels", False


def record(folder: Path, error: ErrorRecord) -> bool:
    """Write ``error.json`` unless it is there; True if this call wrote it."""
    return publish_once(folder / ERROR_FILE, jsonfile.encode(error))


def publish_once(target: Path, data: bytes) -> bool:
    """Publish a file that only its first writer may publish; True for the first.

    A link never replaces what is there.  Where a file system has no links (many SMB mounts) O_EXCL decides instead,
    and a reader may see the file before its bytes.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:
            if not create(target, data):
                return False
    finally:
        temporary.unlink(missing_ok=True)
    jsonfile.sync_folder(target.parent)
    return True


def create(target: Path, data: bytes) -> bool:
    """Create a file with O_EXCL and make it last; False if it is there."""
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk: half a file must not stand for a whole one
        target.unlink(missing_ok=True)
        raise
    jsonfile.sync_folder(target.parent)
    return True


def one_line(error: BaseException) -> str:
    """An error as one line for a terminal or a log."""
    text = str(error) if isinstance(error, KernelError) else f"{type(error).__name__}: {error}"
    return printable(text.replace("\n", " "))
