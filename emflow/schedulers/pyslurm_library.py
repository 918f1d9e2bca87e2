"""Slurm through pyslurm: the questions of `emflow.schedulers.slurm_commands`, without a process for each.

pyslurm is in one process of its own (`emflow.schedulers.pyslurm_child`), started by the first question and again after
its death.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emflow.errors import SubmitError, Unavailable, printable
from emflow.schedulers import slurm_commands
from emflow.schedulers.pyslurm_fields import directives, fields, variables
from emflow.schedulers.slurm_rows import Row

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from emflow.schedulers.pyslurm_child import main; main()"
)
"""``-I`` drops PYTHONPATH and the current folder, so the child is told where the parent found its modules."""

START_S = 40.0
ASK_S = 30.0
"""The library itself gives up 10 s (MessageTimeout) after a controller stopped answering."""

ONE_BY_ONE = 4
"""Up to so many jobs are asked for by id, which takes 0.4 ms of a core each; all jobs of a cluster take 15 us each, and
on a large one there are thousands of others' (measured: 1,000 in 16 ms; squeue 19 ms)."""

USE_COMMANDS = 'set [scheduler] use = "slurm"'
_WITHOUT = '[scheduler] use = "slurm" does without it'
_INSTALL = "pip install 'pyslurm=={release}.*' with the headers of the site's Slurm (SLURM_INCLUDE_DIR, SLURM_LIB_DIR)"


