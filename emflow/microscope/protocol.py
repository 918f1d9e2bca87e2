"""The words of the control plane: actions, commands, receipts, and what a microscope has to do.

Only msgspec and the standard library: this module also runs inside the microscope's own software.
Numbers carry their unit in their name; pairs are ``(y, x)``.
"""

from __future__ import annotations

import enum
import math
import re
import threading
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

EXPERIMENT_ID = re.compile(r"e[0-9a-f]{12}")
COMMAND_ID = re.compile(r"(?P<experiment>e[0-9a-f]{12})-(?P<decision>[0-9]{4})-(?P<number>[0-9]{2})")
SCAN_NAME = re.compile(r"(?P<command>e[0-9a-f]{12}-[0-9]{4}-[0-9]{2})(-[0-9]{2})?")
"""Stem of every file that a command made: the command's id, and in a batch the number of the action."""

OBJECT = "emflow.microscope"
"""Name of the server's object in its Pyro5 daemon."""

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z][A-Za-z0-9_.]{0,63}\Z")]  # $ also matches before a newline
CommandId = Annotated[str, msgspec.Meta(pattern=r"^e[0-9a-f]{12}-[0-9]{4}-[0-9]{2}\Z")]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


# --- actions: what a microscope can be asked to do


class Set(_Strict, frozen=True, kw_only=True, tag_field="verb", tag="set"):
    """Bring controls to values, absolute, in the unit that the control's name ends with (``C10_nm``)."""

    values: dict[Name, float]


class Scan(_Strict, frozen=True, kw_only=True, tag_field="verb", tag="scan"):
    """A two-dimensional scan with a detector of one pixel (dark field): one image of ``shape``."""

    shape: tuple[Count, Count]
    step_nm: float
    dwell_us: float
    centre_nm: tuple[float, float] = (0.0, 0.0)


class Camera(_Strict, frozen=True, kw_only=True, tag_field="verb", tag="camera"):
    """A series of camera frames of the parked probe (Ronchigrams): a stack of ``frames``."""

    frames: Count
    exposure_us: float


class Scan4d(_Strict, frozen=True, kw_only=True, tag_field="verb", tag="scan4d"):
    """A camera frame at every position of a scan."""

    shape: tuple[Count, Count]
    step_nm: float
    exposure_us: float
    centre_nm: tuple[float, float] = (0.0, 0.0)


Acquire = Scan | Camera | Scan4d
Single = Set | Scan | Camera | Scan4d


class Batch(_Strict, frozen=True, kw_only=True, tag_field="verb", tag="batch"):
    """Actions in order under one id; the first that is not done ends it."""

    actions: Annotated[tuple[Single, ...], msgspec.Meta(min_length=1, max_length=64)]


Action = Set | Scan | Camera | Scan4d | Batch


class Command(_Strict, frozen=True, kw_only=True):
    """One request to a microscope.

    Attributes
    ----------
    id : str
        ``<experiment>-<decision>-<number>``; the same id is executed once, whatever is sent how often.
    trace : str
        Joins all events of the acquisition that it makes, see `mpi_kernels.contract.Event`.
    expects : dict
        Values of controls on which it was based; another value (beyond the control's tolerance) refuses it.
    not_after_s : float
        On the microscope's monotonic clock (`Status.now_s`, `Lease.now_s`): not begun by then, it expires.
    based_on : tuple of str
        Names of the jobs whose results led to it.
    epoch : int
        Of the lease that it was sent under; an older one is not admitted.
    """

    id: CommandId
    trace: Annotated[str, msgspec.Meta(max_length=64)]
    action: Action
    epoch: int
    not_after_s: float
    expects: dict[Name, float] = {}
    based_on: tuple[Annotated[str, msgspec.Meta(max_length=64)], ...] = ()
    v: Literal[1] = 1


# --- receipts


class Outcome(enum.StrEnum):
    """What became of a command."""

    RUNNING = "running"  # admitted; ask again
    DONE = "done"
    REFUSED = "refused"  # not executed: `Receipt.code` says why
    EXPIRED = "expired"  # not executed: its time was over
    ABORTED = "aborted"  # begun, and ended early on request or with its lease
    FAILED = "failed"  # begun, and the instrument said no
    UNKNOWN = "unknown"  # begun, and the server ended meanwhile: `Receipt.after` is what it found when it came back


NOT_ADMITTED = frozenset({"malformed", "lease", "epoch", "stopped", "busy", "never-seen", "not-allowed"})
"""Codes of refusals that say something of the sender or the moment, not of the command: they are not remembered, and
the same id may be sent again.  All other answers are final."""


class Acquired(_Strict, frozen=True, kw_only=True):
    """One acquisition that a command made: ``path`` is relative to the share, with ``/``."""

    name: str
    path: str
    kind: Literal["image", "stack", "4d"]
    scan_shape: tuple[int, ...]
    det_shape: tuple[int, int]
    frames: int
    dose_e: float


