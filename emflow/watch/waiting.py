"""The seam between hints and scans: what a hint source says, and waiting without one."""

from __future__ import annotations

import contextlib
import enum
import os
import select
from typing import Final, Protocol, runtime_checkable


class Rescan(enum.Enum):
    """Said instead of folders where anything may have changed."""

    RESCAN = "rescan"


RESCAN: Final = Rescan.RESCAN


@runtime_checkable
class Hints(Protocol):
    """Makes a scan happen sooner; whatever it misses, the scan finds."""

    degraded: str
    """Why there are no live hints, in words for a person; empty if there are, or none were asked for."""

    @property
    def live(self) -> bool:
        """Whether changes are being reported right now."""

    def arm(self) -> None:
        """Begin to listen; what happened before is left to the scans."""

    def wait(self, timeout_s: float) -> frozenset[bytes] | Rescan:
        """Folders, relative to the root, in which something happened; empty after the time-out or a `wake`."""

    def closed(self) -> frozenset[bytes]:
        """Files, relative to the root, that were closed after writing or renamed into place since last asked."""

    def wake(self) -> None:
        """Make `wait` return now; safe from another thread and in a signal handler."""

    def fileno(self) -> int:
        """Descriptor that is readable when `wait` would return something."""

    def close(self) -> None:
        """Stop listening; may be called twice."""


class Waker:
    """A pipe to itself, so that a loop that waits on descriptors can be woken."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._read

    def set(self) -> None:
        """Make it readable; a full pipe is readable already, and after `close` nobody waits."""
        if self._write >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._write, b"!")

    def clear(self) -> bool:
        """Make it wait again; True if it was set."""
        was_set = False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 4096):
                was_set = True
        return was_set

    def close(self) -> None:
        """Give both ends back."""
        for fd in (self._read, self._write):
            if fd >= 0:
                os.close(fd)
        self._read = self._write = -1


class NoHints:
    """Nothing is known between scans: waits, and can be woken."""

    live = False

    def __init__(self, degraded: str = "") -> None:
        self.degraded = degraded
        self._waker = Waker()

    def arm(self) -> None:
        """There is nothing to listen to."""

    def wait(self, timeout_s: float) -> frozenset[bytes] | Rescan:
        """Wait for the time-out or a `wake`; returns the empty set."""
        poll = select.poll()
        poll.register(self._waker.fileno(), select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1e3)
        self._waker.clear()
        return frozenset()

    def closed(self) -> frozenset[bytes]:
        """No file is known to be closed."""
        return frozenset()

    def wake(self) -> None:
        """Make `wait` return now."""
        self._waker.set()

    def fileno(self) -> int:
        """Readable after `wake`."""
        return self._waker.fileno()

    def close(self) -> None:
        """Give the pipe back."""
        self._waker.close()
