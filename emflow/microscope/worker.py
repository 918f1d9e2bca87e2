"""The one thread that moves the instrument: takes a command, checks it again, does it, remembers the answer."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from emflow.errors import printable
from emflow.microscope import sidecar
from emflow.microscope.answers import Intent, refused
from emflow.microscope.desk import Desk
from emflow.microscope.limits import actions_of
from emflow.microscope.orders import Order, expired
from emflow.microscope.protocol import (
    Aborted,
    Acquire,
    Acquired,
    Action,
    Batch,
    InstrumentError,
    Outcome,
    Receipt,
    Set,
    from_wire,
    to_wire,
)
from emflow.microscope.sidecar import Sidecar

RETRY_S = 0.5
"""Between tries to record an answer on a full disk."""

_log = logging.getLogger("emflow.microscope")


class _Ended(Exception):
    """A command ends without being done."""

    def __init__(self, outcome: Outcome, code: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.code, self.reason = outcome, code, reason


class Worker(threading.Thread):
    """Executes the desk's commands one by one until the desk closes.

    Parameters
    ----------
    desk : Desk
        Where commands come from and answers go.
    share : Path
        The folder that the backend writes scans to.
    """

    def __init__(self, desk: Desk, share: Path) -> None:
        super().__init__(name="emflow-microscope", daemon=True)
        self._desk, self._share = desk, share

    def run(self) -> None:
        """Serve the queue."""
        while (order := self._next()) is not None:
            try:
                receipt = self._answer(order)
            except Exception as error:  # noqa: BLE001 - a bug, ours or the backend's; the server goes on
                _log.exception("%s failed", order.command.id)
                receipt = self._receipt(order, Outcome.FAILED, "backend", _unexpected(error), ({}, (), 0.0))
            self._finish(order, receipt)

    def _next(self) -> Order | None:
        desk = self._desk
        with desk.changed:
            while not desk.queue:
                if desk.closing:
                    return None
                desk.changed.wait()
            desk.running = desk.queue.popleft()
        desk.lapse()  # the process may have slept since it was admitted
        return desk.running

    def _finish(self, order: Order, receipt: Receipt) -> None:
        """Remember an answer, then tell it; while the disk is full nothing else is done."""
        desk = self._desk
        order.over = True
        desk.beam.settle()
        if not receipt.final:  # nothing was begun, so the id is free again
            desk.drop(order, receipt.code, receipt.reason)
            return
        while True:
            try:
                desk.remember(order, receipt)
            except OSError as error:
                desk.trouble = f"the answer to {receipt.command} can't be recorded: {error.strerror}"
                _log.error("%s", desk.trouble)
                if desk.closing:
                    return  # the next server finds the intent, and asks the instrument
                time.sleep(RETRY_S)
            else:
                desk.trouble = ""
                return

    def _answer(self, order: Order) -> Receipt:
        desk, command = self._desk, order.command
        if order.cause is not None:  # in the moment in which it was taken from the queue
            code, reason = order.cause
            if code == "aborted":
                return self._receipt(order, Outcome.ABORTED, code, reason, ({}, (), 0.0))
            return refused(command.id, code, reason)
        if desk.clock() > command.not_after_s:
            return expired(order, desk.clock())
        facts: dict[str, Any] = {"admitted_ns": order.admitted_ns, "ended_ns": time.time_ns()}
        current = self._read()
        facts |= {"before": finite(current), "after": finite(current)}
        if off := desk.envelope.differs(command.expects, current):
            return refused(command.id, "expects", off, **facts)
        actions = actions_of(command.action)
        try:
            doses_e = tuple(0.0 if isinstance(one, Set) else float(desk.backend.dose_e(one)) for one in actions)
        except ValueError as error:
            return refused(command.id, "limits", printable(str(error)), **facts)
        if no := desk.envelope.refused(actions, current, doses_e, desk.answers.spent_e):
            return refused(command.id, no.code, no.reason, **facts)
        order.began_ns = time.time_ns()
        times = {"admitted_ns": order.admitted_ns, "began_ns": order.began_ns}
        intent = Intent(command=command, doses_e=doses_e, before=finite(current), **times)
        try:
            desk.answers.append(intent)
        except OSError as error:
            return refused(command.id, "busy", f"it can't be recorded, so it isn't done: {error.strerror}")
        desk.events.write("began", command.id, command.trace)
        return self._execute(order, actions, doses_e, finite(current))

    def _execute(
        self, order: Order, actions: Sequence[Acquire | Set], doses_e: Sequence[float], before: dict[str, float]
    ) -> Receipt:
        acquired: list[Acquired] = []
        dose_e = 0.0
        try:
            for number, (action, planned_e) in enumerate(zip(actions, doses_e, strict=True)):
                self._check(order, action, planned_e, dose_e)
                if isinstance(action, Set):
                    self._desk.envelope.moved(action, self._read())
                    self._desk.backend.set(dict(action.values))
                    continue
                dose_e += planned_e  # of a scan that is cut short it isn't known how much, so all of it counts
                acquired.append(self._acquire(order, action, number))
                dose_e += acquired[-1].dose_e - planned_e
        except (Aborted, _Ended, InstrumentError, OSError) as error:
            facts = (before, tuple(acquired), dose_e)
            return self._receipt(order, *_why(order, error), facts)
        except Exception as error:  # noqa: BLE001 - the backend's bug; what it did so far is still told
            _log.exception("%s: the backend failed", order.command.id)
            facts = (before, tuple(acquired), dose_e)
            return self._receipt(order, Outcome.FAILED, "backend", _unexpected(error), facts)
        return self._receipt(order, Outcome.DONE, "", "", (before, tuple(acquired), dose_e))

    def _check(self, order: Order, action: Acquire | Set, planned_e: float, spent_e: float) -> None:
        """Look again before each action: time has passed, and the instrument may have moved."""
        desk = self._desk
        desk.lapse()
        if order.cause is not None:
            raise Aborted
        spent_e += desk.answers.spent_e
        if no := desk.envelope.refused((action,), self._read(), (planned_e,), spent_e):
            raise _Ended(Outcome.FAILED, no.code, no.reason)

    def _acquire(self, order: Order, action: Acquire, number: int) -> Acquired:
        desk, command = self._desk, order.command
        name = name_of(command.id, command.action, number)
        desk.beam.settle(opening=True)
        if order.cause is not None:  # the lease went meanwhile: nothing is begun under it
            raise Aborted
        if desk.backend.blanked():
            raise InstrumentError(desk.beam.trouble or "the beam is blanked")
        made = desk.backend.acquire(action, name, command.trace, order.abort)
        if problem := misplaced(self._share, made, name):
            raise _Ended(Outcome.FAILED, "backend", problem)
        desk.events.write("written", command.id, command.trace, path=made.path)
        sidecar.write(self._share, Sidecar.of(command, made))
        desk.events.write("noted", command.id, command.trace, path=made.path)
        return made

    def _read(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._desk.backend.read().items()}

    def _receipt(
        self,
        order: Order,
        outcome: Outcome,
        code: str,
        reason: str,
        facts: tuple[dict[str, float], tuple[Acquired, ...], float],
    ) -> Receipt:
        before, acquired, dose_e = facts
        try:
            after = finite(self._read())
        except Exception:  # noqa: BLE001 - the answer counts more than what could not be read
            _log.exception("the controls can't be read after %s", order.command.id)
            after = {}
        return Receipt(
            command=order.command.id,
            outcome=outcome,
            code=code,
            reason=printable(reason)[:1000],
            before=before,
            after=after,
            acquired=acquired,
            dose_e=dose_e,
            admitted_ns=order.admitted_ns,
            began_ns=order.began_ns,
            ended_ns=time.time_ns(),
        )


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """What a record can hold: a control that reads NaN has no value."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def name_of(command: str, action: Action, number: int) -> str:
    """Stem of the file that an action makes: the command's id, in a batch with the action's index from 0."""
    return f"{command}-{number:02d}" if isinstance(action, Batch) else command


