"""The server's events: a file of its own in the state folder, and the newest in memory for who asks."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from mpi_kernels.contract import Event
from mpi_kernels.errors import KernelError
from mpi_kernels.events import EventLog, read_events

KEPT = 5000
"""Events in memory."""
AT_ONCE, CHARACTERS = 500, 100_000
"""Events of one reply, and of their texts: well below the size of a message, even at ten bytes a character."""

_log = logging.getLogger("emflow.microscope")


class Happenings:
    """Events with numbers that go on rising over restarts; safe from any thread.

    Parameters
    ----------
    folder : Path
        The server's state folder.
    """

    def __init__(self, folder: Path) -> None:
        older = sorted(folder.glob("events-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        self._changed = threading.Condition()
        self._next = sum(path.read_bytes().count(b"\n") for path in older)
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        for path in older[-3:]:  # who was cut off by the last restart asks on from there
            try:
                self._kept.extend(_raw(event) for event in read_events(path))
            except KernelError as error:
                _log.warning("older events are left out: %s", error)
        self._log = EventLog(folder, "control", "", "")

    def write(self, name: str, subject: str, trace: str, **attrs: Any) -> None:
        """Note that something happened; a full disk costs the line in the file, nothing else."""
        with self._changed:
            try:
                event = self._log.write(name, subject=subject, trace=trace, **attrs)
            except OSError as error:
                _log.warning("event %s can't be written: %s", name, error.strerror)
                return
            self._kept.append(_raw(event))
            self._next += 1
            self._changed.notify_all()

    def after(self, number: int, wait_s: float) -> tuple[list[dict[str, Any]], int]:
        """Events from ``number`` on, at most `AT_ONCE`, and the number to ask with next; waits for one."""
        until = time.monotonic() + wait_s
        with self._changed:
            if number > self._next:  # another server's, whose folder is gone
                number = 0
            while number >= self._next and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            first = self._next - len(self._kept)
            start = max(number, first) - first
            found: list[dict[str, Any]] = []
            size = 0
            for event in itertools.islice(self._kept, start, start + AT_ONCE):
                size += len(str(event))
                if found and size > CHARACTERS:
                    break
                found.append(event)
            return found, first + start + len(found)

    def close(self) -> None:
        """Give the file back."""
        with self._changed:
            self._log.close()


def _raw(event: Event) -> dict[str, Any]:
    return dataclasses.asdict(event)
