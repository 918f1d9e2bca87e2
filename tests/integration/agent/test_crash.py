"""kill -9 of agent, service and microscope: each command executed once, and the experiment ends as undisturbed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from emflow.agent.records import Received
from emflow.microscope.protocol import Mode

EXPERIMENT = "e0123456789ab"
AGENT = ("agent", "--policy", "stepping:Stepping", "-p", "results=2", "--mode", "auto", "--experiment", EXPERIMENT)


def outcome(lab) -> list[bytes]:
    """All that must not depend on a crash: decisions with what they rest on, and the answers' values."""
    told = []
    for taken in lab.progress().taken:
        told.append(msgspec.json.encode((taken.decided.decision, taken.decided.commands, taken.decided.settings)))
        told += [msgspec.json.encode((r.command, r.outcome, r.after, r.acquired)) for r in taken.receipts.values()]
    return told


def traced(lab, *options: str) -> int:
    """Run the agent under strace, with its threads; the exit code."""
    log = lab.folder / "strace.log"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", str(log), *options, "--", *lab.command(*AGENT)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=lab.folder,
        env=lab.env,
    )
    return done.returncode


def started(make_lab: Callable[..., object]):
    lab = make_lab()
    lab.microscope()
    lab.service()
    return lab


def calls(lab, name: str) -> int:
    """How often the busiest thread made a call: that is the one that runs the experiment."""
    found = re.findall(rf"^(\d+) +{name}\(", (lab.folder / "strace.log").read_text(), re.MULTILINE)
    return max(Counter(found).values(), default=0)


def sweep(make_lab: Callable[..., object], name: str) -> int:
    undisturbed = started(make_lab)
    assert traced(undisturbed, "-e", f"trace={name}") == 0
    expected, sent = outcome(undisturbed), undisturbed.began()
    total = calls(undisturbed, name)
    undisturbed.close()
    for n in range(1, total + 1):
        lab = started(make_lab)
        code = traced(lab, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={n}")
        assert code in (-9, 137), f"the kill at {name} {n} did not fire: {code}"
        before = len(lab.records())
        # before its first line is written there is nothing to go on with: it is started again
        again = lab.start(*AGENT, "--json", log="again.log") if before == 0 else lab.resume("again.log")
        if before and lab.progress().ended:
            assert again.wait() == 2, again.text()
        else:
            assert again.wait() == 0, f"{name} {n}: {again.text()}"
            assert json.loads(again.text().splitlines()[-1])["ending"] == "target"
        assert lab.began() == sent, f"{name} {n}"
        assert outcome(lab) == expected, f"{name} {n}"
        lab.close()
    return total


@pytest.mark.needs_strace
@pytest.mark.timeout(600)
def test_killed_at_every_line_of_the_log(make_lab) -> None:
    # each line of the log is one fsync of the thread that runs the experiment
    assert sweep(make_lab, "fsync") >= 10


@pytest.mark.slow
@pytest.mark.needs_strace
@pytest.mark.timeout(900)
def test_killed_at_every_write(make_lab) -> None:
    # the events `sent` and `received` are one write each, just before and after a command is executed
    assert sweep(make_lab, "write") >= 20


@pytest.mark.parametrize("what", ["before the scan", "in the scan", "while it waits"])
def test_killed_while_the_microscope_works(make_lab, what: str) -> None:
    """The lease runs out or is taken again; the scan is made once."""
    lab = make_lab(time_scale=1.0)
    lab.microscope()
    if what != "while it waits":
        lab.service()
    options = ("-p", "results=2", "-p", "exposure_us=60000", "--json")  # 16 frames: one second a scan
    agent = lab.agent(*options)
    if what == "while it waits":
        lab.until(lambda: any(isinstance(r, Received) for r in lab.records()), agent)
    else:
        lab.until(lambda: len(lab.began()) == 1, agent)
    if what == "in the scan":
        time.sleep(0.3)
    agent.end(signal.SIGKILL)
    if what == "while it waits":
        lab.service()
    take_up = ("agent", "--experiment", EXPERIMENT, "--policy")
    assert "runs policy 'stepping:Stepping'" in lab.emflow(*take_up, "threshold", code=2).stderr
    other = lab.emflow(*take_up, "stepping:Stepping", "-p", "results=9", code=2)
    assert "began with other parameters" in other.stderr
    again = lab.resume()
    assert again.wait() == 0, again.text()
    decided = lab.decisions()
    sent = [c.id for d in decided for c in d.commands]
    assert lab.began() == sent
    assert [d.by for d in decided] == ["policy"] * 3
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


def test_the_microscopes_server_is_killed_in_a_scan(make_lab) -> None:
    """What it was doing is unknown: the loop asks, decides what is left, and goes on."""
    lab = make_lab(time_scale=1.0)
    server = lab.microscope()
    lab.service()
    agent = lab.agent("-p", "results=2", "-p", "exposure_us=60000", "--json")
    lab.until(lambda: len(lab.began()) == 1, agent)
    time.sleep(0.2)
    server.end(signal.SIGKILL)
    time.sleep(0.5)
    lab.microscope()
    assert agent.wait() == 0, agent.text()
    decided = lab.decisions()
    assert [d.by for d in decided] == ["policy", "recovery", "policy", "policy"]
    assert decided[1].decision.reason.startswith(f"after {EXPERIMENT}-0000-00 unknown")
    assert all(count == 1 for count in Counter(lab.began()).values())
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


@pytest.mark.parametrize(
    ("lost", "by"), [("finish", ["policy"] * 3), ("abort", ["policy", "recovery", "policy", "policy"])]
)
def test_the_agent_sleeps_longer_than_its_lease(make_lab, lost: str, by: list[str]) -> None:
    """As behind a cut network: the scan ends as set, the beam is blanked, and the agent goes on under a new epoch."""
    lab = make_lab(time_scale=1.0)
    settings = lab.folder / "microscope.toml"
    settings.write_text(settings.read_text().replace("[backend]", f'on_lease_lost = "{lost}"\n\n[backend]', 1))
    lab.microscope()
    lab.service()
    agent = lab.agent("-p", "results=2", "-p", "exposure_us=200000", "--json")  # 16 frames: 3.2 s, the lease 2 s
    lab.until(lambda: len(lab.began()) == 1, agent)
    agent.process.send_signal(signal.SIGSTOP)
    try:
        with lab.client() as client:
            lab.until(lambda: client.status().mode is Mode.HOLD and client.status().blanked)
    finally:
        agent.process.send_signal(signal.SIGCONT)
    assert agent.wait() == 0, agent.text()
    answers = (lab.folder / "microscope-state" / "answers.jsonl").read_text().splitlines()
    assert [one["epoch"] for one in map(json.loads, answers) if one["line"] == "epoch"] == [1, 2]
    assert [d.by for d in lab.decisions()] == by
    assert lab.began() == [c.id for d in lab.decisions() for c in d.commands]
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


def test_the_service_is_killed_and_comes_back(make_lab) -> None:
    lab = make_lab()
    lab.microscope()
    service = lab.service()
    service.end(signal.SIGKILL)
    agent = lab.agent("-p", "results=2", "--json")
    lab.until(lambda: any(isinstance(r, Received) for r in lab.records()), agent)
    time.sleep(0.3)
    lab.service()
    assert agent.wait() == 0, agent.text()
    assert [d.by for d in lab.decisions()] == ["policy"] * 3
