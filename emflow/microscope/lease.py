"""The lease: who may send commands, until when, and under which epoch.  No clock, thread or file of its own."""

from __future__ import annotations

import msgspec

from emflow.microscope.protocol import Lease, Role


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the lease."""

    role: Role
    name: str


class LeaseBook:
    """State of the lease; times are seconds on one monotonic clock.

    Parameters
    ----------
    ttl_s : float
        How long a lease lasts after it was taken or renewed.
    epoch : int
        The last one that was ever given; the next is higher.
    """

    def __init__(self, ttl_s: float, epoch: int) -> None:
        self.ttl_s = ttl_s
        self.epoch = epoch
        self.holder: Holder | None = None
        self._until_s = 0.0

    def objection(self, who: Holder, now_s: float) -> str | None:
        """Why somebody may not take the lease now; None: they may."""
        if who.role == "viewer":
            return "a viewer holds no lease"
        held = self.holder
        if held is None or self.overdue(now_s) or held == who or who.role == "operator":
            return None
        return f"{held.role} {held.name} holds it for another {self.left_s(now_s):.1f} s"

    def give(self, who: Holder, epoch: int, now_s: float) -> None:
        """Give it to somebody under a new epoch, which fences every older one."""
        self.holder, self.epoch, self._until_s = who, epoch, now_s + self.ttl_s

    def valid(self, who: Holder, epoch: int, now_s: float) -> str | None:
        """The code of why a command or a renewal under an epoch does not count; None: it does."""
        if epoch != self.epoch:
            return "epoch"
        if self.holder is None or self.overdue(now_s) or self.holder != who:
            return "lease"
        return None

    def why(self, epoch: int) -> str:
        """What `valid` found, for people."""
        held = self.holder
        if held is None:
            return "nobody holds the lease: take it"
        if epoch != self.epoch:
            return f"epoch {epoch} is not {self.epoch}, the one of {held.role} {held.name}"
        return f"the lease is that of {held.role} {held.name}, and ran out or is not yours"

    def renew(self, now_s: float) -> None:
        """Let it last another ttl."""
        self._until_s = now_s + self.ttl_s

    def end(self) -> None:
        """Nobody holds it any more."""
        self.holder = None

    def overdue(self, now_s: float) -> bool:
        """Whether somebody holds it who did not renew it in time."""
        return self.holder is not None and now_s >= self._until_s

    def left_s(self, now_s: float) -> float:
        """Seconds until it ends; 0 where nobody holds it."""
        return max(0.0, self._until_s - now_s) if self.holder else 0.0

    def as_reply(self, now_s: float) -> Lease:
        """The lease as its holder is told."""
        return Lease(epoch=self.epoch, holder=self.holder.name if self.holder else "", ttl_s=self.ttl_s, now_s=now_s)
