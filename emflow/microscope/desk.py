"""The server's state and every move of it: lease, STOP, queue, beam.  Nothing here waits for the instrument's worker.

One lock guards all of it and is held for moments only, never during an fsync or an acquisition.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from emflow.microscope.answers import Answer, Answers, Epoch, Latch, refused
from emflow.microscope.beam import Beam
from emflow.microscope.happenings import Happenings
from emflow.microscope.lease import Holder, LeaseBook
from emflow.microscope.limits import Envelope
from emflow.microscope.orders import Order, expired, reused
from emflow.microscope.protocol import Command, Lease, Microscope, Mode, Receipt
from emflow.microscope.settings import Settings

SUBJECT = "microscope"
"""Of events that belong to no command."""

_log = logging.getLogger("emflow.microscope")


class Desk:
    """Who may do what now, and what is to be done.

    Parameters
    ----------
    settings : Settings
        Of the server.
    backend : Microscope
        Only `read`, `blank` and `blanked` are called here, which any thread may.
    answers, events
        The server's memory, and what it tells.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Microscope,
        answers: Answers,
        events: Happenings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.backend, self.answers, self.events, self.clock = settings, backend, answers, events, clock
        self.envelope = Envelope(settings.limits, clock)
        for begun in answers.recent:
            self.envelope.earlier(begun.command.action, begun.before, 1e-9 * (time.time_ns() - begun.began_ns))
        self.lease = LeaseBook(settings.server.lease_s, answers.epoch)
        self.latch = answers.latch
        self.changed = threading.Condition()
        self.queue: deque[Order] = deque()
        self.running: Order | None = None
        self.closing = False
        self.trouble = self.latch_trouble = self._hold = ""
        self._orders: dict[str, Order] = {}
        self._taking, self._latching = threading.Lock(), threading.Lock()
        self.beam = Beam(backend, self._blank_wanted)

    # --- commands

    def admit(self, command: Command, who: Holder) -> Order | Receipt:
        """Queue a command, or find it; a receipt where it is answered already, or can't be admitted."""
        order = Order(command)
        with self.changed:
            known = self._orders.get(command.id)
            if known is None and (answer := self.answers.find(command.id)) is not None:
                return answer.receipt if answer.action == order.digest else reused(command.id)
            if known is not None:
                return known if known.digest == order.digest else reused(command.id)
            if objection := self._objection(command, who):
                return refused(command.id, *objection)
            final = self._hopeless(order)
            self._orders[command.id] = order
            if final is None:
                self.events.write("admitted", command.id, command.trace, role=who.role, caller=who.name)
                self.queue.append(order)
                self.changed.notify_all()
                return order
        try:
            self.remember(order, final)
        except OSError as error:
            return self.drop(order, "busy", f"the answer can't be recorded: {error.strerror}")
        return final

    def _objection(self, command: Command, who: Holder) -> tuple[str, str] | None:
        if self.closing:
            return "busy", "the server ends"
        if who.role == "viewer":
            return "not-allowed", "a viewer sends no commands"
        if self.latch.stopped:
            return "stopped", f"STOP is pressed ({self.latch.reason}); an operator releases it"
        if code := self.lease.valid(who, command.epoch, self.clock()):
            return code, self.lease.why(command.epoch)
        if len(self.queue) >= self.settings.limits.max_queue:
            return "busy", f"{len(self.queue)} commands wait already"
        return None

    def _hopeless(self, order: Order) -> Receipt | None:
        """The final answer to a command that can't be executed whatever comes."""
        facts = {"admitted_ns": order.admitted_ns, "ended_ns": time.time_ns()}
        if self.clock() > order.command.not_after_s:
            return expired(order, self.clock())
        if problem := self.envelope.outside(order.command.action):
            return refused(order.command.id, problem.code, problem.reason, **facts)
        return None

    def find(self, command: str) -> Order | Receipt:
        """What is known of a command."""
        with self.changed:
            order = self._orders.get(command)
            if order is not None:
                return order
            answer = self.answers.find(command)
        return answer.receipt if answer else refused(command, "never-seen", "no command of that id was admitted here")

    def remember(self, order: Order, receipt: Receipt) -> None:
        """Record the answer of a command, then tell it."""
        self.answers.append(Answer(receipt=receipt, action=order.digest))
        facts = {"outcome": receipt.outcome.value, "code": receipt.code}
        self.events.write("ended", receipt.command, order.command.trace, **facts)
        self.tell(order, receipt)

    def drop(self, order: Order, code: str, reason: str) -> Receipt:
        """Answer a command that was not begun and may be sent again."""
        receipt = refused(order.command.id, code, reason, admitted_ns=order.admitted_ns)
        self.events.write("ended", order.command.id, order.command.trace, outcome=receipt.outcome.value, code=code)
        self.tell(order, receipt)
        return receipt

    def tell(self, order: Order, receipt: Receipt) -> None:
        """Give a receipt to all who wait for it."""
        with self.changed:
            order.receipt = receipt
            self._orders.pop(order.command.id, None)
            if self.running is order:
                self.running = None
            self.changed.notify_all()

    def drop_queue(self, code: str, reason: str) -> None:
        """Answer all that waits; under the lock."""
        while self.queue:
            self.drop(self.queue.popleft(), code, reason)

    # --- stop, abort

    @property
    def mode(self) -> tuple[Mode, str]:
        """What the server does, and why; under the lock."""
        if self.latch.stopped:
            return Mode.STOPPED, self.latch.reason
        if self.running is not None:
            return Mode.BUSY, ""
        return (Mode.HOLD, self._hold) if self._hold else (Mode.READY, "")

    def stop(self, reason: str) -> None:
        """End everything, blank the beam, and stay so until it is released."""
        with self.changed:
            self.latch = Latch(stopped=True, reason=reason, wall_ns=time.time_ns())
            if self.running is not None:
                self.running.end_early("stopped", reason, at_once=True)
            self.drop_queue("stopped", reason)
            self.changed.notify_all()
        self.beam.settle()
        self._record_latch()
        self.events.write("stopped", SUBJECT, "", reason=reason)

    def release(self, reason: str) -> None:
        """End STOP."""
        with self.changed:
            self.latch = Latch(stopped=False, reason=reason, wall_ns=time.time_ns())
            if self.lease.holder is None:
                self._hold = self._hold or "released from STOP; nobody holds the lease"
        self._record_latch()
        self.events.write("released", SUBJECT, "", reason=reason)

    def _record_latch(self) -> None:
        with self._latching:  # the newest is the last line, whoever comes first
            try:
                if self.answers.latch != self.latch:
                    self.answers.append(self.latch)
                self.latch_trouble = ""
            except OSError as error:
                self.latch_trouble = f"STOP or its release can't be recorded: {error.strerror}"
                _log.error("%s", self.latch_trouble)

    def troubles(self) -> str:
        """What is wrong with the server itself, in whatever mode it is."""
        return "; ".join(filter(None, (self.trouble, self.latch_trouble, self.beam.trouble)))

    def abort(self, reason: str) -> None:
        """End the command that runs, if any."""
        with self.changed:
            if self.running is not None:
                self.running.end_early("aborted", reason, at_once=True)

    # --- lease

    def take(self, who: Holder) -> Lease:
        """Give the lease to somebody under a new epoch, recorded before it counts."""
        with self._taking:
            with self.changed:
                now_s = self.clock()
                objection = "the server ends" if self.closing else self.lease.objection(who, now_s)
                if objection:
                    code = "not-allowed" if who.role == "viewer" else "busy" if self.closing else "lease"
                    return Lease(epoch=0, now_s=now_s, code=code, reason=objection)
                epoch = self.lease.epoch + 1
            try:
                self.answers.append(Epoch(epoch=epoch, role=who.role, holder=who.name, wall_ns=time.time_ns()))
            except OSError as error:
                return Lease(epoch=0, now_s=now_s, code="busy", reason=f"it can't be recorded: {error.strerror}")
            with self.changed:
                if self.lease.holder == who:
                    self.drop_queue("epoch", f"{who.name} took the lease again")
                elif self.lease.holder is not None:
                    self._lose(f"{who.role} {who.name} took the lease", hold=False)
                self.lease.give(who, epoch, self.clock())
                self._hold = ""
                self.changed.notify_all()
                given = self.lease.as_reply(self.clock())
        self.beam.settle()
        self.events.write("lease", SUBJECT, "", epoch=epoch, role=who.role, caller=who.name)
        return given

    def renew(self, who: Holder, epoch: int) -> Lease:
        """Let the lease last longer."""
        with self.changed:
            now_s = self.clock()
            if code := self.lease.valid(who, epoch, now_s):
                return Lease(epoch=0, now_s=now_s, code=code, reason=self.lease.why(epoch))
            self.lease.renew(now_s)
            return self.lease.as_reply(now_s)

    def give_back(self, who: Holder, epoch: int) -> Lease:
        """End the lease; what waits is answered, what runs goes as if it had run out."""
        with self.changed:
            now_s = self.clock()
            if code := self.lease.valid(who, epoch, now_s):
                return Lease(epoch=0, now_s=now_s, code=code, reason=self.lease.why(epoch))
            self._lose(f"{who.role} {who.name} gave the lease back", hold=True)
        self.beam.settle()
        self.events.write("hold", SUBJECT, "", reason=self._hold)
        return Lease(epoch=epoch, now_s=now_s)

    def watch_lease(self) -> None:
        """Body of the thread that ends a lease which was not renewed, and tries again what a fault has prevented."""
        while True:
            with self.changed:
                if self.closing:
                    return
                if not self.lease.overdue(self.clock()):
                    self.changed.wait(min(self.lease.left_s(self.clock()) or 1.0, 1.0))
            self.lapse()
            if self.beam.trouble:
                self.beam.settle()
            if self.latch_trouble:
                self._record_latch()

    def lapse(self) -> None:
        """End the lease if it was not renewed in time."""
        with self.changed:
            held = self.lease.holder
            if held is None or not self.lease.overdue(self.clock()):
                return
            why = f"the lease of {held.role} {held.name} ran out"
            self._lose(why, hold=True)
        self.beam.settle()
        _log.warning("%s: the beam is blanked", why)
        self.events.write("hold", SUBJECT, "", reason=why)

    def _lose(self, why: str, *, hold: bool) -> None:
        self.drop_queue("lease", why)
        if self.running is not None:
            self.running.end_early("lease", why, at_once=self.settings.server.on_lease_lost == "abort")
        self.lease.end()
        self._hold = why if hold else ""
        self.changed.notify_all()

    def _blank_wanted(self, opening: bool) -> bool | None:
        """Whether STOP or a lost lease demands a blanked beam, the lease allows to open it, or neither (None)."""
        with self.changed:
            order = self.running
            moves = order is not None and not order.over and not order.abort.is_set()
            if self.latch.stopped or (self.closing and not moves):
                return True
            if self.lease.holder is not None and not self.lease.overdue(self.clock()):
                return False if opening and order is not None and order.cause is None else None
            return None if moves else True