def misplaced(share: Path, made: Acquired, name: str) -> str | None:
    """Why what a backend says it wrote can't be believed; None: it can."""
    try:
        from_wire(Acquired, to_wire(made))  # what is no record could not be read back from the answers
    except (ValueError, TypeError) as error:
        return f"the backend tells of a scan in a way that is not understood: {printable(str(error))[:200]}"
    path = PurePosixPath(made.path)
    if path.is_absolute() or ".." in path.parts or "\\" in made.path or ":" in made.path:
        return "the backend names a file outside the folder of scans"
    if made.name != name or path.stem != name:
        return f"the backend calls the scan {made.name[:80]!r}, not {name!r}"
    if not (math.isfinite(made.dose_e) and made.dose_e >= 0):
        return f"the backend tells a dose of {made.dose_e!r} electrons"
    real = Path(os.path.realpath(share / path))
    if not real.is_relative_to(os.path.realpath(share)):
        return "the backend wrote outside the folder of scans"
    return None if real.is_file() else "the backend names a file that is not there"


def _why(order: Order, error: Exception) -> tuple[Outcome, str, str]:
    if isinstance(error, _Ended):
        return error.outcome, error.code, error.reason
    if isinstance(error, Aborted) or order.abort.is_set():
        code, reason = order.cause or ("aborted", "the backend ended it")
        return Outcome.ABORTED, code, reason
    if isinstance(error, OSError):
        _log.error("%s: %s", order.command.id, error)
        return Outcome.FAILED, "disk", f"what was acquired can't be kept: {error.strerror}"
    return Outcome.FAILED, "instrument", str(error)


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__} in the backend; the server's log says more"
