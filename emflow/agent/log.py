"""``log.jsonl``: one line for each thing that an experiment saw, decided, sent and received; only ever appended to.

Each line carries a digest of itself and all lines before it, so that a line that was changed, lost or moved is told.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from emflow.agent.records import Record
from emflow.errors import EmflowError, printable
from mpi_kernels import jsonfile

LOG_FILE = "log.jsonl"


class LogError(EmflowError):
    """The log of an experiment is damaged or was changed."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One record with when it was written: wall clock in ns, and seconds of the experiment's own active time."""

    seq: int
    wall_ns: int
    active_s: float
    record: Record


class _Written(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line as it stands in the file; the record's own bytes are part of the digest."""

    seq: int
    wall_ns: int
    active_s: float
    chain: str
    record: msgspec.Raw


class ExperimentLog:
    """Appends to a log; each call is on the disk when it returns.

    Opening cuts off a last line that was not written to its end: nothing was done because of it.

    Raises
    ------
    LogError
        A whole line is damaged or was changed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder) / LOG_FILE
        new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if new:
                jsonfile.sync_folder(path.parent)
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            self.lines, self._chain = _parsed(data[:whole], path)
            if whole < len(data):
                os.ftruncate(self._fd, whole)
            self._size = whole
        except BaseException:
            os.close(self._fd)
            raise
        self._lock = threading.Lock()
        self.path = path

    def append(self, *records: Record, active_s: float = 0.0) -> None:
        """Write records and wait until the disk has them.

        Raises
        ------
        LogError
            It has not; the log is as it was, and nothing may follow from these records.
        """
        with self._lock:
            data = b""
            added: list[Line] = []
            seq, chain = len(self.lines), self._chain
            for record in records:
                line = Line(seq=seq + len(added), wall_ns=time.time_ns(), active_s=round(active_s, 6), record=record)
                raw = msgspec.json.encode(record)
                chain = _digest(chain, line.seq, line.wall_ns, line.active_s, raw)
                data += _line(line, chain, raw)
                added.append(line)
            try:
                self._write(data)
            except OSError as error:
                os.ftruncate(self._fd, self._size)  # whole lines only, should anything be written after all
                raise LogError(
                    f"{printable(str(self.path))}: what happens can't be written down: {error.strerror}",
                    next_step="Make room, then go on with: emflow agent --experiment ID",
                ) from error
            self.lines += added
            self._chain, self._size = chain, self._size + len(data)

    def _write(self, data: bytes) -> None:
        left = data
        while left:  # a disk that gets full takes a part first
            left = left[os.write(self._fd, left) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def __enter__(self) -> ExperimentLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: str | os.PathLike[str]) -> list[Line]:
    """All whole lines of a log, checked; what is still being written at its end is left out.

    Raises
    ------
    LogError
        A whole line is damaged or was changed; the message names the first one.
    """
    data = Path(path).read_bytes()
    return _parsed(data[: data.rfind(b"\n") + 1], Path(path))[0]


def records_of(lines: Sequence[Line]) -> list[Record]:
    """The records of lines."""
    return [line.record for line in lines]


def _line(line: Line, chain: str, raw: bytes) -> bytes:
    written = _Written(seq=line.seq, wall_ns=line.wall_ns, active_s=line.active_s, chain=chain, record=msgspec.Raw(raw))
    return msgspec.json.encode(written) + b"\n"


def _digest(before: str, seq: int, wall_ns: int, active_s: float, raw: bytes) -> str:
    head = f"{before} {seq} {wall_ns} {active_s!r} ".encode("ascii")
    return hashlib.blake2b(head + raw, digest_size=8).hexdigest()


def _parsed(data: bytes, path: Path) -> tuple[list[Line], str]:
    lines: list[Line] = []
    chain = ""
    for number, text in enumerate(data.split(b"\n")[:-1]):
        where = f"{printable(str(path))}:{number + 1}"
        try:
            written = msgspec.json.decode(text, type=_Written)
            record: Record = msgspec.json.decode(written.record, type=Record)
        except (ValueError, RecursionError) as error:
            raise LogError(f"{where}: no record of an experiment: {printable(str(error))}") from error
        chain = _digest(chain, written.seq, written.wall_ns, written.active_s, bytes(written.record))
        if written.chain != chain or written.seq != number:
            raise LogError(
                f"{where}: this line, or one before it, was changed after it was written",
                next_step="Restore the log from a copy: what it says can't be relied on",
            )
        lines.append(Line(seq=written.seq, wall_ns=written.wall_ns, active_s=written.active_s, record=record))
    return lines, chain
