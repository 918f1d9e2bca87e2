"""Reads headers in a child process with limits: a file that crashes or hangs its reader costs only the child."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from emflow.errors import Unavailable
from mpi_kernels import jsonfile
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, KernelError, printable

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from emflow.probe_child import main; main(sys.argv[2])"
)
"""``-I`` drops PYTHONPATH and the current folder, so the child is told where the parent found its modules."""

START_S = 60.0
"""How long the child may take to import the readers, on a machine under load."""

STOP_CHECK_S = 0.1

MAX_REPLY = 64 << 20


class ProbeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What reading one header may cost."""

    wall_s: float = 20.0
    cpu_s: int = 20
    memory_bytes: int = 4 << 30


class Growing(NamedTuple):
    """What is known of a file that grows: format, header, where its first frame begins, and bytes of each."""

    format: str
    header: Header
    first: int
    record: int


class Prober:
    """A long-lived child that finds the format of a file; started by the first probe, and again after its death.

    Parameters
    ----------
    formats : mapping of str to str
        Name of each format to try, and its ``module:attr``.
    limits : ProbeLimits
        Per probe; the memory is the child's address space.
    """

    def __init__(self, formats: Mapping[str, str], limits: ProbeLimits | None = None) -> None:
        self._formats = dict(formats)
        self._limits = limits or ProbeLimits()
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child; None where none runs."""
        return None if self._child is None else self._child.process.pid

    def probe(self, path: str, stop: threading.Event | None = None) -> tuple[str, Header]:
        """Name of the format and header of a file; safe from several threads, one at a time.

        Parameters
        ----------
        path : str
            The main file.
        stop : Event, optional
            When it is set, nobody waits for the answer any more.

        Raises
        ------
        KernelError
            What the formats say, by its own class: `Incomplete`, `FormatError`.
        FormatError
            The file crashed its reader, twice, or hung it.
        Unavailable
            The child can't be started, or ``stop`` was set.
        """
        with self._lock:
            reply = self._ask(path, stop or threading.Event())
        if "error" in reply:
            raise _rebuilt(reply)
        return str(reply["format"]), jsonfile.from_plain(Header, reply["header"], path=path)

    def probe_growing(self, path: str, stop: threading.Event | None = None) -> Growing:
        """Header of a file that is still being written; raises what `probe` raises, `Incomplete` while it can't be."""
        with self._lock:
            reply = self._ask({"growing": path}, stop or threading.Event())
        if "error" in reply:
            raise _rebuilt(reply)
        header = jsonfile.from_plain(Header, reply["header"], path=path)
        return Growing(str(reply["format"]), header, int(reply["first"]), int(reply["record"]))

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _ask(self, asked: str | dict[str, str], stop: threading.Event) -> dict[str, Any]:
        death, path = "", asked if isinstance(asked, str) else asked["growing"]
        for _ in range(2):  # the first death may have been somebody else's doing, such as the kernel short of memory
            if self._child is None:
                self._child = _Child(self._formats, self._limits)
            try:
                return self._child.ask(asked, self._limits.wall_s, stop)
            except TimeoutError as error:
                self._end()
                raise FormatError(
                    f"hung the reader: no header within {self._limits.wall_s:g} s, {self._limits.cpu_s} s of them busy",
                    path=path,
                    next_step="Check the file with the program that wrote it; if the share was slow: emflow retry",
                ) from error
            except _Stopped as error:
                self._end()
                raise Unavailable(f"the header of {printable(path)} was not waited for: the service stops") from error
            except _Died as error:
                death = str(error)
                self._end()
        raise FormatError(
            f"crashed the reader ({death})", path=path, next_step="Check the file with the program that wrote it"
        )

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Died(Exception):
    """The child ended without an answer."""


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


class _Child:
    def __init__(self, formats: Mapping[str, str], limits: ProbeLimits) -> None:
        options = json.dumps({"formats": formats, **msgspec.structs.asdict(limits)})
        where = json.dumps([p for p in sys.path if p])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, where, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # Ctrl-C on a terminal reaches the parent only
            bufsize=0,
        )
        try:
            reply = self._reply(START_S, threading.Event())
        except (_Died, TimeoutError) as error:
            self.end()
            raise _cannot_start(str(error)) from error
        if "ready" not in reply:
            self.end()
            raise _cannot_start(str(reply.get("fatal", reply)))

    def ask(self, asked: str | dict[str, str], wall_s: float, stop: threading.Event) -> dict[str, Any]:
        """Send one question, wait for the answer; raises TimeoutError, _Died or _Stopped."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asked).encode("ascii") + b"\n")
        except OSError as error:
            raise self._ended() from error
        return self._reply(wall_s, stop)

    def end(self) -> None:
        """Close the pipes and take the process down."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a read that hangs in the kernel can't be killed
            self.process.wait(1.0)

    def _reply(self, wall_s: float, stop: threading.Event) -> dict[str, Any]:
        line = b"".join(self._until_newline(time.monotonic() + wall_s, stop))
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise _Died("its answer is not JSON") from error
        if not isinstance(reply, dict):
            raise _Died("its answer is not an object")
        return reply

    def _until_newline(self, deadline: float, stop: threading.Event) -> Iterator[bytes]:
        assert self.process.stdout is not None
        fd, size = self.process.stdout.fileno(), 0
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while size < MAX_REPLY:
            left_s = max(0.0, deadline - time.monotonic())
            if not poll.poll(min(left_s, STOP_CHECK_S) * 1e3):
                if stop.is_set():
                    raise _Stopped
                if left_s <= STOP_CHECK_S:
                    raise TimeoutError("no answer")
                continue
            piece = os.read(fd, 1 << 16)
            if not piece:
                raise self._ended()
            yield piece
            if piece.endswith(b"\n"):
                return
            size += len(piece)
        raise _Died("its answer has no end")

    def _ended(self) -> _Died | TimeoutError:
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return _Died("closed its pipe")
        if -code in (signal.SIGXCPU, signal.SIGALRM):
            return TimeoutError("reached its limit of time")
        return _Died(f"signal {-code}" if code < 0 else f"exit code {code}")


def _environment() -> dict[str, str]:
    # One thread each, or address space is reserved for every core; no HDF5 plug-in is loaded on a file's demand.
    # Source: HDF5 "Dynamically Loaded Filters", H5PLset_loading_state; HDF5_PLUGIN_PRELOAD "::" disables it.
    fixed = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    return {**os.environ, **fixed}


def _cannot_start(reason: str) -> Unavailable:
    return Unavailable(
        f"the process that reads file headers does not start: {reason}",
        next_step=f"Try: {sys.executable} -c 'import emflow.probe_child'",
    )


def _rebuilt(reply: Mapping[str, Any]) -> KernelError:
    classes = {c.code: c for c in _tree(KernelError)}
    made = classes.get(str(reply["error"]), KernelError)
    frame, path = reply["frame"], reply["path"]
    return made(str(reply["message"]), path=path, frame=frame, next_step=str(reply["next_step"]))


def _tree(cls: type[KernelError]) -> Iterator[type[KernelError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _tree(below)
