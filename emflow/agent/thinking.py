"""Lets a policy think beside the loop, so that one that hangs can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from emflow.agent.control import Finished
from emflow.agent.opening import Experiment
from emflow.agent.protocol import Ending

LOOK_S = 0.1
"""How often it is looked whether somebody asked to stop; an answer is heard at once."""

T = TypeVar("T")


class _Thought(threading.Thread, Generic[T]):
    """One question; nobody waits for it at the end of the process."""

    def __init__(self, ask: Callable[[], T]) -> None:
        super().__init__(name="emflow-policy", daemon=True)
        self._ask = ask
        self.answer: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Ask, and keep what comes."""
        try:
            self.answer = self._ask()
        except BaseException as error:  # noqa: BLE001  raised where the answer is waited for
            self.error = error


def thought(x: Experiment, ask: Callable[[], T]) -> T:
    """The answer of what may hang.

    Raises
    ------
    Finished
        Somebody asked to stop, or the experiment's time was over, before there was one.
    """
    thread = _Thought(ask)
    thread.start()
    limit_s = x.started.rules.max_time_s
    while True:
        thread.join(LOOK_S)
        if not thread.is_alive():
            break
        x.control.check_stop()
        if limit_s and x.clock.seconds > limit_s:
            raise Finished(Ending.TIME, f"{x.clock.seconds:.0f} s of {limit_s:g} s, and no word of the policy")
    if thread.error is not None:
        raise thread.error
    return thread.answer  # type: ignore[return-value]
