"""Files from outside: opened read-only, sized, and read in bounded pieces; every failure is one of our errors."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpi_kernels.contract import Member
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat, printable

SIDECAR_LIMIT = 4 << 20
"""Bytes of the largest sidecar that is read; real ones hold a few kB."""

MAX_FRAME_BYTES = 1 << 30
MAX_FRAMES = 1 << 40
"""What no detector reaches; a damaged header that claims more is refused before anything is allocated."""

MAX_TABLE = 1 << 26
"""Records of a file whose place has to be kept one by one: 512 MiB of offsets."""

_NEVER = {
    errno.ENOENT: "check that the file was not moved or deleted",
    errno.EACCES: "give the account that runs emflow read permission",
    errno.EPERM: "give the account that runs emflow read permission",
    errno.ELOOP: "remove the link: it points to itself",
    errno.ENOTDIR: "check the path",
    errno.ENAMETOOLONG: "shorten the file's name",
}


def from_os(error: OSError, path: str) -> FormatError | Incomplete:
    """The operating system's refusal as ours: lasting ones are `FormatError`, those of a share or a lock `Incomplete`.

    EBUSY and ETXTBSY are what a CIFS mount returns while Windows holds the file open without sharing
    (STATUS_SHARING_VIOLATION).  Source: Linux fs/smb/client/smb2maperror.c.
    """
    reason = error.strerror or str(error)
    if error.errno in _NEVER:
        if error.errno == errno.ENOENT and Path(path).is_symlink():
            target = printable(str(Path(path).readlink()))
            return FormatError(
                f"it is a link to {target}, which is not there", path=path, next_step="restore the target"
            )
        return FormatError(f"can't be read: {reason}", path=path, next_step=_NEVER[error.errno])
    return Incomplete(f"can't be read now: {reason}", path=path, next_step="check the share; emflow asks again")


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn every OSError of the block into one of our errors that names the file."""
    try:
        yield
    except OSError as error:
        raise from_os(error, path) from error
    except ValueError as error:  # a NUL byte inside a path
        if "null" not in str(error):
            raise
        raise FormatError("its name holds a NUL byte", path=path, next_step="rename the file") from error


def size_of(path: str) -> int:
    """Bytes of a regular file that may be read.

    Raises
    ------
    FormatError
        A folder, a device, a broken link, a missing file, no permission.
    Incomplete
        Nothing is in it yet, or the share does not answer.
    """
    with os_errors(path):
        facts = os.stat(path)  # noqa: PTH116 - a str path keeps names that are not UTF-8 as they are
    if stat.S_ISDIR(facts.st_mode):
        raise FormatError("it is a folder", path=path, next_step="name a file inside it")
    if not stat.S_ISREG(facts.st_mode):
        raise FormatError("it is not a regular file", path=path, next_step="name a file that holds data")
    with os_errors(path):
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # permission to read is more than permission to stat
    if facts.st_size == 0:
        raise Incomplete("the file is empty", path=path, next_step="wait until the detector has written it")
    return facts.st_size


def read_at(path: str, offset: int, count: int) -> bytes:
    """At most ``count`` bytes from ``offset``; fewer only at the end of the file."""
    with os_errors(path), Path(path).open("rb", buffering=0) as file:
        pieces = []
        while count > 0 and (piece := os.pread(file.fileno(), count, offset)):
            pieces.append(piece)
            offset, count = offset + len(piece), count - len(piece)
    return b"".join(pieces)


def read_exactly(path: str, offset: int, count: int, what: str) -> bytes:
    """``count`` bytes from ``offset``; `Incomplete` if the file ends before, named by ``what`` they are."""
    data = read_at(path, offset, count)
    if len(data) < count:
        raise Incomplete(
            f"{len(data)} of {count} bytes of {what} are there", path=path, next_step="wait for the writer"
        )
    return data


def sibling(path: str, suffix: str) -> str | None:
    """The file with the same stem and another suffix, in lower, upper or the given case; None if there is none."""
    stem = os.path.splitext(path)[0]  # noqa: PTH122
    for candidate in dict.fromkeys((stem + suffix, stem + suffix.lower(), stem + suffix.upper())):
        if candidate != path and os.path.isfile(candidate):  # noqa: PTH113
            return candidate
    return None


def read_sidecar(path: str) -> bytes:
    """All of a small file; `Incomplete` while it is empty."""
    size = size_of(path)
    if size > SIDECAR_LIMIT:
        raise FormatError(
            f"the sidecar has {size} bytes, more than the {SIDECAR_LIMIT} that any real one needs",
            path=path,
            next_step="remove it or write it anew",
        )
    return read_at(path, 0, size)


def json_object(path: str) -> dict[str, Any]:
    """A JSON sidecar that must be one object; cut off in the middle it is `Incomplete`."""
    data = read_sidecar(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if not data.rstrip().endswith(b"}"):
            raise Incomplete(f"not whole yet: {error}", path=path, next_step="wait until it is written") from error
        raise FormatError(f"not JSON: {error}", path=path, next_step="write the sidecar anew") from error
    if not isinstance(value, dict):
        raise FormatError("expected a JSON object", path=path, next_step='write {"shape": ..., "dtype": ...}')
    return value


def member(path: str, suffix: str) -> Member:
    """The record of one file of an acquisition."""
    return Member(path=path, suffix=suffix, size=size_of(path))


def check_caps(path: str, frames: int, frame_bytes: int) -> None:
    """Refuse sizes that only a damaged header can claim."""
    if not 0 < frames <= MAX_FRAMES or not 0 < frame_bytes <= MAX_FRAME_BYTES:
        raise FormatError(
            f"its header claims {frames} frames of {frame_bytes} bytes, which can't be",
            path=path,
            next_step=f"frames may have 1 to {MAX_FRAME_BYTES} bytes; copy the file again from the microscope",
        )


def check_table(path: str, records: int) -> None:
    """Refuse a table of offsets that would fill the memory."""
    if records > MAX_TABLE:
        raise FormatError(
            f"{records} records would have to be listed one by one; at most {MAX_TABLE} are",
            path=path,
            next_step="check its header: frames of a few bytes are a sign of damage",
        )


def expect_size(path: str, size: int, start: int, frame_bytes: int, frames: int, *, growing: bool = False) -> None:
    """Hold a file against the exact size ``start + frames * frame_bytes``; one that is ``growing`` may have less.

    Raises
    ------
    Incomplete
        Bytes are missing; says how many whole frames are there.
    FormatError
        More bytes than frames: the header and the file do not belong together.
    """
    wanted = start + frames * frame_bytes
    if size < wanted and not growing:
        whole = max(0, size - start) // frame_bytes
        raise Incomplete(
            f"{whole} of {frames} frames are there ({size} of {wanted} bytes)",
            path=path,
            frame=whole,
            next_step="wait for the writer, or copy the file again",
        )
    if size > wanted:
        raise FormatError(
            f"it has {size - wanted} bytes more than the {wanted} that its {frames} frames need",
            path=path,
            next_step="check that header, sidecar and data belong to one acquisition",
        )


def starts_like(head: bytes, magic: bytes, path: str, what: str) -> None:
    """Check magic bytes; a shorter file that starts like them is `Incomplete`, any other `NotThisFormat`."""
    if head.startswith(magic):
        return
    if head and magic.startswith(head):
        raise Incomplete(f"only {len(head)} bytes of a {what} file are there", path=path, next_step="wait")
    raise NotThisFormat(f"not a {what} file: it does not start with {magic!r}", path=path)
