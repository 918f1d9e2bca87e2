"""One file on its way: a temporary that can be continued, the digest in the same pass, fsync, rename."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from emflow.blocks import SyncLost, blocks, fingerprint, fingerprint_of, opened, sync, target_errors, writer
from emflow.errors import EmflowError, NoSpace, SourceChanged
from emflow.records import Fingerprint
from mpi_kernels.errors import printable

Progress = Callable[[int, int], None]
"""Told ``(done, total)`` bytes: first what earlier attempts left, then after every block."""


class Told:
    """Counts for the caller."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, count: int) -> None:
        """Add bytes; fewer than none where some have to be copied again."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(slots=True)
class Copy:
    """One file on its way."""

    source: bytes
    relpath: bytes
    suffix: str
    folder: bytes
    name: str
    before: Fingerprint

    @classmethod
    def plan(cls, source: bytes, relpath: bytes, folder: bytes, name: str, suffix: str) -> Copy:
        """Stat the source; ``name`` is that of the copy."""
        return cls(source, relpath, suffix, folder, name, fingerprint_of(source))

    @property
    def final(self) -> bytes:
        """Path of the copy."""
        return os.path.join(self.folder, os.fsencode(self.name))  # noqa: PTH118

    def temporary(self, attempt: int) -> bytes:
        """Carries what has to be equal for the copy to be continued."""
        b = self.before
        key = f"{b.size}-{b.mtime_ns}-{b.ctime_ns}-{_boot_id()}"
        return os.path.join(self.folder, os.fsencode(f".{self.name}.{key}.{attempt}.part"))  # noqa: PTH118

    def missing(self) -> int:
        """Bytes that are still to be written."""
        begun = _stat(self.temporary(0))
        return max(0, self.before.size - (begun.st_size if begun else 0))

    def check_source(self) -> None:
        """Raise `SourceChanged` unless the file under the source's name is as it was."""
        check_same(fingerprint_of(self.source), self.before, self.source)

    def make(self, told: Told, stop: threading.Event | None) -> str:
        """The digest of the file that then lies under its final name.

        What lies there already is replaced: whether it is of these bytes, size and time can't tell.
        """
        for attempt in (0, 1):
            temporary = self.temporary(attempt)
            try:
                return self._write(temporary, told, stop)
            except SyncLost:  # what the kernel dropped must come from the source again, into another file
                remove(temporary)
                told(-self.before.size)
            except (SourceChanged, NoSpace):
                remove(temporary)
                raise
        raise EmflowError(
            f"{printable(os.fsdecode(self.final))}: fsync failed with EIO twice, the disk loses data",
            next_step="Check the disk of the run folders (dmesg), then: emflow retry",
        )

    def _write(self, temporary: bytes, told: Told, stop: threading.Event | None) -> str:
        with opened(self.source, self.relpath) as fd, created(temporary, self.before.size) as out:
            check_same(fingerprint(os.fstat(fd)), self.before, self.source)
            there = os.fstat(out).st_size
            digest = xxhash.xxh3_128()
            for block in blocks(out, temporary, 0, there, stop):
                digest.update(block)
            told(there)
            write = writer(out, temporary, there)
            for block in blocks(fd, self.source, there, self.before.size, stop):
                digest.update(block)
                write(block)
                told(len(block))
            sync(out, temporary)
            check_same(fingerprint(os.fstat(fd)), self.before, self.source)
        self.check_source()
        with target_errors(self.final):
            os.replace(temporary, self.final)  # noqa: PTH105
        return digest.hexdigest()


@contextlib.contextmanager
def created(path: bytes, size: int) -> Iterator[int]:
    """A descriptor of a temporary, which keeps its content unless that is longer than ``size``."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with target_errors(path):
        fd = os.open(path, flags, 0o644)
    try:
        if os.fstat(fd).st_size > size:
            os.truncate(fd, 0)
        yield fd
    finally:
        os.close(fd)


def digest_blocks(pieces: Iterable[memoryview[int]], told: Told) -> str:
    """XXH3-128 of all pieces, 32 hex digits."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
        told(len(piece))
    return digest.hexdigest()


def check_same(now: Fingerprint, before: Fingerprint, path: bytes) -> None:
    """Raise `SourceChanged` unless a file is as it was."""
    if now != before:
        how = f"from {before.size} to {now.size} bytes" if now.size != before.size else "its times"
        raise SourceChanged(f"{printable(os.fsdecode(path))} changed while it was read ({how})")


def remove_stale(folder: bytes, acquisition: str, keep: set[bytes]) -> None:
    """Remove what earlier attempts left and nobody can continue."""
    begin = f".{acquisition}".encode()
    with os.scandir(folder) as entries:
        stale = [e.path for e in entries if e.name.startswith(begin) and e.name.endswith(b".part")]
    for path in stale:
        if path not in keep:
            remove(path)


def _stat(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def remove(path: bytes) -> None:
    """Unlink a temporary; one that stays is found as stale the next time."""
    with contextlib.suppress(OSError):
        os.unlink(path)  # noqa: PTH108


@functools.cache
def _boot_id() -> str:
    """One word per start of the machine; where there is none, nothing is continued by another process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    except OSError:
        return secrets.token_hex(16)
