"""A real service in a folder of its own, as a process, on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emflow.errors import EmflowError
from emflow.journal import Journal
from emflow.records import AcquisitionState

CONFIGURATION = """\
[[watch]]
root = "share"

[scan]
active_s = 0.05
recent_s = 0.1
whole_s = 0.5
settle_s = 0.1
stable_s = 0.3
stall_s = {stall_s}
quarantine_s = {quarantine_s}

[transfer]
min_free = "1 MiB"
stage = "{stage}"

[scheduler]
use = "{scheduler}"
ranks = {ranks}
poll_s = 0.02
attempts = 3
"""


class Place:
    """A configuration, a share and the folders of a service."""

    def __init__(self, folder: Path, **settings: object) -> None:
        values = {"stall_s": 0.6, "quarantine_s": 1.2, "stage": "copy", "scheduler": "null", "ranks": 1} | settings
        self.folder = folder
        self.share = folder / "share"
        self.share.mkdir(parents=True)
        self.toml = folder / "emflow.toml"
        self.toml.write_text(CONFIGURATION.format(**values))

    @property
    def results(self) -> list[Path]:
        return sorted((self.folder / "results").glob("*_emflow.h5"))

    def journal(self) -> Journal:
        return Journal(self.folder / "state" / "journal.sqlite", read_only=True)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "emflow", "-c", str(self.toml), *arguments]

    def emflow(self, *arguments: str, code: int | None = 0, **options: object) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=120, cwd=self.folder, **options
        )
        if code is not None:
            assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, code: int | None = 0) -> dict:
        return json.loads(self.emflow(*arguments, "--json", code=code).stdout)

    def states(self) -> dict[str, AcquisitionState]:
        """State of the newest generation of each file."""
        with self.journal() as journal:
            return {a.name: a.state for a in journal.known("share")}

    def start(self) -> Service:
        return Service(self)


class Service:
    """``emflow run`` as a process."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.log = place.folder / "service.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                place.command("run"), stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.until(self._journal_is_there)

    def _journal_is_there(self) -> bool:
        try:
            self.place.journal().close()
        except EmflowError:
            return False
        return True

    def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait for a condition; the log's end is in the failure."""
        end = time.monotonic() + timeout_s
        while not condition():
            tail = self.log.read_text("utf-8", "replace")[-3000:]
            assert self.process.poll() is None, f"the service ended with {self.process.returncode}\n{tail}"
            assert time.monotonic() < end, f"waited {timeout_s} s for nothing\n{tail}"
            time.sleep(0.02)

    def until_state(self, name: str, *states: AcquisitionState, timeout_s: float = 30.0) -> None:
        def reached() -> bool:
            return self.place.states().get(name) in states

        self.until(reached, timeout_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A service's folder with the null scheduler."""
    return Place(tmp_path / "here")


@pytest.fixture
def make_place(tmp_path: Path) -> Callable[..., Place]:
    """Make service folders with other settings."""
    made: list[Place] = []

    def make(**settings: object) -> Place:
        made.append(Place(tmp_path / f"here{len(made)}", **settings))
        return made[-1]

    return make
