"""An experiment that another process goes on with: as it began, where it was, and not before somebody says so."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest

from emflow.agent.folders import read_agent
from emflow.agent.records import Received

EXPERIMENT = "e0123456789ab"
SLOW = ("-p", "results=1", "-p", "exposure_us=30000", "--json")  # 16 frames: half a second a scan


def state(lab) -> str:
    return lab.json("agent", "status")["state"]


def until_it_listens(lab, agent) -> None:
    def listens() -> bool:
        found = read_agent(lab.experiment())
        return found is not None and found.pid == agent.process.pid

    lab.until(listens, agent)


@pytest.fixture
def slow(make_lab):
    """A microscope whose scans take their time."""
    made = make_lab(time_scale=1.0)
    made.microscope()
    made.service()
    return made


def test_it_goes_on_as_it_began(make_lab) -> None:
    """Whoever asks for another mode, other parameters or another recipe is told, and nothing is sent."""
    lab = make_lab()
    lab.microscope()
    agent = lab.agent("-p", "results=2", "--json")
    lab.until(lambda: any(isinstance(r, Received) for r in lab.records()), agent)
    agent.end(signal.SIGKILL)
    before = lab.began(), lab.records()
    take_up = ("agent", "--experiment", EXPERIMENT)
    for mode in ("observe", "propose", "approve"):
        assert f"began in mode 'auto', not '{mode}'" in lab.emflow(*take_up, "--mode", mode, code=2).stderr
    assert "began with other parameters" in lab.emflow(*take_up, "-p", "results=9", code=2).stderr
    whole = lab.toml.read_text()
    (lab.folder / "other.toml").write_text('name = "other"\n[[reduction]]\nuse = "image"\nname = "image"\n')
    lab.toml.write_text(whole.replace('recipe = "quick"', 'recipe = "./other.toml"'))
    assert 'Set recipe = "quick"' in lab.emflow(*take_up, code=78).stderr
    lab.toml.write_text(whole.replace('root = "share"', 'root = "share"\nshare = "another"'))
    assert "was 'share' when it began" in lab.emflow(*take_up, code=78).stderr
    lab.toml.write_text(whole)
    assert (lab.began(), lab.records()) == before
    lab.service()
    again = lab.start(*take_up, "--mode", "auto", "-p", "results=2", "--json", log="again.log")
    assert again.wait() == 0, again.text()


@pytest.mark.parametrize("rest", ["paused", "hold"])
def test_a_restart_ends_no_pause_and_no_hold(slow, rest: str) -> None:
    agent = slow.agent(*SLOW)
    slow.until(slow.began, agent)
    until_it_listens(slow, agent)
    if rest == "paused":
        slow.emflow("agent", "pause", "-m", "somebody at the door")
    else:
        with slow.client() as client:
            client.abort("a spike")
    slow.until(lambda: state(slow) == rest, agent)
    agent.end(signal.SIGKILL)
    before = slow.began()
    again = slow.resume()
    until_it_listens(slow, again)
    slow.until(lambda: state(slow) == rest, again)
    time.sleep(0.7)
    assert (state(slow), slow.began()) == (rest, before)
    slow.emflow("agent", "resume")
    assert again.wait() == 0, again.text()
    assert "all the same" in slow.emflow("replay", EXPERIMENT).stdout


@pytest.mark.parametrize("how", ["stop", "time"])
def test_a_policy_that_hangs_holds_nobody_up(make_lab, how: str) -> None:
    lab = make_lab(agent="max_time_s = 3" if how == "time" else "")
    lab.microscope()
    lab.service()
    agent = lab.agent("-p", "hangs=true", "--json")
    if how == "stop":
        until_it_listens(lab, agent)
        lab.until(lambda: state(lab) == "deciding" or lab.progress().ended, agent)
        lab.emflow("agent", "stop", "-m", "it hangs")
    assert agent.wait(15) == 1, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert summary["ending"] == ("stopped" if how == "stop" else "budget of time")
    with lab.client() as client:
        assert client.status().holder == ""
    assert lab.began() == [f"{EXPERIMENT}-0000-00"]


def test_an_id_that_the_microscope_knows_begins_nothing(lab) -> None:
    """Its answers and scans of then would count as those of now."""
    agent = lab.agent("-p", "results=1", "--json")
    assert agent.wait() == 0, agent.text()
    before = lab.began()
    shutil.rmtree(lab.experiment())
    again = lab.agent("-p", "results=1", "--json", log="again.log")
    assert again.wait() == 2, again.text()
    assert "has executed commands of an experiment" in again.text()
    assert lab.began() == before
    with lab.client() as client:
        assert client.status().holder == ""
