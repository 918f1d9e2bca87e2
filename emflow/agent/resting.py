"""Where a person's word counts: pause, hold, approval; the experiment's clock stands still meanwhile."""

from __future__ import annotations

import logging

from emflow.agent.opening import Experiment
from emflow.agent.records import State, Told

_log = logging.getLogger(__name__)


def checkpoint(x: Experiment) -> None:
    """Obey whoever wants a pause or the end; `Finished` for the end."""
    x.control.check_stop()
    wish = x.control.paused
    if wish:
        _rest(x, Told(what="pause", by=wish.by, number=x.progress.number - 1, reason=wish.reason), "paused")


def hold(x: Experiment, reason: str) -> None:
    """Send and decide nothing until somebody has looked and resumes."""
    x.control.forget_resume()
    _log.warning("experiment %s holds: %s; go on with: emflow agent resume", x.id, reason)
    _rest(x, Told(what="hold", by="agent", number=x.progress.number - 1, reason=reason), "hold")


def approval(x: Experiment, number: int) -> None:
    """Wait until somebody agrees to a decision, unless somebody has."""
    if number in x.progress.approved:
        return
    x.show("asking")
    x.clock.halt()
    try:
        wish = x.control.wait_approval(number)
    finally:
        x.clock.go()
    x.record(Told(what="approve", by=wish.by, number=number, reason=wish.reason))


def go_on(x: Experiment) -> None:
    """Rest on where the log ends with a pause or a hold: another process is no reason to go on."""
    told = x.progress.resting
    if told is not None:
        _log.warning("experiment %s still rests (%s: %s); go on with: emflow agent resume", x.id, told.by, told.reason)
        _wait(x, told, "paused" if told.what == "pause" else "hold")


def _rest(x: Experiment, told: Told, state: State) -> None:
    x.record(told)
    _wait(x, told, state)


def _wait(x: Experiment, told: Told, state: State) -> None:
    x.clock.halt()
    before = x.state
    x.show(state)
    try:
        wish = x.control.wait_resume()
    finally:
        x.clock.go()
    x.record(Told(what="resume", by=wish.by, number=told.number, reason=wish.reason))
    x.show(before)
