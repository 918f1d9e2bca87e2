"""The whole loop on real processes, killed at every moment: the same decisions, each command once, the same end."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from emflow.errors import EmflowError
from emflow.journal import Journal
from emflow.microscope.protocol import Outcome, Set

HERE = Path(__file__).parent
EXPERIMENT = "e0123456789ab"
CONTROLS = ("C10_nm", "C12a_nm", "C12b_nm")
PARAMETERS = ("shape=[32,32]", "exposure_us=1000", "target_nm=5", "max_step_nm=150")
AGENT = ("agent", "--policy", "correct_aberrations", "--mode", "auto", "--experiment", EXPERIMENT, "--json")


@functools.cache
def agents_tests() -> ModuleType:
    """The laboratory of the agent's tests; test folders are no packages."""
    path = HERE.parent / "integration" / "agent" / "conftest.py"
    spec = importlib.util.spec_from_file_location("laboratory_of_the_agents_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make folders for loops with the microscope, service and policy of this file."""
    made: list[Any] = []

    def make(**settings: Any) -> Any:
        settings = {"recipe": "aberrations", "controls": CONTROLS, "patience_s": 20.0} | settings
        made.append(agents_tests().Lab(tmp_path / f"loop{len(made)}", **settings))
        made[-1].env["PYTHONPATH"] += os.pathsep + str(HERE)
        return made[-1]

    yield make
    for lab in made:
        lab.close()


def start_agent(lab) -> Any:
    more = [word for parameter in PARAMETERS for word in ("-p", parameter)]
    return lab.start(*AGENT, *more, log="agent.log")


# --- how far each process is


def lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def log_lines(lab) -> int:
    return lines(lab.experiment() / "log.jsonl")


def answers(lab) -> int:
    return lines(lab.folder / "microscope-state" / "answers.jsonl")


def journal_events(lab) -> int:
    try:
        with Journal(lab.folder / "state" / "journal.sqlite", read_only=True) as journal:
            return len(journal.events())
    except EmflowError:
        return 0  # it is being made


PROGRESS = {"agent": log_lines, "server": answers, "service": journal_events}


class Running:
    """Microscope server, service and agent of one loop; each can be killed and started again."""

    def __init__(self, lab) -> None:
        self.lab = lab
        self.server, self.service = lab.microscope(), lab.service()
        self.agent = start_agent(lab)

    def kill(self, what: str, moment: int) -> bool:
        """Kill one as soon as what it writes has so many lines, and start it again; False if the end came first."""
        process = getattr(self, what)
        until = time.monotonic() + 30
        while PROGRESS[what](self.lab) < moment:
            if self.agent.process.poll() is not None:
                return False
            assert time.monotonic() < until, f"{what} never came to {moment}\n{self.agent.text()[-2000:]}"
            time.sleep(0.0005)
        process.process.send_signal(signal.SIGKILL)
        process.process.wait(10)
        if what == "server":
            self.server = self.lab.microscope()
        elif what == "service":
            self.service = self.lab.service()
        elif log_lines(self.lab) == 0:
            self.agent = start_agent(self.lab)
        elif self.lab.progress().ended is None:
            self.agent = self.lab.resume("agent.log")
        return True

    def result(self) -> list[bytes]:
        """Wait for the end, look that all is right, and give what may not depend on any crash: the decisions."""
        lab = self.lab
        code = self.agent.wait(60)
        ended = lab.progress().ended
        assert ended is not None, self.agent.text()[-3000:]
        assert ended.ending == "target", ended
        assert code in (0, -signal.SIGKILL), self.agent.text()[-3000:]
        sent = [c.id for d in lab.decisions() for c in d.commands]
        begun = Counter(intents(lab))
        assert set(begun) <= set(sent)
        assert all(count == 1 for count in begun.values()), begun
        done = [r for r in lab.progress().receipts if r.outcome is Outcome.DONE]
        assert {r.command for r in done} <= set(begun)
        assert all(math.hypot(*group) <= 5.0 for group in left(lab))
        assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout
        return [msgspec.json.encode(d.decision) for d in lab.decisions() if d.by == "policy"]


def intents(lab) -> Iterator[str]:
    """Commands that the microscope began, each as often as it did."""
    for line in (lab.folder / "microscope-state" / "answers.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        if record["line"] == "intent":
            yield record["command"]["id"]


def left(lab) -> tuple[tuple[float, ...], ...]:
    """The true C10 and (C12a, C12b), nm."""
    column = json.loads((lab.folder / "microscope-state" / "backend" / "column.json").read_bytes())
    c10, c12a, c12b = (column["hidden"][n] + column["controls"][n] for n in CONTROLS)
    return (c10,), (c12a, c12b)


def undisturbed(make_loop: Callable[..., Any]) -> tuple[list[bytes], dict[str, int]]:
    """The decisions of a loop that nothing happens to, and how far each process came."""
    loop = Running(make_loop())
    decisions = loop.result()
    assert len(decisions) >= 4
    loop.lab.until(lambda: journal_events(loop.lab) > 0)
    reached = {what: progress(loop.lab) for what, progress in PROGRESS.items()}
    loop.lab.close()
    return decisions, reached


def test_each_process_is_killed_once(make_loop) -> None:
    decisions, _ = undisturbed(make_loop)
    loop = Running(make_loop())
    assert loop.kill("service", 4)
    assert loop.kill("agent", 5)  # the first correction is decided, and perhaps sent
    assert loop.kill("server", 7)
    assert loop.result() == decisions


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", ["agent", "server", "service"])
def test_killed_after_each_line(make_loop, what: str) -> None:
    decisions, reached = undisturbed(make_loop)
    kills = 0
    for moment in range(1, reached[what] + 1):
        loop = Running(make_loop())
        kills += loop.kill(what, moment)
        assert loop.result() == decisions, f"{what} killed at {moment}"
        loop.lab.close()
    assert kills >= min(10, reached[what] - 2)


def test_scrambled_scans_never_move_the_microscope(make_loop) -> None:
    """The negative control: the same loop, but no frame is where it was taken."""
    lab = make_loop(backend="scrambled:Scrambled")
    loop = Running(lab)
    assert loop.agent.wait() == 1, loop.agent.text()
    ended = lab.progress().ended
    assert ended is not None
    assert ended.ending == "gave up"
    assert "in a row, gives up" in ended.reason
    assert not any(isinstance(c.action, Set) for d in lab.decisions() for c in d.commands)
    assert not any(d.decision.trusted for d in lab.decisions()[1:])
    assert list(intents(lab)) == [f"{EXPERIMENT}-{n:04d}-00" for n in range(3)]
    with lab.client() as client:
        assert {client.status().controls[n] for n in CONTROLS} == {0.0}
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout
