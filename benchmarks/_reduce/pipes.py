"""Processes that stay alive and answer one JSON line for each: the contestants, with nothing warm that others lack."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0


class Broken(RuntimeError):
    """A contestant that does not answer, or says that it can't."""


class Worker:
    """A process with a pipe to it.

    Parameters
    ----------
    command : sequence of str
        The program, which answers each line of its standard input by one on its standard output.
    env : mapping, optional
        Of the process; this one's if left out.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = " ".join(command)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=ROOT, env=env
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Answer to a request as a dictionary; `Broken` where it has an ``error``."""
        answer: dict[str, Any] = json.loads(self.line(json.dumps(request)))
        if "error" in answer:
            raise Broken(answer["error"])
        return answer

    def line(self, request: str) -> str:
        """Send a line and get one back."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(request.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise Broken(self._last_words()) from None
        if not select.select([stdout], [], [], TIMEOUT_S)[0]:
            raise Broken(f"no answer within {TIMEOUT_S:g} s to {request}")
        answer = stdout.readline().decode()
        if not answer:
            raise Broken(self._last_words())
        return answer

    def close(self) -> None:
        """End it: by the end of its input, and if that does not help by a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._process.wait(10)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{self.name} ended with {self._process.returncode}: {lines[-1] if lines else 'it said nothing'}"


def environment(**more: str) -> dict[str, str]:
    """Without the marks of a launcher or a scheduler that this program may have been started by."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "SLURM_", "OMP_"))}
    return kept | more
