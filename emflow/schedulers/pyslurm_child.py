"""The process that has pyslurm in it, so that Slurm's library can only hang or end this process.

The library ends the whole process where it finds no slurm.conf, holds Python's lock while a controller does not answer
(10 s), and what is loaded after it is linked differently; pyslurm itself is GPL-2.0.  So nothing else of emflow is in
here, and this is the one file that imports pyslurm.

Started by `emflow.schedulers.pyslurm_library` as ``python -I -c START SYS_PATH``; one JSON object a line on both pipes.
The environment is the one that Slurm's commands get: pyslurm would give a job every ``SLURM_*`` that is set in here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

FORGOTTEN = 2017  # ESLURM_INVALID_JOB_ID
ENDED = 2021  # ESLURM_ALREADY_DONE
"""Source: slurm_errno.h, releases 22.05 to 26.05."""


def main() -> None:
    """Answer questions until the pipe closes."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the library prints must not get among the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    _send(replies, _versions())
    nothing = os.open(
        os.devnull, os.O_WRONLY
    )  # errors come back as numbers; nobody reads what the library says of them
    os.dup2(nothing, 2)
    for line in sys.stdin.buffer:
        _send(replies, _answer(json.loads(line)))


def _versions() -> dict[str, Any]:
    try:
        import pyslurm
    except ImportError as error:
        return {"missing": str(error)}
    try:
        return {"pyslurm": pyslurm.__version__, "cluster": pyslurm.slurmctld.Config.load().version}
    except pyslurm.RPCError as error:
        return {"errno": error.errno, "text": str(error)}


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    import pyslurm

    try:
        return {"answer": _ACTIONS[request["do"]](request)}
    except pyslurm.RPCError as error:
        return {"errno": error.errno, "text": str(error)}
    except (ValueError, AttributeError, TypeError) as error:  # pyslurm's way to refuse a field or its value
        return {"wrong": str(error)}


def _submit(request: Mapping[str, Any]) -> int:
    import pyslurm

    umask = os.umask(0o077)
    os.umask(umask)
    # sbatch says it like this; otherwise results would get the mode bits of slurmd's umask
    environment = {**request["environment"], "SLURM_UMASK": f"{umask:04o}"}
    return int(pyslurm.JobSubmitDescription(**request["fields"], environment=environment).submit())


def _jobs(request: Mapping[str, Any]) -> list[list[Any]]:
    """Jobs of our user: all with these names, or those with these ids that are still known."""
    import pyslurm

    if "names" in request:
        names = set(request["names"])
        ours = (job for job in pyslurm.Jobs.load().values() if job.user_id == os.getuid())
        return [_row(job) for job in ours if _name(job) in names]
    found = []
    for one in request["ids"]:
        try:
            job = pyslurm.Job.load(one)
        except pyslurm.RPCError as error:
            if error.errno != FORGOTTEN:
                raise
            continue
        if job.user_id == os.getuid() and _name(job):
            found.append(_row(job))
    return found


def _name(job: Any) -> str:
    try:
        return job.name or ""
    except UnicodeDecodeError:  # somebody may have called a job anything; ours are plain
        return ""


def _row(job: Any) -> list[Any]:
    nodes = job.num_nodes or 0
    return [str(job.id), job.name, job.state, nodes, job.run_time or 0, job.allocated_nodes or "", job.state_reason]


def _cancel(request: Mapping[str, Any]) -> None:
    import pyslurm

    for one in request["ids"]:
        try:
            pyslurm.Job(one).cancel()
        except pyslurm.RPCError as error:
            if error.errno not in (FORGOTTEN, ENDED):
                raise


_ACTIONS: Mapping[str, Callable[[Mapping[str, Any]], object]] = {"submit": _submit, "jobs": _jobs, "cancel": _cancel}


def _send(pipe: BinaryIO, reply: Mapping[str, Any] | Iterable[Any]) -> None:
    pipe.write(json.dumps(reply).encode("ascii") + b"\n")
