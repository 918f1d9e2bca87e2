"""What the client says to a server whose answers are lost: it asks first, and sends again only what was never seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emflow.errors import Unavailable
from emflow.microscope.answers import refused
from emflow.microscope.client import MicroscopeClient
from emflow.microscope.protocol import OBJECT, Command, Outcome, Receipt, Set, to_wire
from emflow.rpc import Server

NAME = "e0123456789ab-0000-01"
COMMAND = Command(id=NAME, trace="t", action=Set(values={"C10_nm": 1.0}), epoch=1, not_after_s=1e12)
SEEN = refused(NAME, "never-seen", "")
RUNNING = Receipt(command=NAME, outcome=Outcome.RUNNING)
DONE = Receipt(command=NAME, outcome=Outcome.DONE)
LATE = refused(NAME, "expects", "")


class Script:
    """Answers one call after the other with what it was given; with None it answers nobody in time."""

    def __init__(self) -> None:
        self.answers: list[Receipt | None] = []
        self.heard: list[str] = []
        self.ended = threading.Event()

    def _next(self, method: str) -> dict[str, Any]:
        self.heard.append(method)
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            self.ended.wait(5)
        return to_wire(answer or DONE)

    def execute(self, command: Any, wait_s: float) -> dict[str, Any]:
        return self._next("execute")

    def receipt(self, command: str, wait_s: float) -> dict[str, Any]:
        return self._next("receipt")


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    made.ended.set()


@pytest.fixture
def server(script: Script) -> Iterator[Server]:
    with Server("127.0.0.1:0", {OBJECT: (script, ("execute", "receipt"))}) as made:
        made.start()
        yield made
        script.ended.set()


@pytest.mark.parametrize(
    ("answers", "heard", "receipt"),
    [
        ([DONE], ["execute"], DONE),
        ([RUNNING, RUNNING, DONE], ["execute", "receipt", "receipt"], DONE),
        ([None, DONE], ["execute", "receipt"], DONE),
        ([None, RUNNING, DONE], ["execute", "receipt", "receipt"], DONE),
        ([None, None, LATE], ["execute", "receipt", "receipt"], LATE),
        ([None, SEEN, DONE], ["execute", "receipt", "execute"], DONE),
        ([RUNNING, SEEN, DONE], ["execute", "receipt", "execute"], DONE),
        ([refused(NAME, "busy", "")], ["execute"], refused(NAME, "busy", "")),
    ],
)
def test_it_asks_before_it_sends_again(
    script: Script, server: Server, answers: list[Receipt | None], heard: list[str], receipt: Receipt
) -> None:
    script.answers = answers
    with MicroscopeClient(server.address, role="agent", name="a", patience_s=10.0, timeout_s=0.4) as client:
        assert client.execute(COMMAND) == receipt
    assert script.heard == heard


def test_patience_ends_and_so_does_a_wish_to_stop(script: Script, server: Server) -> None:
    with MicroscopeClient(server.address, role="agent", name="a", patience_s=0.5, timeout_s=0.3) as client:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            client.execute(COMMAND)
        assert time.monotonic() - began < 3
        script.answers = [RUNNING] * 100_000
        stop = threading.Event()
        timer = threading.Timer(0.3, stop.set)
        timer.start()
        assert client.execute(COMMAND, stop=stop).outcome is Outcome.RUNNING
        timer.join()
