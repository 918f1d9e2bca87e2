"""The process that reads headers of files from outside, so that a hostile one can only end this process.

Started by `emflow.prober` as ``python -I -c START SYS_PATH OPTIONS``; one JSON object a line on both pipes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from mpi_kernels.errors import FormatError, Incomplete, KernelError
from mpi_kernels.formats.choose import choose
from mpi_kernels.plugins import make_format
from mpi_kernels.protocols import Format, GrowingFormat

GRACE_S = 2.0
"""The parent's deadline comes first; this one ends a child whose parent is gone."""


def main(options: str) -> None:
    """Answer probes until the pipe closes; ``options`` is the JSON of formats and limits."""
    chosen = json.loads(options)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a reader prints must not get among the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    try:
        formats = {name: make_format(target) for name, target in chosen["formats"].items()}
    except KernelError as error:
        _send(replies, {"fatal": str(error)})
        return
    _limit(chosen["memory_bytes"])
    _send(replies, {"ready": os.getpid()})
    for line in sys.stdin.buffer:
        _start_clocks(chosen["wall_s"], chosen["cpu_s"])
        asked = json.loads(line)
        _send(replies, _growing(asked["growing"], formats) if isinstance(asked, dict) else _answer(asked, formats))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # a probe writes nothing; pipes are not counted


def _start_clocks(wall_s: float, cpu_s: int) -> None:
    signal.setitimer(signal.ITIMER_REAL, wall_s + GRACE_S)
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_s + 1, resource.RLIM_INFINITY))


def _growing(path: str, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The header of a file that is still being written, and where its frames will lie."""
    later: KernelError = FormatError("no format of this name can be read while it grows", path=path)
    for name, form in formats.items():
        if not isinstance(form, GrowingFormat) or not any(path.lower().endswith(s) for s in form.suffixes):
            continue
        try:
            source = form.open_growing(path)
        except KernelError as error:
            later = error if isinstance(error, Incomplete) or not isinstance(later, Incomplete) else later
            continue
        except Exception as error:  # noqa: BLE001 - as in `_answer`
            return _refused(FormatError(f"its reader failed: {type(error).__name__}: {error}", path=path))
        layout = source.layout
        source.close()
        if layout is None or layout.codec or layout.offsets is not None or layout.record_frames != 1:
            return _refused(Incomplete("its frames do not lie one after the other", path=path))
        where = {"first": layout.first, "record": layout.record}
        return {"format": name, "header": dataclasses.asdict(source.header), **where}
    return _refused(later)


def _answer(path: str, formats: Mapping[str, Format]) -> dict[str, Any]:
    try:
        name, header = choose(path, formats)
        reply = {"format": name, "header": dataclasses.asdict(header)}
        json.dumps(reply)  # what can't be sent is the reader's mistake as well
    except KernelError as error:
        return _refused(error)
    except OSError as error:
        return _refused(Incomplete(f"can't be read now: {error.strerror}", path=path))
    except MemoryError:
        return _refused(FormatError("reading its header takes more memory than a probe may use", path=path))
    except Exception as error:  # noqa: BLE001 - a reader's bug is a fact about the file, told with its name
        return _refused(FormatError(f"its reader failed: {type(error).__name__}: {error}", path=path))
    return reply


def _refused(error: KernelError) -> dict[str, Any]:
    facts = {"message": error.message, "path": error.path, "frame": error.frame, "next_step": error.next_step}
    return {"error": error.code, **facts}


def _send(pipe: BinaryIO, reply: Mapping[str, Any]) -> None:
    pipe.write(json.dumps(reply).encode("ascii") + b"\n")
