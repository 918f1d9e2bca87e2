"""Back-pressure: the next command waits while more acquisitions wait for the service than it has asked for.

The service is not in the way from result to command: it only leaves a file, which the agent looks at before it sends
what it has decided.  A file that asks to wait counts only while it changes: a service that is there writes it anew
every few seconds.  So a dead one holds nobody for longer than `STALE_S`, and no clocks of two machines are compared.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from emflow import backlog
from emflow.agent import resting
from emflow.agent.control import Finished
from emflow.agent.opening import Experiment
from emflow.agent.protocol import Ending
from emflow.backlog import Backlog

STALE_S = 6 * backlog.REFRESH_S
"""A file that asks to wait and has not changed for so long has nobody behind it."""

POLL_S = 0.1
"""Between two looks at the file."""

_log = logging.getLogger(__name__)


class Pressure:
    """What the service says of its backlog, as long as it says it.

    Parameters
    ----------
    runs : Path
        The folder of run folders.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._said: Backlog | None = None
        self._said_at = 0.0

    def now(self) -> Backlog | None:
        """The backlog that asks to wait; None if nothing does."""
        said = backlog.read(self._runs)
        if said is None or not said.over:
            self._said = None
            return None
        if said != self._said:
            self._said, self._said_at = said, time.monotonic()
        return said if time.monotonic() - self._said_at < STALE_S else None


def ease(x: Experiment, pressure: Pressure) -> None:
    """Wait until the backlog has fallen; the experiment's clock goes on meanwhile, since nobody asked it to rest.

    Raises
    ------
    Finished
        It did not fall within the time in which a result must come, the experiment's time is over, or somebody asked
        to stop.
    """
    found = pressure.now()
    if found is None:
        return
    before, begun_s = x.state, x.clock.seconds
    _log.warning("experiment %s is held: %s", x.id, told(found))
    x.events.write("held", subject=x.id, trace=x.id, waiting=found.waiting, limit=found.limit)
    timeout_s, limit_s = x.config.agent.result_timeout_s, x.started.rules.max_time_s
    while found is not None:
        x.show("held", held=told(found))
        resting.checkpoint(x)
        now_s = x.clock.seconds
        if limit_s and now_s > limit_s:
            raise Finished(Ending.TIME, f"{now_s:.0f} s of {limit_s:g} s, the last of them held: {told(found)}")
        if now_s - begun_s > timeout_s:
            raise Finished(Ending.FAILED, f"held for {timeout_s:g} s: {told(found)}; see emflow status")
        x.control.nap(POLL_S)
        found = pressure.now()
    x.show(before)


def told(found: Backlog) -> str:
    """A backlog that is too large, in words."""
    return f"backlog {found.waiting} > {found.limit}"
