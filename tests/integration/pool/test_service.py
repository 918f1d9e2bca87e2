"""``emflow run`` and ``emflow pool`` as processes: scans go through pools, and services are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emflow.config import load
from emflow.journal import Journal
from emflow.records import AcquisitionState, JobState
from emflow.schedulers.pool_folder import PoolFolder
from emflow.schedulers.pool_setup import end_pools

pytestmark = pytest.mark.needs_mpi

CONFIGURATION = """\
[[watch]]
root = "share"

[scan]
active_s = 0.05
recent_s = 0.1
whole_s = 0.5
settle_s = 0.1
stable_s = 0.3

[transfer]
min_free = "1 MiB"

[scheduler]
use = "pool"
ranks = 2
poll_s = 0.02
max_active = 4

[pool]
launcher = "mpiexec"
walltime_s = 300
"""


class Place:
    """A share, a configuration and the folders of a service."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.share = folder, folder / "share"
        self.share.mkdir(parents=True)
        self.toml = folder / "emflow.toml"
        self.toml.write_text(CONFIGURATION)
        self.config = load(self.toml)
        self.pools = PoolFolder(self.config.pool.folder)
        self._services: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "emflow", "-c", str(self.toml), *arguments]

    def emflow(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=50, cwd=self.folder, check=False
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.emflow(*arguments, "--json", code=code).stdout)

    def service(self) -> subprocess.Popen[bytes]:
        with (self.folder / "service.log").open("ab") as out:
            process = subprocess.Popen(
                self.command("run"), stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._services.append(process)
        return process

    def scans(self, first: int, last: int) -> None:
        for number in range(first, last):
            np.save(
                self.share / f"scan{number}.npy", np.arange(60 * 40, dtype=np.uint16).reshape(3, 4, 10, 20) + number
            )

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 40.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} after {seconds:g} s\n{self.log()}"
            time.sleep(0.05)
        return found

    def log(self) -> str:
        path = self.folder / "service.log"
        return path.read_text("utf-8", "replace")[-3000:] if path.exists() else ""

    def done(self) -> int:
        """Acquisitions that are DONE."""
        if not (self.folder / "state" / "journal.sqlite").exists():
            return 0
        with Journal(self.folder / "state" / "journal.sqlite", read_only=True) as journal:
            return len(journal.acquisitions({AcquisitionState.DONE}))

    def ready(self) -> bool:
        """Whether a pool says that it takes tasks."""
        return any((self.pools.of(name) / "endpoint.json").exists() for name in self.pools.open_names())

    def jobs(self) -> list[Any]:
        with Journal(self.folder / "state" / "journal.sqlite", read_only=True) as journal:
            return [job for acquisition in journal.acquisitions() for job in journal.jobs(acquisition.id)]

    def close(self) -> None:
        for process in self._services:
            if process.poll() is None:
                process.terminate()
            process.wait(20)
        assert end_pools(self.config)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "here")
    yield made
    made.close()


def told(line: dict[str, Any]) -> tuple[str, str, int]:
    return line["name"], line["state"], line["done"]


def test_scans_go_through_a_pool_and_a_killed_service_is_taken_over_from(place: Place) -> None:
    service = place.service()
    place.until(place.ready, "no pool")
    place.scans(0, 6)
    place.until(lambda: place.done() >= 1, "nothing is done")
    os.kill(service.pid, signal.SIGKILL)
    service.wait(20)
    place.scans(6, 9)
    again = place.service()
    place.until(lambda: place.done() == 9, "not all are done")
    again.send_signal(signal.SIGTERM)
    assert again.wait(20) == 143
    jobs = place.jobs()
    assert [job.state for job in jobs] == [JobState.REDUCED] * 9, jobs
    (pool,) = place.pools.names()
    assert all(job.scheduler_id == f"pool:{pool}/{job.name}" for job in jobs)
    assert len(list((place.folder / "results").glob("*.h5"))) == 9
    # its heartbeat may be a second old
    place.until(
        lambda: [told(line) for line in place.json("pool", "status")["pools"]] == [(pool, "idle", 9)], "not idle"
    )


def test_a_service_without_a_pool_does_its_work_and_says_so(place: Place) -> None:
    place.pools.hold(True)
    place.scans(0, 2)
    place.emflow("run", "--once")
    assert place.done() == 2
    assert all(job.scheduler_id.startswith("local:") for job in place.jobs())
    assert place.pools.names() == []
    done = place.emflow("status")
    assert "DONE" in done.stdout


def test_pools_are_started_once_by_whoever_starts_them(place: Place) -> None:
    """Two commands and a service at the same time: as many pools as are wanted, and no more."""
    commands = [subprocess.Popen(place.command("pool", "start"), stdout=subprocess.DEVNULL) for _ in range(2)]
    place.service()
    assert [command.wait(40) for command in commands] == [0, 0]
    place.until(place.ready, "no pool")
    assert len(place.pools.names()) == 1
    said = place.json("pool", "start", "--count", "2", "--wait")
    assert (len(said["started"]), len(said["there"])) == (1, 1)
    assert len(place.pools.names()) == 2


def test_the_commands_from_start_to_stop(place: Place) -> None:
    assert place.json("pool", "status", code=69)["pools"] == []
    assert not (place.folder / "pool" / "secret").exists(), "looking makes nothing"
    assert "started 2" in place.emflow("pool", "start", "--wait").stdout
    (name,) = place.pools.names()
    assert "none is missing" in place.emflow("pool", "start").stdout
    told = place.emflow("pool", "status").stdout
    assert name in told
    assert "idle" in told
    assert "1 of 1 pools, 0.0" in told
    assert "no pool is called" in place.emflow("pool", "drain", "other", code=2).stderr
    assert place.json("pool", "drain", name) == {"draining": [name]}
    place.until(lambda: "told to drain" in place.emflow("pool", "status", code=69).stdout, "still there")
    assert place.json("pool", "status", code=69)["pools"] == []
    place.emflow("pool", "start", "--wait")
    second = place.pools.names()[-1]
    assert place.json("pool", "stop") == {"stopped": [second]}
    assert place.pools.held
    assert "none is started until emflow pool start" in place.emflow("pool", "status", code=69).stdout
    assert place.json("pool", "stop") == {"stopped": []}


@pytest.mark.slow
def test_stop_waits_for_what_runs_and_then_ends_it(place: Place) -> None:
    """A pool that hangs can't finish: it is ended after the time that it was given."""
    place.emflow("pool", "start", "--wait")
    (name,) = place.pools.names()
    launched = place.pools.launched(name)
    assert launched is not None
    leader = int(launched.scheduler_id.partition("@")[0])
    ranks = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and int(p.name) != leader and launched.scheduler_id.encode() in environment(p)
    ]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert place.json("pool", "stop", "--timeout", "2") == {"stopped": [name]}
    assert time.monotonic() - begin >= 2.0
    assert place.pools.open_names() == []
    assert not [pid for pid in ranks if launched.scheduler_id.encode() in environment(Path(f"/proc/{pid}"))]


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""
