"""A copy of a file that is still being written: what is appended there is appended here, and digested on the way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import xxhash

from emflow.blocks import blocks, fingerprint_of, opened, sync, sync_folder, target_errors, writer
from emflow.copying import created, remove
from emflow.errors import EmflowError, NoSpace, SourceChanged
from emflow.records import Transfer
from emflow.transfer import MemberFiles, digest_of, free_bytes, joint_digest
from mpi_kernels.errors import printable

LOOK_S = 0.05
"""Between two looks at the file's size."""

TELL_S = 0.1
"""Shortest time between two words of how many frames are there: each is a file of its own."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where whole frames end: the first begins at ``first``, each takes ``record`` bytes, there will be ``frames``."""

    first: int
    record: int
    frames: int

    def whole(self, size: int) -> int:
        """Whole frames in so many bytes."""
        return max(0, min(self.frames, (size - self.first) // self.record))


@dataclass(slots=True)
class GrowingCopy:
    """The copy of one acquisition, made by a thread of its own until it is told to stop.

    Parameters
    ----------
    members : sequence of (path, path inside the share, suffix)
        The main file first, which grows; the others are copied once.
    folder : Path
        Where the copies go, as ``<acquisition><suffix>``.
    acquisition : str
        Its id.
    grid : Grid
        Where its frames lie.
    min_free : int
        Bytes that stay free on the disk of the copies.
    tell : callable
        Told how many whole frames are there, a number that rises, in the copy's thread.
    """

    members: MemberFiles
    folder: Path
    acquisition: str
    grid: Grid
    min_free: int
    tell: Callable[[int], None]
    failed: str = ""
    """Why it does not go on; the acquisition is then copied when it is whole."""
    frames: int = 0
    _size: int = 0
    _digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """The main file's copy."""
        return self.folder / f"{self.acquisition}{self.members[0][2]}"

    def start(self) -> None:
        """Copy the smaller files, and begin with the one that grows."""
        for path, relpath, suffix in self.members[1:]:
            self._small(os.fsencode(path), relpath, os.fsencode(self.folder / f"{self.acquisition}{suffix}"))
        with target_errors(os.fsencode(self.path)):
            self.path.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._run, name=f"live {self.acquisition}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is copied stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def finished(self, members: MemberFiles) -> Transfer | None:
        """The transfer, once the writer is done; None where the copy is not what lies on the share now.

        The share's files are read once more: a writer may have gone back to what was copied before.

        Parameters
        ----------
        members : sequence of (path, path inside the share, suffix)
            The acquisition's files, now that it is whole.
        """
        self.stop()
        started = time.monotonic()
        if not self.failed and [suffix for _, _, suffix in members] != [suffix for _, _, suffix in self.members]:
            self.failed = "it has other files than when it began"
        if self.failed:
            return None
        try:
            self._catch_up(None)
            with created(os.fsencode(self.path), self._size) as out:
                self._check_left(out)
                sync(out, os.fsencode(self.path))
            sync_folder(os.fsencode(self.folder))
            copies = [(self.folder / f"{self.acquisition}{suffix}", b"", suffix) for _, _, suffix in self.members[1:]]
            digests = [self._digest.hexdigest(), *(m.xxh3_128 for m in (digest_of(copies).members if copies else ()))]
            read = digest_of(members)
        except (SourceChanged, NoSpace) as error:
            self.failed = str(error)
            return None
        if read.digest != joint_digest(digests):
            self.failed = "what was written first has been changed since"
            return None
        return msgspec.structs.replace(read, path=str(self.path), seconds=time.monotonic() - started)

    def _run(self) -> None:
        told_at = -TELL_S
        try:
            while not self._stop.is_set():
                self._catch_up(self._stop)
                frames, now = self.grid.whole(self._size), time.monotonic()
                if frames > self.frames and now - told_at >= TELL_S:
                    self.frames, told_at = frames, now
                    self.tell(frames)
                self._stop.wait(LOOK_S)
        except (EmflowError, OSError) as error:
            if not self._stop.is_set():
                self.failed = printable(str(error))

    def _catch_up(self, stop: threading.Event | None) -> None:
        """Copy what was appended since the last time."""
        source, relpath, _ = self.members[0]
        path, target = os.fsencode(source), os.fsencode(self.path)
        size = fingerprint_of(path).size
        if size < self._size:
            raise SourceChanged(f"{printable(os.fsdecode(path))} was cut from {self._size} to {size} bytes")
        if size == self._size:
            return
        if free_bytes(self.folder) - (size - self._size) < self.min_free:
            raise NoSpace(f"no room for {size - self._size} more bytes of {printable(os.fsdecode(path))}")
        with opened(path, relpath) as fd, created(target, self._size) as out:
            self._check_left(out)
            write = writer(out, target, self._size)
            for block in blocks(fd, path, self._size, size, stop):
                self._digest.update(block)
                write(block)
                self._size += len(block)

    def _check_left(self, out: int) -> None:
        """Raise unless the copy is as long as what was written to it."""
        if os.fstat(out).st_size != self._size:
            raise SourceChanged(f"the copy {printable(str(self.path))} is not as it was left")

    def _small(self, path: bytes, relpath: bytes, target: bytes) -> None:
        remove(target)
        with opened(path, relpath) as fd, created(target, 1 << 62) as out:
            write = writer(out, target, 0)
            for block in blocks(fd, path, 0, os.fstat(fd).st_size):
                write(block)
            sync(out, target)
