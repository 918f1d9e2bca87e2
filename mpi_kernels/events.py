"""Events as lines of JSON: one file per host and process, only ever appended to."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mpi_kernels import jsonfile
from mpi_kernels.contract import Event

Plane = Literal["data", "control", "management"]


def host_name() -> str:
    """Name of the host, safe as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()).lstrip(".") or "host"


class EventLog:
    """Appends events to ``events-<host>-<pid>.jsonl``; one write each, so that lines of one file never mix.

    Parameters
    ----------
    folder : path-like
        Usually a run folder.
    plane, trace, subject : str
        Of every event that does not say otherwise.
    """

    def __init__(self, folder: str | os.PathLike[str], plane: Plane, trace: str, subject: str) -> None:
        self._plane: Plane = plane
        self._trace, self._subject = trace, subject
        self._host, self._pid = host_name(), os.getpid()
        self.path = Path(folder) / f"events-{self._host}-{self._pid}.jsonl"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # what Unix and Windows have
        self._fd = os.open(self.path, flags, 0o644)
        # a process id can come back on the same host: go on counting, so that (host, pid, seq) stays unique
        before = self.path.read_bytes()
        self._seq = before.count(b"\n")
        self._torn = bool(before) and not before.endswith(b"\n")

    def write(self, name: str, *, subject: str | None = None, trace: str | None = None, **attrs: Any) -> Event:
        """Append one event; ``attrs`` are what JSON knows."""
        event = Event(
            trace=self._trace if trace is None else trace,
            subject=self._subject if subject is None else subject,
            plane=self._plane,
            host=self._host,
            pid=self._pid,
            seq=self._seq,
            name=name,
            wall_ns=time.time_ns(),
            mono_ns=time.monotonic_ns(),
            attrs=attrs,
        )
        line = (b"\n" if self._torn else b"") + jsonfile.encode(event) + b"\n"
        self._seq += 1
        written = os.write(self._fd, line)
        self._torn = written < len(line)  # a full disk cuts a line; the next one starts afresh
        return event

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | os.PathLike[str]) -> Iterator[Event]:
    """Events of one file, in order.

    A last line without its newline is still being written (or was cut off by a crash) and is left out, and so is a
    line that a full disk has cut.  A whole line that is no event raises `FormatError`.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        yield jsonfile.from_plain(Event, value, path=path)
