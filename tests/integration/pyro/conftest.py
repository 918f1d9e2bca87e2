"""A real microscope server as a process of its own, and a way to it that can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emflow.microscope.client import MicroscopeClient
from emflow.microscope.protocol import Command

HERE = Path(__file__).parent
EXPERIMENT = "e0123456789ab"
SETTINGS = """\
[server]
address = "127.0.0.1:{port}"
folder = "share"
state = "memory"
lease_s = {lease_s}
on_lease_lost = "{on_lease_lost}"

[backend]
use = "small_scope:SmallScope"
[backend.parameters]
{parameters}

[limits]
max_dose_e = 1e9
max_total_dose_e = {max_total_dose_e}
max_frames = 65536
max_queue = {max_queue}
step_nm = {{ min = 0.01, max = 10.0 }}
exposure_us = {{ min = 1.0, max = 1e6 }}
dwell_us = {{ min = 1.0, max = 1e6 }}
[limits.controls.C10_nm]
min = -1000.0
max = 1000.0
max_step = 500.0
per_minute = {per_minute}
tolerance = 0.5
[limits.controls.C12a_nm]
min = -1000.0
max = 1000.0
max_step = 500.0
per_minute = 1000
tolerance = 0.5
"""
DEFAULTS = {"port": 0, "lease_s": 5.0, "on_lease_lost": "finish", "max_queue": 8, "per_minute": 1000}


class Scope:
    """A server in a folder of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.share, self.state = folder / "share", folder / "memory"
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        self.pid = 0  # of the server itself, which may be a child of strace
        self.clients: list[MicroscopeClient] = []
        self.configure(**settings)

    def configure(self, **settings: Any) -> None:
        known = DEFAULTS | {"max_total_dose_e": 1e12, "port": self.port}
        parameters = {key: value for key, value in settings.items() if key not in known}
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in parameters.items())
        values = known | {key: value for key, value in settings.items() if key in known}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "microscope.toml").write_text(SETTINGS.format(parameters=lines, **values))

    def environment(self, **more: str) -> dict[str, str]:
        return dict(os.environ) | {"PYTHONPATH": str(HERE)} | more

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "emflow", "microscope", *arguments]

    def start(self, *prefix: str, wait: bool = True, **environment: str) -> Scope:
        with (self.folder / "server.log").open("a") as log:
            self.pid = 0
            self.process = subprocess.Popen(
                [*prefix, *self.command("serve")],
                cwd=self.folder, stdout=log, stderr=log, text=True, env=self.environment(**environment),
            )  # fmt: skip
        if wait:
            self.wait_for_address()
        return self

    def wait_for_address(self) -> bool:
        """Whether it serves; False where it ended."""
        file = self.state / "address.json"
        until = time.monotonic() + 40  # a busy machine, or one under strace
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            try:
                said = json.loads(file.read_text())
                if self.pid_lives(said["pid"]):
                    self.pid = said["pid"]
                    self.port = int(said["address"].rpartition(":")[2])
                    return True
            except (OSError, ValueError):
                pass
            time.sleep(0.01)
        pytest.fail(f"no server: {self.log}")

    def pid_lives(self, pid: int) -> bool:
        """Whether the address is that of the process that runs now (or its child, under strace)."""
        stat = Path(f"/proc/{pid}/stat")
        return pid == self.process.pid or (
            stat.exists() and int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid
        )

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        if self.pid and self.pid_lives(self.pid):
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM, and its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(30)

    def client(self, role: str = "agent", name: str = "one", address: str = "", **options: Any) -> MicroscopeClient:
        client = MicroscopeClient(address or self.address, role=role, name=name, **({"patience_s": 20} | options))
        self.clients.append(client)
        return client

    def done(self, what: str = "acquire") -> list[str]:
        """What the instrument was made to do, in order."""
        lines = (self.state / "backend" / "done.log").read_text().splitlines()
        return [line.removeprefix(f"{what} ") for line in lines if line.startswith(f"{what} ")]

    def emflow(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=30,
        )

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()


class Relay:
    """A TCP relay to a server: `cut` drops every connection and all that comes, `mend` lets it through again."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.is_cut = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                near.close()
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                late = self.is_cut
                self._open |= set() if late else {near, far}
            if late:  # cut while it was being connected
                near.close()
                far.close()
                continue
            for one, other in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(one, other), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        with self._lock:
            self.is_cut = True
            ends, self._open = self._open, set()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def make_scope(tmp_path: Path) -> Iterator[Callable[..., Scope]]:
    """Servers by their settings (not started); all are ended after the test."""
    made: list[Scope] = []

    def make(**settings: Any) -> Scope:
        made.append(Scope(tmp_path / f"scope{len(made)}", **settings))
        return made[-1]

    yield make
    for scope in made:
        scope.close()


@pytest.fixture
def scope(make_scope: Callable[..., Scope]) -> Scope:
    """A server that runs."""
    return make_scope().start()


@pytest.fixture
def relay() -> Iterator[Callable[[int], Relay]]:
    """Relays to a port."""
    made: list[Relay] = []

    def make(port: int) -> Relay:
        made.append(Relay(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def order() -> Callable[..., Command]:
    """Commands by their number."""

    def make(number: int, action: Any, *, epoch: int, decision: int = 0, **facts: Any) -> Command:
        name = f"{EXPERIMENT}-{decision:04d}-{number:02d}"
        return Command(id=name, trace="trace", action=action, epoch=epoch, **({"not_after_s": 1e12} | facts))

    return make
