"""The secret that a pool and its clients share: made once, in one file that nobody else may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from emflow.errors import NotAllowed, printable
from emflow.schedulers.pool_folder import PoolFolder
from mpi_kernels.jsonfile import sync_folder
from mpi_kernels.pool.errors import WrongSecret
from mpi_kernels.pool.records import read_secret

SECRET_FILE = "secret"  # noqa: S105  the name of the file
SECRET_BYTES = 32
"""As long as the digest of HMAC-SHA-256: a shorter key is weaker, a longer one gains nothing.  Source: RFC 2104, 3."""


def make_secret(folder: Path) -> Path:
    """The secret of a pool folder, made if it is not there; it has its mode from the first moment on.

    Raises
    ------
    NotAllowed
        Others may read it, it is another user's, or it is no secret of ours.
    """
    path = folder / SECRET_FILE
    if not path.exists():
        PoolFolder(folder).make()
        _create(path, secrets.token_hex(SECRET_BYTES).encode())
    try:
        read_secret(path)
    except WrongSecret as error:
        raise NotAllowed(str(error)) from error
    except OSError as error:
        step = "Remove it, and start the pools again: a new one is made"
        raise NotAllowed(f"{printable(str(path))}: {error.strerror}", next_step=step) from error
    return path


def _create(path: Path, data: bytes) -> None:
    """Write it whole under another name first: whoever finds the file finds all of it, and the first one counts."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _write(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            try:
                _write(path, data)
            except FileExistsError:
                return
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
