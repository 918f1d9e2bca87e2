"""``<command id>.emflow.json``: written last beside a commanded scan, it says that the scan is whole."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from emflow.microscope.protocol import SCAN_NAME, Acquired, Command
from mpi_kernels import jsonfile

SUFFIX = ".emflow.json"
LARGEST = 1 << 16
"""Bytes of a note; it lies on a share, where anybody may put anything under its name."""


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the microscope's server says of a scan that it was commanded to make."""

    command: str
    trace: str
    path: str
    kind: str
    scan_shape: tuple[int, ...]
    det_shape: tuple[int, int]
    frames: int
    complete: bool
    v: Literal[1] = 1

    @classmethod
    def of(cls, command: Command, acquired: Acquired) -> Sidecar:
        """The note of a scan that was written to its end."""
        return cls(
            command=command.id,
            trace=command.trace,
            path=acquired.path,
            kind=acquired.kind,
            scan_shape=acquired.scan_shape,
            det_shape=acquired.det_shape,
            frames=acquired.frames,
            complete=True,
        )


def command_of(relpath: bytes) -> str | None:
    """The id of the command that made a file, from its name; None for a file that no command made."""
    found = SCAN_NAME.fullmatch(PurePosixPath(os.fsdecode(relpath)).stem)
    return found["command"] if found else None


def command_of_note(relpath: bytes) -> str | None:
    """The id of the command whose scan a note is of, from the note's name; None for any other file."""
    name = PurePosixPath(os.fsdecode(relpath)).name
    found = SCAN_NAME.fullmatch(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
    return found["command"] if found else None


def sidecar_path(scan: Path) -> Path:
    """Where the note of a scan lies."""
    return scan.with_name(scan.stem + SUFFIX)


def write(folder: Path, sidecar: Sidecar) -> Path:
    """Publish a note beside its scan, whole or not at all; both are on the disk when it appears."""
    scan = folder / sidecar.path
    target = sidecar_path(scan)
    _sync(scan)
    jsonfile.replace(target, msgspec.json.encode(sidecar))
    with contextlib.suppress(OSError):  # there are network file systems on which no folder can be synced
        jsonfile.sync_folder(target.parent)
    return target


def _sync(scan: Path) -> None:
    """Bring data to the disk, whoever wrote them; Windows does so only through a file that is open for writing."""
    fd = os.open(scan, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(scan: Path) -> Sidecar | None:
    """The note beside a scan; None while there is none.

    Raises
    ------
    ValueError
        It is not a note of this version.
    """
    path = sidecar_path(scan)
    try:
        found = path.stat(follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise ValueError(f"no plain file of at most {LARGEST} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return msgspec.json.decode(data, type=Sidecar, strict=True)
