"""A microscope's server, a service and agents as real processes on one folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emflow.agent.log import read_log
from emflow.agent.progress import Progress
from emflow.agent.records import Decided, Record
from emflow.microscope.client import MicroscopeClient

HERE = Path(__file__).parent
EXPERIMENT = "e0123456789ab"

EMFLOW = """\
[[watch]]
root = "share"
recipe = "{recipe}"

[scan]
active_s = 0.02
recent_s = 0.1
whole_s = 0.5
settle_s = 0.1
stable_s = 0.3

[transfer]
min_free = "1 MiB"

[scheduler]
use = "null"
ranks = 1
poll_s = 0.02

[microscope]
address = "127.0.0.1:{port}"
patience_s = {patience_s}

[agent]
result_timeout_s = {result_timeout_s}
{agent}
"""

MICROSCOPE = """\
[server]
address = "127.0.0.1:{port}"
folder = "share"
state = "microscope-state"
lease_s = 2.0

[backend]
use = "{backend}"

[backend.parameters]
seed = 5
clock = "scan"
time_scale = {time_scale}
detector_shape = [16, 16]
format = "npy"
{parameters}

[limits]
max_dose_e = 1e14
"""

CONTROL = """
[limits.controls.{name}]
min = -1000.0
max = 1000.0
max_step = 2000.0
per_minute = 6000
tolerance = 0.5
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """``emflow ...`` beside the test."""

    def __init__(self, lab: Lab, *arguments: str, log: str) -> None:
        self.log = lab.folder / log
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                lab.command(*arguments), stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=lab.folder, env=lab.env
            )

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not end\n{self.text()[-3000:]}") from None


class Lab:
    """Folders and configurations of one closed loop."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        values = {
            "patience_s": 10.0,
            "result_timeout_s": 20.0,
            "agent": "",
            "time_scale": 0.0,
            "parameters": "",
            "recipe": "quick",
            "backend": "simulated",
            "controls": ("C10_nm",),
        } | settings
        self.folder, self.port = folder, free_port()
        (folder / "share").mkdir(parents=True)
        self.toml = folder / "emflow.toml"
        self.toml.write_text(EMFLOW.format(port=self.port, **values))
        microscope = MICROSCOPE.format(port=self.port, **values)
        (folder / "microscope.toml").write_text(
            microscope + "".join(CONTROL.format(name=n) for n in values["controls"])
        )
        path = os.pathsep.join(p for p in (str(HERE), os.environ.get("PYTHONPATH")) if p)
        self.env = dict(os.environ, PYTHONPATH=path)
        self.processes: list[Process] = []

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def experiment(self, name: str = EXPERIMENT) -> Path:
        return self.folder / "experiments" / name

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "emflow", "-c", str(self.toml), *arguments]

    def start(self, *arguments: str, log: str) -> Process:
        self.processes.append(Process(self, *arguments, log=log))
        return self.processes[-1]

    def microscope(self) -> Process:
        server = self.start("microscope", "serve", log="microscope.log")
        self.until(lambda: "listens" in server.text(), server)
        return server

    def service(self) -> Process:
        service = self.start("run", log="service.log")
        self.until(lambda: "watches" in service.text(), service)
        return service

    def agent(self, *more: str, log: str = "agent.log", policy: str = "stepping:Stepping") -> Process:
        arguments = ("agent", "--policy", policy, "--mode", "auto", "--experiment", EXPERIMENT, *more)
        return self.start(*arguments, log=log)

    def resume(self, log: str = "resumed.log") -> Process:
        return self.start("agent", "--experiment", EXPERIMENT, "--json", log=log)

    def emflow(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=60, cwd=self.folder, env=self.env
        )
        if code is not None:
            assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, code: int | None = 0) -> Any:
        return json.loads(self.emflow(*arguments, "--json", code=code).stdout)

    def client(self) -> MicroscopeClient:
        return MicroscopeClient(f"127.0.0.1:{self.port}", role="operator", name="test", patience_s=5.0)

    def records(self, name: str = EXPERIMENT) -> list[Record]:
        try:
            return [line.record for line in read_log(self.experiment(name) / "log.jsonl")]
        except FileNotFoundError:
            return []

    def progress(self, name: str = EXPERIMENT) -> Progress:
        return Progress(self.records(name))

    def decisions(self, name: str = EXPERIMENT) -> list[Decided]:
        """Decisions but for how long they took."""
        return [taken.decided for taken in self.progress(name).taken]

    def began(self) -> list[str]:
        """Commands that the microscope began, each as often as it did."""
        with self.client() as client:
            events, _ = client.events(0)
        return [e.subject for e in events if e.name == "began"]

    def until(self, condition: Callable[[], Any], process: Process | None = None, timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            tail = process.text()[-3000:] if process else ""
            if process:
                assert process.process.poll() is None, f"ended with {process.process.returncode}\n{tail}"
            assert time.monotonic() < end, f"waited {timeout_s} s for nothing\n{tail}"
            time.sleep(0.02)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.process.poll() is None:
                process.process.kill()
                process.process.wait(10)


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Make folders for closed loops; what runs there ends with the test."""
    made: list[Lab] = []

    def make(**settings: Any) -> Lab:
        made.append(Lab(tmp_path / f"lab{len(made)}", **settings))
        return made[-1]

    yield make
    for lab in made:
        lab.close()


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A running microscope and a running service."""
    made = make_lab()
    made.microscope()
    made.service()
    return made
