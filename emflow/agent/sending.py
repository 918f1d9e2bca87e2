"""The agent's hand on the microscope: the lease, one command after the other, and what the answers mean."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from emflow.agent.control import Control, Finished
from emflow.agent.protocol import Ending
from emflow.agent.records import Planned
from emflow.config import MicroscopeSettings
from emflow.errors import Busy, EmflowError, NotAllowed, Unavailable, UsageError, printable
from emflow.microscope.client import LeaseKeeper, MicroscopeClient
from emflow.microscope.protocol import NOT_ADMITTED, Command, Outcome, Receipt, Status, command_id
from mpi_kernels import jsonfile
from mpi_kernels.contract import Event
from mpi_kernels.events import EventLog, read_events

NOT_AFTER_S = 60.0
"""A command that was not begun so long after it was sent has lost its reason."""

AGAIN_S = 0.2
"""Pause before a command that was not admitted is sent again."""

WATCH_S = 0.1
"""How often the watcher looks whether it is still needed."""

MICROSCOPE_EVENTS = "events-microscope.jsonl"

_log = logging.getLogger(__name__)


class Held(Exception):
    """Nothing more is sent until a person resumes; the text says why."""


class Hand:
    """Sends commands under a lease; used by the loop's thread only.

    Parameters
    ----------
    settings : MicroscopeSettings
        Where the microscope's server listens, and how long a cut connection is waited for.
    experiment : str
        Id of the experiment, which is part of the name that the lease is held under: another process that goes on
        with the experiment takes the lease at once, and fences this one.
    """

    def __init__(self, settings: MicroscopeSettings, experiment: str, control: Control, events: EventLog) -> None:
        self._patience_s = settings.patience_s
        self._control, self._events = control, events
        self.client = MicroscopeClient(
            settings.address, role="agent", name=f"agent {experiment}", patience_s=settings.patience_s
        )
        self._keeper: LeaseKeeper | None = None
        self._offset_s = 0.0
        self._experiment = experiment
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="emflow-agent-stop", daemon=True)
        self._watcher.start()

    # --- the lease

    def take(self) -> None:
        """Take the lease and keep it.

        Raises
        ------
        Busy
            Somebody else holds it.
        """
        self._let_go()
        lease = self.client.take_lease()
        if not lease.epoch:
            raise Busy(
                f"the microscope can't be had: {printable(lease.reason)}", next_step="Ask who holds it to give it back"
            )
        # the reply is older than the moment it is read: a deadline made of it is early, never late
        self._offset_s = lease.now_s - time.monotonic()
        self._keeper = LeaseKeeper(self.client, lease)

    def _let_go(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    def _epoch(self) -> int:
        if self._keeper is None or self._keeper.lost.is_set():
            self._retake()
        assert self._keeper is not None
        return self._keeper.epoch

    def _retake(self) -> None:
        """Take a lost lease again: under a new epoch, so that nothing of the old one counts any more."""
        try:
            self.take()
        except Busy as busy:
            raise Held(busy.message) from None

    # --- commands

    def execute(self, planned: Planned, expects: Mapping[str, float], based_on: tuple[str, ...]) -> Receipt:
        """Send a command until its answer is final.

        Raises
        ------
        Held
            Somebody else has the lease, or keeps the microscope busy.
        Finished
            The microscope is stopped, does not know this agent, or did not come back.
        """
        until = time.monotonic() + self._patience_s
        self._events.write("sent", subject=planned.id, trace=planned.trace)
        while True:
            self._control.check_stop()
            receipt = self._once(planned, expects, based_on)
            if receipt.final:
                self._events.write(
                    "received",
                    subject=planned.id,
                    trace=planned.trace,
                    outcome=receipt.outcome.value,
                    code=receipt.code,
                )
                return receipt
            if receipt.outcome is Outcome.RUNNING:  # only where the wait was ended by a wish to stop
                continue
            self._refused(receipt, until)

    def _once(self, planned: Planned, expects: Mapping[str, float], based_on: tuple[str, ...]) -> Receipt:
        command = Command(
            id=planned.id,
            trace=planned.trace,
            action=planned.action,
            epoch=self._epoch(),
            not_after_s=time.monotonic() + self._offset_s + NOT_AFTER_S,
            expects=dict(expects),
            based_on=based_on,
        )
        try:
            return self.client.execute(command, stop=self._control.stopping)
        except Unavailable:
            self._control.check_stop()  # then it was our own wish that ended the wait
            raise

    def _refused(self, receipt: Receipt, until: float) -> None:
        """What a refusal means that says nothing of the command: the same id may be sent again."""
        reason = f"{receipt.code}: {printable(receipt.reason)}"
        if receipt.code == "stopped":
            raise Finished(Ending.STOPPED, f"the microscope is stopped: {printable(receipt.reason)}")
        if receipt.code in ("malformed", "not-allowed"):
            raise Finished(Ending.FAILED, f"the microscope does not take {receipt.command}: {reason}")
        if receipt.code in ("lease", "epoch"):
            self._retake()
        if time.monotonic() > until:
            raise Held(f"the microscope does not take {receipt.command}: {reason}")
        self._control.nap(AGAIN_S)

    def check_unused(self) -> None:
        """Look that the microscope knows no command of an experiment that begins.

        Raises
        ------
        UsageError
            It does: it would give old answers, and old scans would count as new ones.
        """
        if self.client.receipt(command_id(self._experiment, 0, 0)).code != "never-seen":
            raise UsageError(
                f"the microscope has executed commands of an experiment {self._experiment}, and its log is not here",
                next_step="Leave --experiment out: a new one gets an id of its own",
            )

    def asked(self, planned: Planned) -> Receipt | None:
        """The final answer that a command got from the microscope before; None if it was never executed, or runs."""
        receipt = self.client.receipt(planned.id)
        return receipt if receipt.final and receipt.code not in NOT_ADMITTED else None

    def _watch(self) -> None:
        """Body of the thread that ends our own command at once when somebody asks to stop; `execute` hears of it."""
        while not self._control.stopping.wait(WATCH_S):
            if self._closed.is_set():
                return
        try:
            if self.client.status().command.startswith(f"{self._experiment}-"):
                self.client.abort("the experiment is stopped")
        except EmflowError as error:
            _log.warning("the running command could not be aborted: %s", printable(str(error)))

    def status(self) -> Status:
        """How the microscope is now."""
        return self.client.status()

    def abort(self, planned: Planned, reason: str) -> Receipt | None:
        """End a command of ours that is being executed, and wait for its answer; None if it was never executed."""
        receipt = self.client.receipt(planned.id)
        if receipt.outcome is not Outcome.RUNNING:
            return receipt if receipt.final and receipt.code not in NOT_ADMITTED else None
        if self.client.status().command != planned.id:
            return None  # it waits for somebody else's, and goes with the lease
        self.client.abort(reason)
        until = time.monotonic() + self._patience_s
        while receipt.outcome is Outcome.RUNNING and time.monotonic() < until:
            time.sleep(0.02)
            receipt = self.client.receipt(planned.id)
        return receipt if receipt.final else None

    def close(self) -> None:
        """Give the lease back, and everything else."""
        self._closed.set()
        self._watcher.join()
        try:
            self._let_go()
        except EmflowError as error:
            _log.warning("the lease could not be given back: %s", printable(str(error)))
        finally:
            self.client.close()


class EventCopy:
    """Copies the microscope's events of one experiment into its folder, each once."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self._path = folder / MICROSCOPE_EVENTS
        self._experiment = experiment
        self._next = 0
        known = read_events(self._path) if self._path.exists() else ()
        self._known = {(e.host, e.pid, e.seq) for e in known}

    def pull(self, client: MicroscopeClient) -> None:
        """Copy what is new; a microscope that can't be asked is asked again later."""
        try:
            while True:
                events, following = client.events(self._next, 0.0)
                self._write(events)
                if following == self._next or not events:
                    return
                self._next = following
        except (Unavailable, NotAllowed, OSError) as error:  # what it tells is never worth an experiment
            _log.warning("events of the microscope could not be copied: %s", printable(str(error)))

    def _write(self, events: list[Event]) -> None:
        new = [e for e in events if e.subject.startswith(self._experiment)]
        new = [e for e in new if (e.host, e.pid, e.seq) not in self._known]
        if new:
            with self._path.open("ab") as file:
                file.write(b"".join(jsonfile.encode(event) + b"\n" for event in new))
            self._known |= {(e.host, e.pid, e.seq) for e in new}


__all__ = ["EventCopy", "Hand", "Held"]
