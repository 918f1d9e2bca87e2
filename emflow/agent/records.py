"""What an experiment's log holds, one record a line, and what the agent tells about itself."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from emflow.agent.protocol import AgentMode, Decision, Ending, StopRules
from emflow.microscope.protocol import Acquire, Action, Camera, Receipt, Scan, Scan4d, command_id
from mpi_kernels.contract import Quality, Scalar

Source = Literal["policy", "gate", "recovery"]
"""Who made a decision: the policy; the loop, which distrusts a result; the loop, which mends an interrupted one."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record"):
    pass


class Started(_Record, frozen=True, kw_only=True, tag="started"):
    """The first record: all that the experiment rests on.

    ``target`` is the policy's ``module:attr``, ``parameters`` all of its fields, ``reductions`` the names of the
    reductions that it reads, ``programs`` the versions of what decided.
    """

    experiment: str
    policy: str
    target: str
    parameters: dict[str, Any]
    mode: AgentMode
    rules: StopRules
    share: str
    recipe: str
    reductions: tuple[str, ...]
    controls: tuple[str, ...]
    programs: dict[str, str]
    v: Literal[1] = 1


class Resumed(_Record, frozen=True, kw_only=True, tag="resumed"):
    """Another process goes on with the experiment."""

    host: str
    pid: int


class Seen(_Record, frozen=True, kw_only=True, tag="seen"):
    """A result, as it was found and checked.

    Attributes
    ----------
    job, acquisition, command : str
        The job, its acquisition, and the command that it belongs to (empty: no command made it).
    path : str
        Of the result file, below the folder of runs, with ``/``.
    result_sha256 : str
        Of the bytes that were read; empty where there were none.
    settings : dict
        All controls when the scan was made.
    distrusted : str
        Why nothing may be based on it; empty where it may be believed.
    """

    job: str
    acquisition: str
    command: str
    path: str
    result_sha256: str = ""
    quality: Quality = "INVALID"
    quality_reasons: tuple[str, ...] = ()
    coverage: float = 0.0
    settings: dict[str, float] = {}
    scalars: dict[str, dict[str, Scalar]] = {}
    outputs: tuple[str, ...] = ()
    distrusted: str = ""


class Planned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command of a decision, before it is sent."""

    id: str
    trace: str
    action: Action


class Decided(_Record, frozen=True, kw_only=True, tag="decided"):
    """A decision, written before anything is sent.

    ``settings`` are the controls that were given to the policy, ``seconds`` what the loop and the policy took from
    the sight of the result to this record.
    """

    number: int
    by: Source
    based_on: tuple[str, ...]
    settings: dict[str, float]
    decision: Decision
    commands: tuple[Planned, ...]
    seconds: float = 0.0


class Told(_Record, frozen=True, kw_only=True, tag="told"):
    """What a person, or the loop itself (``hold``), said; ``number`` is the decision that it is about."""

    what: Literal["pause", "resume", "approve", "hold", "stop"]
    by: str
    number: int
    reason: str = ""


class Received(_Record, frozen=True, kw_only=True, tag="received"):
    """The microscope's final answer to a command."""

    receipt: Receipt


class Recovered(_Record, frozen=True, kw_only=True, tag="recovered"):
    """Something came in the way of a decision, and the microscope was asked how it is now.

    ``afresh``: somebody else moved it, so what was measured before no longer holds.
    """

    number: int
    reason: str
    settings: dict[str, float]
    afresh: bool


class Ended(_Record, frozen=True, kw_only=True, tag="ended"):
    """The last record."""

    ending: Ending
    reason: str


Record = Started | Resumed | Seen | Decided | Told | Received | Recovered | Ended


def acquisitions(action: Action) -> tuple[Acquire, ...]:
    """What an action acquires: itself, or those of a batch that do."""
    inner = getattr(action, "actions", (action,))
    return tuple(one for one in inner if isinstance(one, (Scan, Camera, Scan4d)))


def acquires(action: Action) -> bool:
    """Whether an action makes an acquisition."""
    return bool(acquisitions(action))


def planned(experiment: str, number: int, actions: tuple[Action, ...]) -> tuple[Planned, ...]:
    """The commands of a decision.

    The trace of each is the id of the first acquiring command at or after it, else its own id: so a correction belongs
    to the trace of the scan that shows its effect.
    """
    ids = [command_id(experiment, number, i) for i in range(len(actions))]
    traces = list(ids)
    for i in range(len(actions) - 2, -1, -1):
        if not acquires(actions[i]) and any(acquires(a) for a in actions[i + 1 :]):
            traces[i] = traces[i + 1]
    return tuple(Planned(id=i, trace=t, action=a) for i, t, a in zip(ids, traces, actions, strict=True))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the live table: a decision, and the seconds since the one before."""

    number: int
    by: Source
    reason: str
    acquisitions: int
    measured: dict[str, float]
    merit: float | None
    seconds: float
    trusted: bool


State = Literal["idle", "starting", "deciding", "sending", "waiting", "asking", "held", "paused", "hold", "ended"]
"""asking: a person's approval is waited for. held: too many acquisitions wait for the service; it goes on by itself.
hold: something has to be looked at; `resume` goes on."""


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the agent is.

    ``pending`` is the decision that waits for approval, or was proposed; ``held`` what it waits for in that state.
    """

    state: State
    experiment: str = ""
    mode: str = ""
    policy: str = ""
    number: int = -1
    pending: Decision | None = None
    measured: dict[str, float] = {}
    merit: float | None = None
    merit_unit: str = ""
    acquisitions: int = 0
    dose_e: float = 0.0
    seconds: float = 0.0
    ending: str = ""
    reason: str = ""
    held: str = ""
    rows: tuple[Row, ...] = ()
