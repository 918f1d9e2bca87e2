"""What people tell a running experiment, and what it tells them: between the threads of both."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from emflow.agent.protocol import Ending
from emflow.agent.records import AgentStatus


class Finished(Exception):
    """The experiment is over."""

    def __init__(self, ending: Ending, reason: str) -> None:
        super().__init__(reason)
        self.ending, self.reason = ending, reason


@dataclass(frozen=True)
class Wish:
    """What somebody asked for, and who it was."""

    by: str
    reason: str = ""


class Control:
    """Wishes for the loop, and its newest status; every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pause: Wish | None = None
        self._resumed: Wish | None = None
        self._approved: dict[int, Wish] = {}
        self._status = AgentStatus(state="starting")
        self.stop_wish: Wish | None = None
        self.stopping = threading.Event()
        """Set for good once somebody asked to stop; what waits for the microscope looks at it."""

    # --- people

    def pause(self, wish: Wish) -> None:
        """Ask to send and decide nothing until `resume`."""
        with self._changed:
            self._pause = self._pause or wish
            self._changed.notify_all()

    def resume(self, wish: Wish) -> None:
        """End a pause, or a hold."""
        with self._changed:
            self._pause, self._resumed = None, wish
            self._changed.notify_all()

    def approve(self, number: int, wish: Wish) -> None:
        """Agree to one decision."""
        with self._changed:
            self._approved.setdefault(number, wish)
            self._changed.notify_all()

    def stop(self, wish: Wish) -> None:
        """Ask to end the experiment."""
        with self._changed:
            self.stop_wish = self.stop_wish or wish
            self.stopping.set()
            self._changed.notify_all()

    # --- the loop

    @property
    def paused(self) -> Wish | None:
        """Who wants a pause, if anybody does."""
        return self._pause

    def nap(self, seconds: float) -> None:
        """Wait, but not longer than until somebody asks to stop; `Finished` then."""
        self.stopping.wait(seconds)
        self.check_stop()

    def check_stop(self) -> None:
        """`Finished` if somebody asked to stop."""
        if self.stop_wish:
            raise Finished(Ending.STOPPED, f"{self.stop_wish.by}: {self.stop_wish.reason or 'no reason given'}")

    def wait_resume(self) -> Wish:
        """Wait until somebody resumes what is paused or held; who it was."""
        with self._changed:
            self._changed.wait_for(lambda: self.stop_wish or (self._resumed and not self._pause))
            wish = self._resumed
        self.check_stop()
        return wish or Wish("nobody")

    def forget_resume(self) -> None:
        """Begin a hold: only what is said from now on ends it."""
        with self._changed:
            self._resumed = None

    def wait_approval(self, number: int) -> Wish:
        """Wait until somebody agrees to a decision; who it was."""
        with self._changed:
            self._changed.wait_for(lambda: self.stop_wish or number in self._approved)
            wish = self._approved.get(number)
        self.check_stop()
        return wish or Wish("nobody")

    @property
    def status(self) -> AgentStatus:
        """The newest status."""
        return self._status

    def publish(self, status: AgentStatus) -> None:
        """Replace the status."""
        self._status = status


class ActiveClock:
    """Seconds that an experiment was at work: it stands still while it is paused, held, or not running at all."""

    def __init__(self, before_s: float = 0.0) -> None:
        self._before_s = before_s
        self._since: float | None = time.monotonic()

    @property
    def seconds(self) -> float:
        """Active time so far."""
        return self._before_s + (0.0 if self._since is None else time.monotonic() - self._since)

    def halt(self) -> None:
        """Stand still."""
        self._before_s, self._since = self.seconds, None

    def go(self) -> None:
        """Go on."""
        if self._since is None:
            self._since = time.monotonic()
