"""Processes by an identity that outlives them: pid, start time and boot, so that a pid used again is nobody we know.

A job is the family of its first process: who bears that identity in the environment, or is in the session that it
began.  Neither process groups nor sessions are enough: MPICH's hydra gives its proxy and each rank a session of its
own, and when mpiexec is killed they have another parent.

Source: proc_pid_stat(5), fields session (6) and starttime (22); proc_pid_environ(5); credentials(7) on sessions.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ID = re.compile(r"(?P<pid>[1-9][0-9]{0,9})@(?P<ticks>[0-9]{1,20})@(?P<boot>[0-9a-f]{8})")
_STEP_S = 0.02

MARK = "EMFLOW_SCHEDULER_ID"
"""Environment variable in which a job bears the identity of its first process."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one boot of this machine; as text ``<pid>@<start in clock ticks since boot>@<boot>``."""

    pid: int
    ticks: int
    boot: str

    def __str__(self) -> str:
        return f"{self.pid}@{self.ticks}@{self.boot}"

    @property
    def present(self) -> bool:
        """Whether it still holds its pid, as a zombie does too."""
        now = _stat(self.pid)
        return now is not None and now.ticks == self.ticks and self.boot == boot()

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        now = _stat(self.pid)
        return now is not None and now.alive and now.ticks == self.ticks and self.boot == boot()


def parse(text: str) -> Process | None:
    """The process that a text names, or None if it names none."""
    match = _ID.fullmatch(text)
    return None if match is None else Process(int(match["pid"]), int(match["ticks"]), match["boot"])


def identify(pid: int) -> Process | None:
    """The identity of a running process or zombie."""
    now = _stat(pid)
    return None if now is None else Process(pid, now.ticks, boot())


@functools.cache
def boot() -> str:
    """First 8 hex digits of the random id that the kernel makes at each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]


def family(leaders: Iterable[Process]) -> set[Process]:
    """Living processes of the jobs that began with ``leaders``, dead or alive, on this boot."""
    ours = [leader for leader in leaders if leader.boot == boot()]
    if not ours:
        return set()
    marks = {f"{MARK}={leader}".encode() for leader in ours}
    sessions = {leader.pid for leader in ours if leader.present}
    return {
        Process(pid, now.ticks, boot())
        for pid, now in _all()
        if now.alive and (now.session in sessions or not marks.isdisjoint(_environment(pid)))
    }


def end(leaders: Collection[Process], grace_s: float) -> None:
    """End whole jobs: SIGTERM, and SIGKILL after ``grace_s`` for who is left."""
    if not _signal(leaders, signal.SIGTERM, grace_s):
        kill(leaders, grace_s)


def kill(leaders: Collection[Process], seconds: float) -> None:
    """End whole jobs at once; one that the kernel does not let go within ``seconds`` (a hung mount) is left to it."""
    _signal(leaders, signal.SIGKILL, seconds)


def _signal(leaders: Collection[Process], number: signal.Signals, seconds: float) -> bool:
    """Signal each member once, those too that are born meanwhile; whether all have gone in time."""
    until = time.monotonic() + seconds
    told: set[Process] = set()
    # one that is just ending has lost its environment, by which the family is known, before it has gone
    while members := family(leaders) | {member for member in told if member.alive}:
        for member in members - told:
            send(member, number)
        told |= members
        if time.monotonic() > until:
            return False
        time.sleep(_STEP_S)
    return True


def send(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process, or nobody."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process.alive:  # asked after the handle is held, so that it can't become another one in between
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class _Stat:
    alive: bool
    session: int
    ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    return _Stat(alive=fields[0] not in "ZXx", session=int(fields[3]), ticks=int(fields[19]))


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has gone, or is another user's
        return []


def _all() -> Iterator[tuple[int, _Stat]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (now := _stat(int(entry.name))) is not None:
            yield int(entry.name), now
