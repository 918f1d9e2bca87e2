"""The server's memory: ``answers.jsonl``, one line for each intent, answer, epoch and STOP; only ever appended to.

A line is on the disk (fsync) before anything follows from it: the intent before the instrument moves, the answer before
anybody hears it.  A crash can leave the last line torn; it is cut off, since nothing can have followed from it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from emflow.errors import JournalError, printable
from emflow.microscope.protocol import Action, Command, Outcome, Receipt
from mpi_kernels import jsonfile

FILE = "answers.jsonl"
RECENT_NS = 60 * 10**9


class Intent(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", tag="intent"):
    """A command is begun now; ``doses_e`` are the electrons that its actions will take."""

    command: Command
    doses_e: tuple[float, ...]
    before: dict[str, float]
    admitted_ns: int
    began_ns: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", tag="answer"):
    """What became of a command; ``action`` is the digest of what it asked for."""

    receipt: Receipt
    action: str


class Epoch(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", tag="epoch"):
    """An epoch of the lease was given to somebody."""

    epoch: int
    role: str
    holder: str
    wall_ns: int


class Latch(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", tag="latch"):
    """STOP was pressed or released."""

    stopped: bool
    reason: str
    wall_ns: int


Line = Intent | Answer | Epoch | Latch


def digest_of(action: Action) -> str:
    """The same for the same action, whatever it is sent with."""
    return hashlib.sha256(msgspec.json.encode(action, order="deterministic")).hexdigest()[:32]


class Answers:
    """The file, and where each answer stands in it; safe from any thread.

    Parameters
    ----------
    folder : Path
        The server's state folder, on a local disk.

    Attributes
    ----------
    open_intents : dict
        Begun when the last server ended, without an answer.
    recent : list
        What was begun within the minute before this start.
    epoch : int
        The last one that was given.
    latch : Latch
        Whether STOP is pressed, and why.
    spent_e : float
        Electrons of all answers.

    Raises
    ------
    JournalError
        A line in the middle can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.open_intents: dict[str, Intent] = {}
        self.recent: list[Intent] = []
        self.epoch = 0
        self.latch = Latch(stopped=False, reason="", wall_ns=0)
        self.spent_e = 0.0
        self._index: dict[str, int] = {}
        self._torn = False
        self._writing, self._reading = threading.Lock(), threading.Lock()  # who reads never waits for an fsync
        new = not self.path.exists()
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._size = self._recover()
            if new:
                jsonfile.sync_folder(folder)
            self._read = self.path.open("rb")
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Line) -> None:
        """Write one line; it is on the disk when this returns.  OSError leaves the file as it was."""
        data = msgspec.json.encode(line) + b"\n"
        with self._writing:
            if self._torn:
                self._cut()
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:]) or 0
                os.fsync(self._file.fileno())
            except OSError:
                self._torn = True
                self._cut()
                raise
            self._note(line, self._size)
            self._size += len(data)

    def _cut(self) -> None:
        """Take away what a full disk has left of a line; while that fails too, nothing may follow it."""
        self._file.truncate(self._size)
        self._torn = False

    def find(self, command: str) -> Answer | None:
        """The answer that a command got; None: none."""
        offset = self._index.get(command)
        if offset is None:
            return None
        with self._reading:
            self._read.seek(offset)
            return msgspec.json.decode(self._read.readline(), type=Answer)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
        self._read.close()

    def _recover(self) -> int:
        end, since_ns = 0, time.time_ns() - RECENT_NS
        for number, (offset, data) in enumerate(_lines(self.path), 1):
            if not data.endswith(b"\n"):
                self._file.truncate(offset)
                os.fsync(self._file.fileno())
                break
            try:
                line = msgspec.json.decode(data, type=Line)
            except msgspec.DecodeError as error:
                raise JournalError(
                    f"{printable(str(self.path))}:{number}: not a line of the microscope's memory ({error})",
                    next_step="Without it a command could be executed twice: look at the line before it is taken away",
                ) from None
            self._note(line, offset)
            if isinstance(line, Intent) and line.began_ns > since_ns:
                self.recent.append(line)
            end = offset + len(data)
        return end

    def _note(self, line: Line, offset: int) -> None:
        if isinstance(line, Intent):
            self.open_intents[line.command.id] = line
        elif isinstance(line, Answer):
            self._index[line.receipt.command] = offset
            self.open_intents.pop(line.receipt.command, None)
            self.spent_e += line.receipt.dose_e
        elif isinstance(line, Epoch):
            self.epoch = max(self.epoch, line.epoch)
        else:
            self.latch = line


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for data in file:
            yield offset, data
            offset += len(data)


def refused(command: str, code: str, reason: str, **facts: Any) -> Receipt:
    """The receipt of a command that was not executed."""
    return Receipt(command=command, outcome=Outcome.REFUSED, code=code, reason=reason, **facts)
