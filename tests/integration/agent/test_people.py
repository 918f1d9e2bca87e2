"""What people do to a running experiment, at the agent and at the microscope."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator

import pytest

from emflow import rpc
from emflow.agent.folders import read_agent
from emflow.agent.records import Told
from emflow.microscope.client import LeaseKeeper, MicroscopeClient
from emflow.microscope.protocol import Command, Outcome, Set

EXPERIMENT = "e0123456789ab"
SLOW = ("-p", "exposure_us=60000", "--json")  # 16 frames: a scan of one second


def ending(agent) -> dict:
    return json.loads(agent.text().splitlines()[-1])


def state(lab) -> str:
    return lab.json("agent", "status")["state"]


def until_running(lab, agent) -> None:
    lab.until(lambda: read_agent(lab.experiment()), agent)


def told(lab) -> list[str]:
    return [r.what for r in lab.records() if isinstance(r, Told)]


@pytest.fixture
def slow(make_lab):
    """A microscope whose scans take their time."""
    made = make_lab(time_scale=1.0)
    made.microscope()
    made.service()
    return made


def connection(lab, role: str) -> rpc.Connection:
    found = read_agent(lab.experiment())
    return rpc.Connection(found.address, "emflow.agent", role=role, name="test", timeout_s=10)


def test_pause_and_resume(slow) -> None:
    agent = slow.agent("-p", "results=2", *SLOW)
    until_running(slow, agent)
    begin = time.monotonic()
    assert slow.json("agent", "pause", "-m", "coffee")["experiment"] == EXPERIMENT
    slow.until(lambda: state(slow) == "paused", agent)
    before = slow.json("agent", "status")
    time.sleep(1.5)
    after = slow.json("agent", "status")
    assert (after["number"], after["seconds"]) == (before["number"], before["seconds"])  # its clock stands still
    slow.emflow("agent", "resume", "--experiment", EXPERIMENT[:6])
    assert agent.wait() == 0, agent.text()
    assert told(slow) == ["pause", "resume"]
    assert ending(agent)["ending"] == "target"
    assert ending(agent)["seconds"] < time.monotonic() - begin - 1.5


def test_approve_before_anything_is_sent(lab) -> None:
    agent = lab.start(
        *("agent", "--policy", "stepping:Stepping", "-p", "results=1", "--mode", "approve"),
        *("--experiment", EXPERIMENT, "--json"),
        log="agent.log",
    )
    until_running(lab, agent)
    lab.until(lambda: state(lab) == "asking", agent)
    assert lab.began() == []
    status = lab.json("agent", "status")
    assert status["pending"]["actions"][0]["verb"] == "scan4d"
    assert "emflow agent approve 0" in lab.emflow("agent", "status").stdout
    refused = lab.emflow("agent", "approve", "7", code=None)
    assert refused.returncode
    assert "does not wait for approval" in refused.stderr
    with connection(lab, "viewer") as viewer:
        assert viewer.call("status")["state"] == "asking"
        for method, arguments in (("approve", (0,)), ("stop", ()), ("pause", ()), ("start", ("threshold", {}, "auto"))):
            with pytest.raises(rpc.Refused, match="viewer may only look"):
                viewer.call(method, *arguments)
    lab.emflow("agent", "approve", "0", "-m", "looks right")
    assert agent.wait() == 0, agent.text()
    assert told(lab) == ["approve"]
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout


def test_stop_leaves_nothing_running(slow) -> None:
    agent = slow.agent(*SLOW)
    slow.until(slow.began, agent)
    slow.emflow("agent", "stop", "-m", "enough")
    assert agent.wait() == 1, agent.text()
    assert ending(agent)["ending"] == "stopped"
    assert "enough" in ending(agent)["reason"]
    assert told(slow) == ["stop"]
    (receipt,) = slow.progress().receipts
    assert receipt.outcome is Outcome.ABORTED
    with slow.client() as client:
        status = client.status()
        assert (status.command, status.holder) == ("", "")
    assert not list((slow.folder / "share").glob("*.emflow.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops(slow, number: int) -> None:
    agent = slow.agent(*SLOW)
    slow.until(slow.began, agent)
    assert agent.end(number) == 130
    assert ending(agent)["ending"] == "stopped"
    assert slow.progress().receipts[0].outcome is Outcome.ABORTED


def test_the_microscopes_stop_ends_it(slow) -> None:
    agent = slow.agent(*SLOW)
    slow.until(slow.began, agent)
    with slow.client() as client:
        client.stop("smoke")
    assert agent.wait() == 1, agent.text()
    assert ending(agent)["ending"] == "stopped"
    assert "smoke" in ending(agent)["reason"]


def test_an_abort_by_a_person_holds(slow) -> None:
    agent = slow.agent("-p", "results=1", *SLOW)
    slow.until(slow.began, agent)
    with slow.client() as client:
        client.abort("a spike")
    slow.until(lambda: state(slow) == "hold", agent)
    time.sleep(0.3)
    assert len(slow.began()) == 1
    slow.emflow("agent", "resume")
    assert agent.wait() == 0, agent.text()
    assert [d.by for d in slow.decisions()] == ["policy", "recovery", "policy"]
    assert told(slow) == ["hold", "resume"]
    assert "all the same" in slow.emflow("replay", EXPERIMENT).stdout


@contextlib.contextmanager
def moved_by_anna(lab) -> Iterator[None]:
    """An operator takes the lease, turns a knob, and keeps the lease as long as this lasts."""
    with MicroscopeClient(f"127.0.0.1:{lab.port}", role="operator", name="anna", patience_s=5.0) as operator:
        lease = LeaseKeeper(operator)
        command = Command(
            id="e00000000beef-0000-00",
            trace="",
            action=Set(values={"C10_nm": 77.0}),
            epoch=lease.epoch,
            not_after_s=operator.status().now_s + 10,
        )
        assert operator.execute(command).outcome is Outcome.DONE
        yield
        lease.close()


def test_somebody_else_moved_it(slow) -> None:
    """An operator takes the lease and turns a knob: the next command is refused, and nothing of it is carried out."""
    agent = slow.agent("-p", "results=2", *SLOW)
    slow.until(slow.began, agent)
    slow.emflow("agent", "pause")
    slow.until(lambda: state(slow) == "paused", agent)
    with moved_by_anna(slow):
        slow.emflow("agent", "resume")
        slow.until(lambda: state(slow) == "hold", agent)  # the lease is anna's
        assert "anna holds it" in slow.emflow("agent", "status").stdout + str(slow.records()[-1])
    slow.emflow("agent", "resume")  # now it can have the lease, and its command finds another value than it expects
    slow.until(lambda: any("expects" in getattr(r, "reason", "") for r in slow.records()), agent)
    assert agent.wait() == 0, agent.text()
    decided = slow.decisions()
    assert [d.by for d in decided] == ["policy", "policy", "recovery", "policy"]
    assert decided[2].settings["C10_nm"] == 77.0
    assert len(decided[2].commands) == 1
    refused = [r for r in slow.progress().receipts if r.outcome is Outcome.REFUSED]
    assert [r.code for r in refused] == ["expects"]
    assert "all the same" in slow.emflow("replay", EXPERIMENT).stdout


def test_somebody_else_moved_it_and_left(slow) -> None:
    """The agent takes the lost lease again by itself; that the value is another one holds it."""
    agent = slow.agent("-p", "results=2", *SLOW)
    slow.until(slow.began, agent)
    slow.emflow("agent", "pause")
    slow.until(lambda: state(slow) == "paused", agent)
    with moved_by_anna(slow):
        pass
    slow.emflow("agent", "resume")
    slow.until(lambda: state(slow) == "hold", agent)
    assert "expects: C10_nm" in [r.reason for r in slow.records() if isinstance(r, Told)][-1]
    slow.emflow("agent", "resume")
    assert agent.wait() == 0, agent.text()
    assert [d.by for d in slow.decisions()] == ["policy", "policy", "recovery", "policy"]
    assert told(slow) == ["pause", "resume", "hold", "resume"]


def test_two_agents_on_one_experiment(slow) -> None:
    agent = slow.agent("-p", "results=2", *SLOW)
    until_running(slow, agent)
    second = slow.emflow("agent", "--experiment", EXPERIMENT, code=75)
    assert f"process {agent.process.pid} runs it" in second.stderr
    other = slow.emflow("agent", "--policy", "stepping:Stepping", "--mode", "auto", code=75)
    assert "holds it" in other.stderr
    assert agent.wait() == 0, agent.text()
    assert [d.by for d in slow.decisions()] == ["policy"] * 3


@pytest.mark.parametrize("mode", ["observe", "propose"])
def test_looking_sends_nothing(slow, mode: str) -> None:
    """Another experiment steers; this one decides on the same results, and the microscope never hears of it."""
    looking = slow.start(
        *("agent", "--policy", "stepping:Stepping", "--mode", mode, "--experiment", "e00000000feed", "--json"),
        log="looking.log",
    )
    slow.until(lambda: read_agent(slow.experiment("e00000000feed")), looking)
    steering = slow.agent("-p", "exposure_us=20000", "--json")
    if mode == "propose":

        def shown() -> bool:
            pending = slow.json("agent", "status", "--experiment", "e00000000feed")["pending"]
            return bool(pending) and pending["actions"][0]["verb"] == "set"

        slow.until(shown, looking)
    assert steering.wait() == 0, steering.text()
    assert looking.wait() == 0, looking.text()
    mine, theirs = slow.decisions("e00000000feed"), slow.decisions()
    assert [d.decision.measured for d in mine] == [d.decision.measured for d in theirs]
    assert {i[:13] for i in slow.began()} == {EXPERIMENT}
    assert slow.progress("e00000000feed").receipts == []
    assert "all the same" in slow.emflow("replay", "e00000000feed").stdout


def test_an_agent_that_waits_is_started_from_afar(lab) -> None:
    waiting = lab.start("agent", log="waiting.log")
    lab.until(lambda: read_agent(lab.folder / "experiments"), waiting)
    assert state(lab) == "idle"
    refused = lab.emflow("agent", "pause", code=None)
    assert refused.returncode
    assert "no experiment is running" in refused.stderr
    address = read_agent(lab.folder / "experiments").address
    with rpc.Connection(address, "emflow.agent", role="operator", name="test", timeout_s=10) as operator:
        with pytest.raises(rpc.Refused, match="no policy is called"):
            operator.call("start", "nonsense", {}, "auto")
        with pytest.raises(rpc.Refused, match="takes a policy"):
            operator.call("start", 7, {}, "auto")
        with pytest.raises(rpc.Refused, match="no policy is called"):
            operator.call("start", "stepping:Stepping", {"results": 1}, "auto")  # no code is named from afar
        begun = operator.call("start", "threshold", {"at_least": 0.0, "shape": [8, 8]}, "auto")
        lab.until(lambda: operator.call("status")["ending"] == "target", waiting)
    assert lab.emflow("replay", begun["experiment"])
    assert waiting.end() == 130
    assert not (lab.folder / "experiments" / "agent.json").exists()


def test_what_is_wrong_is_said_before_anything_begins(lab) -> None:
    def agent(*arguments: str, code: int) -> str:
        return lab.emflow("agent", *arguments, code=code).stderr

    assert "did you mean 'threshold'" in agent("--policy", "treshold", code=78)
    assert "has no parameter 'resluts'" in agent("--policy", "stepping:Stepping", "-p", "resluts=1", code=78)
    assert "results, pixels" in agent("--policy", "stepping:Stepping", "-p", "resluts=1", code=78)
    assert "results" in agent("--policy", "stepping:Stepping", "-p", "results=many", code=78)
    assert "can't be written into a log" in agent("--policy", "stepping:Stepping", "-p", "far=NaN", code=78)
    assert "not like key=value" in agent("--policy", "stepping:Stepping", "-p", "results", code=2)
    wrong = agent("--policy", "correct_aberrations", "--mode", "auto", code=78)
    assert 'Set recipe = "aberrations"' in wrong
    assert "there is no experiment" in agent("--experiment", EXPERIMENT, code=2)
    assert "is no id" in agent("--experiment", "../../x", code=2)
    assert "no agent is running" in lab.emflow("agent", "status", code=2).stderr
    assert "no experiment is called" in lab.emflow("replay", "e77", code=2).stderr
    assert lab.json("agent", "list") == []
    assert lab.began() == []


def test_without_a_microscope(make_lab) -> None:
    lab = make_lab(patience_s=0.5)
    done = lab.emflow("agent", "--policy", "stepping:Stepping", "--mode", "auto", code=69)
    assert f"no answer from 127.0.0.1:{lab.port}" in done.stderr
