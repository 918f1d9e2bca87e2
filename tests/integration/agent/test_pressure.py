"""Back-pressure: an agent holds its next command while too many acquisitions wait, and never for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from emflow import backlog
from emflow.agent import pressure
from emflow.agent.pressure import STALE_S, Pressure
from emflow.backlog import Backlog

EXPERIMENT = "e0123456789ab"


def say(runs: Path, waiting: int, limit: int = 8) -> None:
    runs.mkdir(exist_ok=True)
    backlog.write(runs, Backlog(waiting=waiting, limit=limit, wall_ns=time.time_ns()))


def status(lab) -> dict:
    done = lab.emflow("agent", "status", "--json", code=None)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def test_a_command_waits_for_the_backlog_to_fall(lab) -> None:
    say(lab.runs, 12)
    agent = lab.agent("-p", "results=2", "--json")

    def held() -> bool:
        say(lab.runs, 12)  # the service is there: it writes its file again
        return status(lab).get("state") == "held"

    lab.until(held, agent)
    assert status(lab)["held"] == "backlog 12 > 8"
    assert "held: backlog 12 > 8" in lab.emflow("agent", "status").stdout
    assert lab.began() == []
    say(lab.runs, 8)
    assert agent.wait() == 0, agent.text()
    assert len(lab.progress().seen) == 2
    events = [json.loads(line) for p in lab.experiment().glob("events-*.jsonl") for line in p.read_text().splitlines()]
    assert [e["attrs"] for e in events if e["name"] == "held"] == [{"waiting": 12, "limit": 8}]
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


def test_a_held_experiment_can_be_stopped(lab) -> None:
    say(lab.runs, 12)
    agent = lab.agent("--json")
    lab.until(lambda: status(lab).get("state") == "held", agent)
    lab.emflow("agent", "stop", "-m", "enough")
    assert agent.wait() == 1, agent.text()
    assert lab.progress().ended.ending == "stopped"
    assert lab.began() == []


@pytest.mark.parametrize(
    ("settings", "ending", "word"),
    [
        ({"result_timeout_s": 1.0}, "failed", "held for 1 s: backlog 12 > 8"),
        ({"agent": "max_time_s = 1.0"}, "budget of time", "held: backlog 12 > 8"),
    ],
)
def test_a_hold_ends_with_the_time_for_a_result_or_of_the_experiment(
    make_lab, settings: dict, ending: str, word: str
) -> None:
    lab = make_lab(**settings)
    lab.microscope()
    say(lab.runs, 12)
    agent = lab.agent("--json")
    assert agent.wait() == 1, agent.text()
    assert lab.progress().ended.ending == ending
    assert word in lab.progress().ended.reason
    assert lab.began() == []


def test_a_service_whose_backlog_is_too_large_holds_the_agent_until_it_has_fallen(make_lab) -> None:
    lab = make_lab(agent="\n[caps]\nbacklog = 1\nnode_hours_per_day = 1e-9\n")
    lab.microscope()
    service = lab.service()
    for number in range(3):  # the first job uses up the day's node-hours, and the others wait
        (lab.folder / "share" / f"scan{number}.npy").write_bytes(scan(number))
    lab.until(lambda: (said := backlog.read(lab.runs)) is not None and said.waiting == 2, service)
    agent = lab.agent("--json")
    lab.until(lambda: status(lab).get("state") == "held", agent)
    assert lab.began() == []
    service.end()
    lab.toml.write_text(lab.toml.read_text().replace("node_hours_per_day = 1e-9", ""))
    lab.service()
    assert agent.wait() == 0, agent.text()


def scan(number: int) -> bytes:
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.full((2, 2, 4, 4), number, "uint16"))
    return file.getvalue()


# --- a service that has died


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_file_that_stays_the_same_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pressure, "time", clock)
    say(tmp_path, 12)
    felt = Pressure(tmp_path)
    assert felt.now() is not None
    clock.now += 0.9 * STALE_S
    assert felt.now() is not None
    say(tmp_path, 12)  # with another time: somebody is there
    clock.now += 0.9 * STALE_S
    assert felt.now() is not None
    clock.now += 1.1 * STALE_S
    assert felt.now() is None
    clock.now += 1.0
    assert felt.now() is None  # and not again for the next command
    say(tmp_path, 13)
    assert felt.now() is not None
    say(tmp_path, 8)
    assert felt.now() is None
