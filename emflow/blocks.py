"""Files in blocks: opened without following links, read with patience, written whole; every refusal explained."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emflow.errors import EmflowError, NoSpace, NotAllowed, SourceChanged, Unavailable
from emflow.records import Fingerprint
from mpi_kernels.errors import printable
from mpi_kernels.jsonfile import sync_folder as _sync_folder

BLOCK = 64 << 10
"""Bytes per read and write: larger writes make ext4 allocate larger folios, which cost up to twice the system time
where memory is fragmented (1 GiB on a busy machine, median of 7: 64 KiB 0.70 s, 256 KiB 1.21 s, cp 0.85 s)."""

WRITE_OUT = 32 << 20
"""Bytes after which the kernel is told to begin writing, so that the disk works during the copy, not after it."""

BACKOFF_S = (0.1, 0.5)
"""Pauses before the second and the third try of a read that failed with EIO."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2)


class Stopped(EmflowError):
    """A copy was asked to stop; what was copied is kept and continued the next time."""

    retryable = True


class SyncLost(EmflowError):
    """The kernel could not write what it had accepted; those pages are gone."""


# --- refusals explained ---


def source_error(error: OSError, path: bytes) -> EmflowError:
    """What an operating system error on the source means for the acquisition."""
    name, reason = printable(os.fsdecode(path)), error.strerror or str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return SourceChanged(f"{name} is gone")
    if error.errno == errno.ELOOP:
        return NotAllowed(f"{name} is behind a symbolic link; emflow does not follow links on a share")
    if error.errno in _REFUSED:
        return NotAllowed(
            f"{name} can't be read: {reason}", next_step=f"Give the account with uid {os.geteuid()} the right to read"
        )
    return Unavailable(f"{name} can't be read: {reason}", next_step="Check the share; emflow tries again")


def target_error(error: OSError, path: bytes) -> EmflowError:
    """What an operating system error on the copy means."""
    name, reason = printable(os.fsdecode(path)), error.strerror or str(error)
    if error.errno in _FULL:
        return NoSpace(f"{name} can't be written: {reason}", next_step="Make room; emflow goes on by itself")
    if error.errno in _REFUSED or error.errno == errno.EROFS:
        return NotAllowed(
            f"{name} can't be written: {reason}", next_step=f"Give the account with uid {os.geteuid()} the right to"
        )
    return Unavailable(f"{name} can't be written: {reason}", next_step="Check the disk; emflow tries again")


@contextmanager
def target_errors(path: bytes) -> Iterator[None]:
    """Explain every OSError of the block as one of the copy."""
    try:
        yield
    except OSError as error:
        raise target_error(error, path) from error


# --- the source ---


def fingerprint(facts: os.stat_result) -> Fingerprint:
    """The part of a stat that changes whenever a file is written."""
    return Fingerprint(size=facts.st_size, mtime_ns=facts.st_mtime_ns, ctime_ns=facts.st_ctime_ns)


def fingerprint_of(path: bytes) -> Fingerprint:
    """Stat a source without following a link; explains what goes wrong."""
    try:
        return fingerprint(os.lstat(path))
    except OSError as error:
        raise source_error(error, path) from error


@contextmanager
def opened(path: bytes, relpath: bytes = b"") -> Iterator[int]:
    """A descriptor of a regular file, read-only; no link is followed in ``relpath``, the part inside the share."""
    try:
        fd = _open_inside(path, relpath)
    except OSError as error:
        raise source_error(error, path) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotAllowed(f"{printable(os.fsdecode(path))} is not a file; emflow reads files only")
        yield fd
    finally:
        os.close(fd)


def _open_inside(path: bytes, relpath: bytes) -> int:
    # O_NONBLOCK: opening a FIFO that lies where a file should be must not wait for its writer
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    inside = relpath if relpath and path.endswith(b"/" + relpath) else os.path.basename(path)  # noqa: PTH119
    *folders, name = inside.split(b"/")
    here = os.open(path[: len(path) - len(inside)] or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=here)
    finally:
        os.close(here)


def blocks(
    fd: int, path: bytes, start: int, stop_at: int, stop: threading.Event | None = None
) -> Iterator[memoryview[int]]:
    """Bytes ``start`` to ``stop_at`` of a file; each view is valid until the next one is asked for.

    Raises
    ------
    SourceChanged
        The file has become shorter.
    Stopped
        ``stop`` was set.
    EmflowError
        Bytes can't be read, with the offset: EIO three times, or none although the file claims to have them.
    """
    buffer = memoryview(bytearray(min(BLOCK, max(1, stop_at - start))))
    os.posix_fadvise(fd, start, 0, os.POSIX_FADV_SEQUENTIAL)
    at = start
    while at < stop_at:
        if stop is not None and stop.is_set():
            raise Stopped(f"the copy of {printable(os.fsdecode(path))} was stopped at byte {at}")
        count = _read(fd, path, buffer[: stop_at - at], at, stop)
        if count == 0:
            size = os.fstat(fd).st_size
            name = printable(os.fsdecode(path))
            if size < stop_at:
                raise SourceChanged(f"{name} was cut to {size} of {stop_at} bytes while it was read")
            raise EmflowError(f"{name}: no bytes at offset {at} of {size}", next_step="Check the share's disk")
        yield buffer[:count]
        at += count


def _read(fd: int, path: bytes, view: memoryview[int], at: int, stop: threading.Event | None) -> int:
    for pause_s in (*BACKOFF_S, None):
        try:
            return os.preadv(fd, [view], at)
        except OSError as error:
            if error.errno != errno.EIO:
                raise source_error(error, path) from error
            if pause_s is None:
                raise EmflowError(
                    f"{printable(os.fsdecode(path))}: {error.strerror} at offset {at}, three times",
                    next_step="Check the share's disk and the network, then: emflow retry",
                ) from error
        (stop.wait if stop is not None else time.sleep)(pause_s)
    raise AssertionError


# --- the copy ---


def writer(fd: int, path: bytes, start: int) -> Callable[[memoryview[int]], None]:
    """A function that appends a block to a file from ``start`` on, and has the disk begin with it in time."""
    at = told = start

    def write(block: memoryview[int]) -> None:
        nonlocal at, told
        with target_errors(path):
            while block:
                count = os.pwrite(fd, block, at)
                block = block[count:]
                at += count
        if at - told >= WRITE_OUT:
            _begin_writing(fd, told, at - told)
            told = at

    return write


def sync(fd: int, path: bytes) -> None:
    """Make a file survive a power cut.

    Raises
    ------
    SyncLost
        EIO: the kernel has dropped the pages, so a second fsync would succeed without them.
        Source: Rebello et al. 2020, "Can Applications Recover from fsync Failures?", USENIX ATC.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno == errno.EIO:
            raise SyncLost(f"{printable(os.fsdecode(path))}: {error.strerror} on fsync") from error
        raise target_error(error, path) from error


def sync_folder(folder: bytes) -> None:
    """Make renames in a folder survive a power cut, where its file system knows that."""
    try:
        _sync_folder(os.fsdecode(folder))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # FUSE and old CIFS mounts
            raise target_error(error, folder) from error


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except AttributeError:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    made: Callable[[int, int, int, int], int] = function
    return made


def _begin_writing(fd: int, start: int, count: int) -> None:
    function = _sync_file_range()
    if function is not None:
        function(fd, start, count, _SYNC_FILE_RANGE_WRITE)  # its errors come again, from fsync