class Receipt(_Strict, frozen=True, kw_only=True):
    """What the microscope did about a command, with all controls before and after.

    ``code`` names the reason of a refusal or failure for programs (``limits``, ``expects``, ``lease``, ...), ``reason``
    tells it to people.  Times are wall clock, ns, 0 where it did not happen.
    """

    command: str
    outcome: Outcome
    code: str = ""
    reason: str = ""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    acquired: tuple[Acquired, ...] = ()
    dose_e: float = 0.0
    admitted_ns: int = 0
    began_ns: int = 0
    ended_ns: int = 0

    @property
    def final(self) -> bool:
        """Whether nothing will change it any more."""
        admitted = not (self.outcome is Outcome.REFUSED and self.code in NOT_ADMITTED)
        return admitted and self.outcome is not Outcome.RUNNING


class Mode(enum.StrEnum):
    """What the server as a whole does."""

    READY = "ready"  # somebody holds the lease, or nobody has since the start
    BUSY = "busy"  # a command is executed
    HOLD = "hold"  # the lease ran out: beam blanked, nothing queued; a new lease ends it
    STOPPED = "stopped"  # somebody pressed STOP: latched until an operator releases it


Role = Literal["operator", "agent", "viewer"]


class Lease(_Strict, frozen=True, kw_only=True):
    """The right to send commands; ``code`` and ``reason`` say why it was not given (then ``epoch`` is 0)."""

    epoch: int
    holder: str = ""
    ttl_s: float = 0.0
    now_s: float = 0.0
    code: str = ""
    reason: str = ""


class Status(_Strict, frozen=True, kw_only=True):
    """How the microscope is; ``now_s`` is its monotonic clock."""

    backend: str
    mode: Mode
    reason: str
    controls: dict[str, float]
    blanked: bool
    command: str
    queued: int
    holder: str
    role: str
    epoch: int
    lease_left_s: float
    now_s: float
    started_ns: int
    dose_e: float


class Refusal(_Strict, frozen=True, kw_only=True):
    """What a method other than ``execute`` answers when it may not, or can't."""

    code: str
    reason: str


# --- a microscope behind the server


class Aborted(Exception):
    """An acquisition was ended early; what it wrote so far has no sidecar and is never complete."""


class InstrumentError(Exception):
    """The instrument said no; the text says what and why."""


class Microscope(Protocol):
    """What a backend does; called by one worker thread only, except `read`, `blank` and `blanked`.

    Built as ``Backend(folder, state, parameters)``: the folder for acquisitions (the share), a private folder for what
    it must remember, and the ``[backend.parameters]`` of the server's file, which it checks itself (ValueError tells).
    """

    def read(self) -> Mapping[str, float]:
        """All controls and their present values; quick, and safe beside a running acquisition."""

    def set(self, values: Mapping[str, float]) -> None:
        """Bring controls to values; `InstrumentError` if it can't."""

    def dose_e(self, action: Acquire) -> float:
        """Electrons that an acquisition puts on the specimen, before it is made; ValueError if it can't be made."""

    def acquire(self, action: Acquire, name: str, trace: str, abort: threading.Event) -> Acquired:
        """Acquire into files whose stem is ``name``; `Aborted` soon after ``abort`` is set, without a whole file."""

    def made(self, name: str) -> Acquired | None:
        """The newest acquisition if it has this name and is whole, over a restart too; None where that isn't known.

        Asked after a crash, between which and the note beside the scan there was no time.
        """

    def blank(self, blanked: bool) -> None:
        """Take the beam off the specimen, or put it back; safe at any time, from any thread."""

    def blanked(self) -> bool:
        """Whether the beam is off the specimen."""

    def close(self) -> None:
        """Give everything back."""


# --- the border: plain dicts and lists on the wire, records inside


def to_wire(record: msgspec.Struct) -> dict[str, Any]:
    """A record as what serpent carries: dicts, lists, text and numbers."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


def from_wire(cls: type[T], value: object) -> T:
    """A record from what came over the wire; ValueError (msgspec.ValidationError) names what is wrong.

    Nothing is converted between types, and a float must be finite: ``True`` is no number, ``"1"`` neither.
    """
    return msgspec.convert(_checked(value), cls, strict=True)


def _checked(value: object, depth: int = 0) -> object:
    if depth > 16:
        raise msgspec.ValidationError("nested too deeply")
    if isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError(f"{value} is not a finite number")
    if isinstance(value, dict):
        return {key: _checked(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_checked(inner, depth + 1) for inner in value]
    return value


def command_id(experiment: str, decision: int, number: int) -> str:
    """``<experiment>-<decision>-<number>``, the same for the same decision however often it is made."""
    name = f"{experiment}-{decision:04d}-{number:02d}"
    if not COMMAND_ID.fullmatch(name):
        raise ValueError(f"no id of a command: {name!r}")
    return name
