"""What a policy has to do, and the records of an experiment."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import msgspec

from emflow.microscope.protocol import Action, Receipt
from mpi_kernels.contract import Axis, Quality, Scalar

if TYPE_CHECKING:
    import numpy as np


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Result(Protocol):
    """One result as a policy sees it; nothing in it depends on when or where it is read."""

    @property
    def job(self) -> str:
        """Name of the job."""

    @property
    def coverage(self) -> float:
        """Share of the scan that it covers, 0 to 1."""

    @property
    def quality(self) -> Quality:
        """The kernels' own verdict."""

    @property
    def settings(self) -> Mapping[str, float]:
        """All controls of the microscope when the scan was made."""

    @property
    def scalars(self) -> Mapping[str, Mapping[str, Scalar]]:
        """``{reduction: {name: value}}``."""

    def array(self, name: str) -> np.ndarray:
        """The map ``<reduction>/<output>``; KeyError names what there is."""

    def axes(self, name: str) -> tuple[Axis, ...]:
        """Calibration of a map, one axis per dimension."""


class Verdict(enum.StrEnum):
    """Where a decision leaves the experiment."""

    GO_ON = "go on"
    TARGET = "target"  # the end point is reached
    GIVE_UP = "give up"  # the policy's own gate: results can't be trusted, or don't help


class Decision(_Strict, frozen=True, kw_only=True):
    """What a policy concluded.

    Attributes
    ----------
    reason : str
        Why, for people.
    verdict : Verdict
        An experiment ends with any but GO_ON; its ``actions`` are still executed (a last correction).
    actions : tuple of Action
        What to do, in order; empty means that there is nothing to be done.
    measured : dict
        Numbers on which it rests, with their unit in the name; they go into the log and to the live table.
    merit : float or None
        What the experiment makes small, in ``merit_unit``; None where this result says nothing of it.  The stop rule
        "no improvement" and the curve are made of it.
    trusted : bool
        False where the policy's gate refused the result; then no ``set`` is among the actions.
    """

    reason: str
    verdict: Verdict = Verdict.GO_ON
    actions: tuple[Action, ...] = ()
    measured: dict[str, float] = {}
    merit: float | None = None
    merit_unit: str = ""
    trusted: bool = True


class Step(_Strict, frozen=True, kw_only=True):
    """One decision of the past, with the settings of the scan that it was based on and what became of it.

    ``settings`` is empty for the first decision, which no result precedes.
    """

    number: int
    decision: Decision
    settings: dict[str, float]
    receipts: tuple[Receipt, ...]


History = tuple[Step, ...]
"""All earlier steps of an experiment, the first one first."""


@runtime_checkable
class Policy(Protocol):
    """What to do next; a msgspec Struct (frozen, unknown fields refused) whose fields are its parameters.

    ``decide`` is pure: the same result and history give the same decision, to the bit (round what is commanded, so that
    another machine's last digits do not matter).  Time, budgets, modes and leases are the loop's.
    """

    recipe: ClassVar[str]
    """Name of the recipe whose reductions it reads; the share's recipe must hold them all."""

    controls: ClassVar[tuple[str, ...]]
    """Controls that it sets, and on whose values its commands are based (`Command.expects`)."""

    def accepts_partial(self, coverage: float) -> bool:
        """Whether it may decide from part of a scan."""

    def decide(self, result: Result | None, settings: Mapping[str, float], history: History) -> Decision:
        """Decide; ``result`` is None for the first decision, ``settings`` are the controls as they are now."""


AgentMode = Literal["observe", "propose", "approve", "auto"]
"""observe: decide and log. propose: also show the actions, for a person to carry out. approve: carry them out once a
person agrees. auto: carry them out."""


class StopRules(_Strict, frozen=True, kw_only=True):
    """When an experiment ends whatever its policy thinks; 0 means without bound."""

    max_acquisitions: int = 20
    max_dose_e: float = 0.0
    max_time_s: float = 0.0
    no_improvement: int = 4
    """Decisions in a row without a better merit."""


class Ending(enum.StrEnum):
    """Why an experiment ended."""

    TARGET = "target"
    GAVE_UP = "gave up"
    ACQUISITIONS = "budget of acquisitions"
    DOSE = "budget of dose"
    TIME = "budget of time"
    NO_IMPROVEMENT = "no improvement"
    STOPPED = "stopped"  # by a person, or the microscope's STOP
    FAILED = "failed"  # the microscope, the service or the network did not come back