class Library:
    """What `emflow.schedulers.slurm.SlurmScheduler` asks Slurm, answered by pyslurm."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._ids: dict[str, set[int]] = {}
        self._doubtful: set[str] = set()

    def versions(self) -> str:
        """Which pyslurm and which Slurm work together.

        Raises
        ------
        Unavailable
            pyslurm is not installed, belongs to another Slurm than the cluster's, or finds no cluster.
        """
        child = _start()
        try:
            return _matching(child)
        finally:
            _end(child)

    def submit(self, flags: Sequence[str], script: Path, folder: Path, env: Mapping[str, str]) -> str:
        """Send a job once, and return its id; raises as `slurm_commands.submit` does."""
        asked = fields((*directives(script), *flags))
        asked |= {"script": str(script), "script_args": [str(folder)]}
        name = str(asked.get("name"))
        try:
            reply = self._ask({"do": "submit", "fields": asked, "environment": {**variables(asked), **env}})
        except Unavailable:
            self._doubtful.add(name)
            raise
        if "answer" in reply:
            self._ids.setdefault(name, set()).add(int(reply["answer"]))
            return str(reply["answer"])
        if "wrong" in reply:
            raise SubmitError(f"pyslurm refuses the job: {printable(reply['wrong'])}", next_step=f"Or {USE_COMMANDS}")
        said = f"{printable(reply['text'])} (error {reply['errno']})"
        if setting := slurm_commands.refused(said):
            raise SubmitError(f"Slurm refuses the job: {said}", next_step=f"Look at {setting}")
        self._doubtful.add(name)
        step = "Slurm is asked for the job's name before it is sent again"
        raise SubmitError(f"pyslurm could not send the job: {said}", transient=True, next_step=step)

    def listed(self, names: Iterable[str]) -> list[Row]:
        """Our jobs with these names that Slurm's controller remembers, ended ones too."""
        wanted = set(names)
        ids = {one for name in wanted for one in self._ids.get(name, ())}
        # after a doubt there may be a job whose id nobody was told
        if len(ids) > ONE_BY_ONE or not wanted <= self._ids.keys() - self._doubtful:
            rows = self._rows({"do": "jobs", "names": sorted(wanted)})
            for row in rows:
                self._ids.setdefault(row.name, set()).add(int(row.id))
            return rows
        return [row for row in self._rows({"do": "jobs", "ids": sorted(ids)}) if row.name in wanted]

    def named(self, ids: Sequence[str]) -> list[Row]:
        """Our jobs with these ids, as far as the controller remembers."""
        return self._rows({"do": "jobs", "ids": [int(one) for one in ids]})

    def accounted(self, names: Iterable[str]) -> list[Row] | None:
        """As `slurm_commands.accounted`: pyslurm's own way to the accounting asks for all jobs of all users."""
        return slurm_commands.accounted(names)

    def cancel(self, ids: Sequence[str]) -> None:
        """Tell Slurm to end jobs; that they are unknown or have ended is no error."""
        self._answered({"do": "cancel", "ids": [int(one) for one in ids]})

    def close(self) -> None:
        """End the child; jobs go on."""
        child, self._child = self._child, None
        if child is not None:
            _end(child)

    def _rows(self, request: Mapping[str, Any]) -> list[Row]:
        return [
            Row(job, name, state, int(nodes), float(elapsed), node, reason or "None")
            for job, name, state, nodes, elapsed, node, reason in self._answered(request)
        ]

    def _answered(self, request: Mapping[str, Any]) -> Any:
        reply = self._ask(request)
        if "answer" not in reply:
            raise _no_answer(reply)
        return reply["answer"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._child is None:
            child = _start()
            try:
                _matching(child)
            except Unavailable:
                _end(child)
                raise
            self._child = child
        child = self._child
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            return _reply(child, ASK_S)
        except (OSError, EOFError, ValueError) as error:
            death = _death(child, error)
            self.close()
            raise Unavailable(f"pyslurm gave no answer: {death}", next_step=f"Or {USE_COMMANDS}") from error


def _start() -> subprocess.Popen[bytes]:
    environment = slurm_commands.environment()
    named = environment.get("SLURM_CONF")
    if named and not Path(named).is_file():  # the library would look for it for a minute
        raise Unavailable(f"SLURM_CONF names no file: {printable(named)}", next_step="Correct or unset SLURM_CONF")
    where = json.dumps([path for path in sys.path if path])
    return subprocess.Popen(
        [sys.executable, "-I", "-c", START, where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C on a terminal reaches the parent only
        bufsize=0,
    )


def _matching(child: subprocess.Popen[bytes]) -> str:
    """What a child that was just started says of itself, if it can work with the cluster."""
    try:
        reply = _reply(child, START_S)
    except (OSError, EOFError, ValueError) as error:
        raise Unavailable(
            f"pyslurm does not start: {_death(child, error)}", next_step=f"See SLURM_CONF, or {USE_COMMANDS}"
        ) from error
    if "missing" in reply:
        found = printable(reply["missing"])
        step = f"Install it: {_INSTALL.format(release='<release>')}"
        raise Unavailable(f"pyslurm can't be imported ({found}); {_WITHOUT}", next_step=step)
    if "errno" in reply:
        raise _no_answer(reply)
    if _release(reply["pyslurm"]) != _release(reply["cluster"]):
        pair = f"pyslurm {reply['pyslurm']} does not belong to the cluster's Slurm {reply['cluster']}"
        step = f"Install the one that does: {_INSTALL.format(release=_release(reply['cluster']))}"
        raise Unavailable(f"{pair}; {_WITHOUT}", next_step=step)
    return f"pyslurm {reply['pyslurm']}, Slurm {reply['cluster']}"


def _release(version: str) -> str:
    """``26.5`` of ``26.05.3``: what Slurm's and pyslurm's releases have in common."""
    return ".".join(str(int(part)) if part.isdigit() else part for part in version.split(".")[:2])


def _reply(child: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
    assert child.stdout is not None
    fd, end, line = child.stdout.fileno(), time.monotonic() + timeout_s, b""
    while not line.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError(f"nothing within {timeout_s:g} s")
        piece = os.read(fd, 1 << 16)
        if not piece:
            raise EOFError("it has ended")
        line += piece
    reply = json.loads(line)
    assert isinstance(reply, dict)
    return reply


def _no_answer(reply: Mapping[str, Any]) -> Unavailable:
    said = reply.get("text", reply.get("wrong", reply))
    return Unavailable(
        f"Slurm did not answer pyslurm: {printable(str(said))} (error {reply.get('errno')})",
        next_step="Is slurmctld well? See scontrol ping",
    )


def _death(child: subprocess.Popen[bytes], error: Exception) -> str:
    """How a child ended, with the last that it said, which is what Slurm's library ends a process with."""
    if isinstance(error, TimeoutError):
        return str(error)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)
    said = b""
    if child.stderr is not None and not child.stderr.closed and select.select([child.stderr], [], [], 0)[0]:
        said = os.read(child.stderr.fileno(), 1 << 16)
    lines = said.decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return printable(last)[:300] or f"exit status {child.returncode}"


def _end(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
    child.kill()
    child.wait()
