"""Parts of the demonstration as processes of their own, each with its log; none outlives it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from emflow.errors import EmflowError

T = TypeVar("T")

END_S = 15.0
"""How long a part may take to end when it is told to; a service ends its own jobs first."""

LOG_LINES = 5


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One process; what it says on stderr goes to ``log``, on stdout to ``out``."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    out: Path

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.process.poll() is not None


@contextlib.contextmanager
def running(name: str, arguments: Sequence[str], folder: Path, *, end_s: float = END_S) -> Iterator[Part]:
    """``emflow`` with arguments, as a process of this Python that ends with the block, within ``end_s``.

    ``-P``: a folder called emflow where the demonstration is started must not be taken for the package.
    """
    log, out = folder / f"{name}.log", folder / f"{name}.out"
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as errors, out.open("wb") as said, _signals_wait():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "emflow", *arguments],
                stdout=said,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                start_new_session=True,
            )
        yield Part(name=name, process=process, log=log, out=out)
    finally:
        if process is not None:
            end(process, end_s)


def end(process: subprocess.Popen[bytes], end_s: float) -> None:
    """End a process, gently at first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(end_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def alive(parts: Iterable[Part]) -> None:
    """Raise `EmflowError` with the end of its log if a part is over that should not be."""
    for part in parts:
        if part.ended:
            raise broken(f"the {part.name} ended early, with exit code {part.process.returncode}", part)


def wait(look: Callable[[], T | None], parts: Sequence[Part], timeout_s: float, what: str) -> T:
    """Ask until the answer is not None; the last of ``parts`` is the one that is waited for.

    Raises
    ------
    EmflowError
        A part ended, or it took longer than ``timeout_s``.
    """
    until = time.monotonic() + timeout_s
    while (answer := look()) is None:
        alive(parts)
        if time.monotonic() > until:
            raise broken(f"{what} did not happen within {timeout_s:g} s", parts[-1])
        time.sleep(0.02)
    return answer


def broken(what: str, part: Part) -> EmflowError:
    """An error with the end of a part's log in it."""
    said = "\n".join(path.read_text("utf-8", "replace").strip() for path in (part.out, part.log))
    tail = " | ".join(said.strip().splitlines()[-LOG_LINES:]) or "(nothing)"
    return EmflowError(f"{what}; it said: {tail}", next_step="Run emflow demo --keep FOLDER and look there")


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold signals back that would raise: one that comes inside Popen leaves a process that nobody knows of."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for held in came:
        signal.raise_signal(held)
