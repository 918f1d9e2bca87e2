"""The microscope's server: what may be called over RPC, and how all its parts are put together."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from emflow import registry, rpc
from emflow.errors import ConfigError, printable
from emflow.microscope.answers import Answers
from emflow.microscope.desk import Desk
from emflow.microscope.happenings import Happenings
from emflow.microscope.lease import Holder
from emflow.microscope.orders import Order, received, wire
from emflow.microscope.protocol import OBJECT, Lease, Microscope, Receipt, Refusal, Status
from emflow.microscope.recovery import recover
from emflow.microscope.settings import Settings
from emflow.microscope.state_lock import StateLock
from emflow.microscope.worker import Worker, finite

METHODS = ("execute", "receipt", "status", "limits", "events", "abort", "stop", "release", "lease")
"""All that a client may call."""
MAX_WAIT_S = 30.0
LONG_WAITS, BRIEF_S = rpc.CONNECTIONS // 2, 0.25
"""So many calls wait as long as they like at the same time; the others are answered after a moment, and ask again."""
ADDRESS_FILE = "address.json"
CLOSING_S = 20.0
"""How long a backend may take to end its acquisition when the server ends."""

_log = logging.getLogger("emflow.microscope")


class MicroscopeServer:
    """The remote methods; each takes and gives plain builtins.  All but `execute` answer at once, whatever runs.

    Parameters
    ----------
    desk : Desk
        The state behind them.
    backend : str
        Its name, for `status`.
    started_ns : int
        Wall clock.
    """

    def __init__(self, desk: Desk, backend: str, started_ns: int) -> None:
        self._desk, self._backend, self._started_ns = desk, backend, started_ns
        self._places = threading.Semaphore(LONG_WAITS)

    def execute(self, command: object, wait_s: object = 0.0) -> dict[str, Any]:
        """Admit a command, or find it where its id is known, and wait for its answer; a `Receipt`."""
        asked = received(command)
        return self._waited(asked if isinstance(asked, Receipt) else self._desk.admit(asked, _who()), wait_s)

    def receipt(self, command: object, wait_s: object = 0.0) -> dict[str, Any]:
        """What is known of a command; asks only."""
        if not isinstance(command, str):
            return wire(Refusal(code="malformed", reason="the id of a command is text"))
        return self._waited(self._desk.find(printable(command[:80])), wait_s)

    def status(self) -> dict[str, Any]:
        """How the microscope is, a `Status`."""
        desk = self._desk
        try:
            controls, blanked = finite(desk.backend.read()), bool(desk.backend.blanked())
            unread = ""
        except Exception:  # noqa: BLE001 - a backend's trouble must not hide the rest
            _log.exception("the controls can't be read")
            controls, blanked, unread = {}, False, "the controls can't be read: the server's log says why"
        with desk.changed:
            mode, reason = desk.mode
            now_s = desk.clock()
            held = desk.lease.holder
            status = Status(
                backend=self._backend,
                mode=mode,
                reason="; ".join(filter(None, (reason, desk.troubles(), unread))),
                controls=controls,
                blanked=blanked,
                command=desk.running.command.id if desk.running else "",
                queued=len(desk.queue),
                holder=held.name if held else "",
                role=held.role if held else "",
                epoch=desk.lease.epoch if held else 0,
                lease_left_s=desk.lease.left_s(now_s),
                now_s=now_s,
                started_ns=self._started_ns,
                dose_e=desk.answers.spent_e,
            )
        return wire(status)

    def limits(self) -> dict[str, Any]:
        """The envelope, as in the settings file."""
        return wire(self._desk.settings.limits)

    def events(self, after: object = 0, wait_s: object = 0.0) -> dict[str, Any]:
        """Events from number ``after`` on, and the number to ask with next; waits for one."""
        if type(after) is not int or after < 0:
            return wire(Refusal(code="malformed", reason="after: expected a whole number from 0"))
        with self._waiting(wait_s) as seconds:
            found, following = self._desk.events.after(after, seconds)
        return {"events": found, "next": following}

    def abort(self, reason: object = "") -> dict[str, Any]:
        """End the command that runs; the next one follows."""
        who = _who()
        if who.role == "viewer":
            return wire(Refusal(code="not-allowed", reason="a viewer aborts nothing; anybody may stop everything"))
        self._desk.abort(_told(who, reason))
        return self.status()

    def stop(self, reason: object = "") -> dict[str, Any]:
        """End everything, blank the beam, and stay so; anybody may."""
        self._desk.stop(_told(_who(), reason))
        return self.status()

    def release(self, reason: object = "") -> dict[str, Any]:
        """End STOP; only an operator may."""
        who = _who()
        if who.role != "operator":
            return wire(Refusal(code="not-allowed", reason="only an operator releases STOP"))
        self._desk.release(_told(who, reason))
        return self.status()

    def lease(self, verb: object, epoch: object = 0) -> dict[str, Any]:
        """``take``, ``renew`` or ``give_back`` the lease; a `Lease`."""
        if type(epoch) is not int:
            return wire(Refusal(code="malformed", reason="epoch: expected a whole number"))
        if verb == "take":
            return wire(self._desk.take(_who()))
        if verb == "renew":
            return wire(self._desk.renew(_who(), epoch))
        if verb == "give_back":
            return wire(self._desk.give_back(_who(), epoch))
        return wire(Lease(epoch=0, code="malformed", reason="expected take, renew or give_back"))

    def _waited(self, found: Order | Receipt, wait_s: object) -> dict[str, Any]:
        if isinstance(found, Receipt):
            return wire(found)
        with self._waiting(wait_s) as seconds, self._desk.changed:
            self._desk.changed.wait_for(lambda: found.receipt is not None, seconds)
            return wire(found.so_far())

    @contextlib.contextmanager
    def _waiting(self, wait_s: object) -> Iterator[float]:
        """How long a call may wait: only some for long at the same time, so that a STOP always finds a thread."""
        seconds = _seconds(wait_s)
        place = seconds > BRIEF_S and self._places.acquire(blocking=False)
        try:
            yield seconds if place else min(seconds, BRIEF_S)
        finally:
            if place:
                self._places.release()


def _who() -> Holder:
    calling = rpc.caller()
    return Holder(role=calling.role, name=calling.name)


def _told(who: Holder, reason: object) -> str:
    text = printable(reason[:500]) if isinstance(reason, str) else ""
    return f"{who.role} {who.name}" + (f": {text}" if text else "")


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    if isinstance(value, float) and math.isnan(value):
        return 0.0
    return float(min(max(value, 0), MAX_WAIT_S))


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Serve a microscope until the block ends; the value is the real address.

    Raises
    ------
    Busy
        Another server has this state folder.
    ConfigError
        The address can be reached from other machines, or the backend does not take its parameters.
    """
    share, state = Path(settings.server.folder), Path(settings.server.state)
    for folder in (share, state):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(StateLock(state))
        answers = Answers(state)
        stack.callback(answers.close)
        events = Happenings(state)
        stack.callback(events.close)
        backend = _backend(settings, share, state)
        stack.callback(backend.close)
        desk = Desk(settings, backend, answers, events)
        desk.beam.settle()  # first of all: a server that was killed in mid-scan has left it open
        recover(desk, share)
        started_ns = time.time_ns()
        methods = (MicroscopeServer(desk, settings.backend.use, started_ns), METHODS)
        server = stack.enter_context(rpc.Server(settings.server.address, {OBJECT: methods}))
        worker = Worker(desk, share)
        watcher = threading.Thread(target=desk.watch_lease, name="emflow-lease", daemon=True)
        worker.start()
        watcher.start()
        stack.callback(_ended, desk, worker, watcher)
        server.start()
        _publish(state / ADDRESS_FILE, {"address": server.address, "pid": os.getpid(), "started_ns": started_ns})
        stack.callback((state / ADDRESS_FILE).unlink, missing_ok=True)
        yield server.address


def _backend(settings: Settings, share: Path, state: Path) -> Microscope:
    """Build the backend; its private folder lies in the server's state."""
    private = state / "backend"
    private.mkdir(exist_ok=True)
    made = registry.load("microscopes", settings.backend.use)
    try:
        backend: Microscope = made(share, private, dict(settings.backend.parameters))
    except (ValueError, TypeError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"backend {settings.backend.use!r} does not take its parameters: {printable(str(error))}",
            next_step="Correct [backend.parameters]",
        ) from error
    return backend


def _ended(desk: Desk, worker: threading.Thread, watcher: threading.Thread) -> None:
    """End what runs, answer what waits, and blank the beam."""
    with desk.changed:
        desk.closing = True
        if desk.running is not None:
            desk.running.end_early("closed", "the server ends", at_once=True)
        desk.drop_queue("busy", "the server ends")
        desk.lease.end()
        desk.changed.notify_all()
    worker.join(CLOSING_S)
    watcher.join(CLOSING_S)
    if worker.is_alive():
        _log.error("the backend does not end its acquisition; the next server asks what became of it")
    desk.beam.settle()


def _publish(path: Path, value: dict[str, Any]) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="ascii")
    temporary.replace(path)
