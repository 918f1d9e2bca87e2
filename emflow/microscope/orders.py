"""Commands on their way through the server, and what is wrong with one that came over the wire."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import msgspec

from emflow.errors import printable
from emflow.microscope.answers import digest_of, refused
from emflow.microscope.protocol import COMMAND_ID, Command, Outcome, Receipt, from_wire


class Order:
    """One admitted command until its answer is remembered; fields change under the desk's lock.

    Attributes
    ----------
    abort : threading.Event
        Given to the backend: end the acquisition early.
    cause : (str, str) or None
        Code and reason of an early end.
    fenced : bool
        Its lease is lost: the action that runs is finished, none is begun after it.
    over : bool
        Nothing moves for it any more.
    receipt : Receipt or None
        Its answer, once remembered.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.digest = digest_of(command.action)
        self.admitted_ns = time.time_ns()
        self.began_ns = 0
        self.abort = threading.Event()
        self.cause: tuple[str, str] | None = None
        self.fenced = False
        self.over = False
        self.receipt: Receipt | None = None

    def end_early(self, code: str, reason: str, *, at_once: bool) -> None:
        """Let it end; the first cause stands."""
        self.cause = self.cause or (code, reason)
        self.fenced = True
        if at_once:
            self.abort.set()

    def so_far(self) -> Receipt:
        """Its answer, or that there is none yet."""
        return self.receipt or Receipt(
            command=self.command.id,
            outcome=Outcome.RUNNING,
            reason="it is executed" if self.began_ns else "it waits for its turn",
            admitted_ns=self.admitted_ns,
            began_ns=self.began_ns,
        )


def expired(order: Order, now_s: float) -> Receipt:
    """The answer to a command whose time was over before it was begun."""
    late_s = now_s - order.command.not_after_s
    return Receipt(
        command=order.command.id,
        outcome=Outcome.EXPIRED,
        code="expired",
        reason=f"its time was over {late_s:.3f} s ago",
        admitted_ns=order.admitted_ns,
        ended_ns=time.time_ns(),
    )


def reused(command: str) -> Receipt:
    """The answer to another command under an id that is known."""
    return refused(command, "id-reused", "another command has this id; its answer stands")


def received(value: object) -> Command | Receipt:
    """The command that was sent, or the receipt that says what is wrong with it, by name."""
    said = value.get("id") if isinstance(value, dict) else None
    name = said if isinstance(said, str) and COMMAND_ID.fullmatch(said) else ""
    try:
        if problem := _problem(value, ""):
            raise ValueError(problem)
        command = from_wire(Command, value)
        msgspec.json.encode(command)  # text that no file can hold (a lone surrogate) is refused here
        if not all(text.isprintable() for text in (command.trace, *command.based_on)):
            raise ValueError("trace and based_on must be printable")
        return command
    except (ValueError, OverflowError, RecursionError) as error:
        return refused(name, "malformed", printable(str(error))[:1000])


def _problem(value: object, where: str) -> str | None:
    """The first number that is none, by name: msgspec tells neither the key of a table nor the value."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where}: {value!r} is not a finite number"
    if isinstance(value, dict):
        for key, inner in value.items():
            name = f"{where}.{key}" if where else str(key)
            if where.endswith(("values", "expects")) and (
                isinstance(inner, bool) or not isinstance(inner, (int, float))
            ):
                return f"{name}: {str(inner)[:80]!r} is not a number"
            if found := _problem(inner, name):
                return found
    if isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            if found := _problem(inner, f"{where}[{number}]"):
                return found
    return None


def wire(record: msgspec.Struct) -> dict[str, Any]:
    """A record as plain builtins, with text that any terminal and any encoder takes."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain
