"""Decisions: the policy's, checked, and those that the loop makes itself; pure, so that replay can repeat them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from emflow.agent.protocol import Decision, History, Policy, Result, Verdict
from emflow.agent.records import Recovered
from emflow.errors import EmflowError, printable
from emflow.microscope.protocol import Action, Outcome, Receipt, Set, from_wire

IN_A_ROW = 3
"""Distrusted results, or recoveries, in a row after which the loop gives up."""


MOST_ACTIONS = 100
"""The number of a command has two digits."""


class PolicyError(EmflowError):
    """A policy failed, or asked for what it may not ask for."""


def decide(
    name: str, policy: Policy, result: Result | None, settings: Mapping[str, float], history: History
) -> Decision:
    """Ask a policy, and check what it says.

    Raises
    ------
    PolicyError
        It raised, or asks for something that is no number, not its own, or not to be based on what it distrusts.
    """
    try:
        decision = policy.decide(result, dict(settings), history)
    except Exception as error:
        raise PolicyError(f"policy {name!r} failed: {printable(f'{type(error).__name__}: {error}')}") from error
    return checked(name, decision, policy.controls)


def checked(name: str, decision: Any, controls: tuple[str, ...]) -> Decision:
    """A decision as it stands in the log: plain numbers, all of them finite where a microscope would see them."""
    if not isinstance(decision, Decision):
        raise PolicyError(f"policy {name!r} gave {type(decision).__name__}, not a Decision")
    try:
        measured = {key: float(value) for key, value in decision.measured.items() if math.isfinite(value)}
        merit = decision.merit if decision.merit is not None and math.isfinite(decision.merit) else None
        finite = msgspec.structs.replace(decision, measured=measured, merit=merit)
        whole = from_wire(Decision, msgspec.to_builtins(finite, enc_hook=_plain))
        if len(whole.actions) > MOST_ACTIONS:
            raise ValueError(f"{len(whole.actions)} actions at once; at most {MOST_ACTIONS} have an id")
        msgspec.json.encode(whole)  # text that no log can hold
    except (TypeError, ValueError, AttributeError) as error:
        raise PolicyError(
            f"policy {name!r} asks for what no microscope may be sent: {printable(str(error))}",
            next_step="Nothing was sent; the policy has to be mended",
        ) from error
    for values in (one.values for action in whole.actions for one in _sets(action)):
        if not whole.trusted:
            raise PolicyError(f"policy {name!r} distrusts the result and sets {', '.join(values)} all the same")
        if foreign := sorted(set(values) - set(controls)):
            raise PolicyError(f"policy {name!r} sets {', '.join(foreign)}, which it does not list in its controls")
    return whole


def gate(reason: str, again: Action | None, before: int) -> Decision:
    """The loop's decision on a result that may not be believed: acquire again, or give up after `IN_A_ROW` of them.

    Parameters
    ----------
    reason : str
        Why it is distrusted.
    again : Action or None
        The acquisition to repeat.
    before : int
        How many distrusted results came just before it.
    """
    if before + 1 >= IN_A_ROW or again is None:
        text = f"{reason}; {before + 1} results in a row can't be trusted" if again else reason
        return Decision(reason=text, verdict=Verdict.GIVE_UP, trusted=False)
    return Decision(reason=f"{reason}; acquire again", actions=(again,), trusted=False)


def after_trouble(
    recovered: Recovered, interrupted: Decision, receipts: tuple[Receipt, ...], again: Action | None
) -> Decision:
    """The loop's decision after an answer that is not DONE: what is left of it, or to measure again.

    Parameters
    ----------
    recovered : Recovered
        What came in the way, and the controls as they are now.
    interrupted : Decision
        The decision that was being carried out.
    receipts : tuple of Receipt
        The answers to its first commands.
    again : Action or None
        The newest acquisition.
    """
    if recovered.afresh:
        return measure_again(recovered.reason, again)
    return recovery(recovered.reason, interrupted, receipts, recovered.settings)


def recovery(
    reason: str, interrupted: Decision, receipts: tuple[Receipt, ...], settings: Mapping[str, float]
) -> Decision:
    """The loop's decision after a command that is not known to be done: the actions that are left.

    A ``set`` whose values hold already is done, whoever says what; all that follows the first action that is not done
    is still to be done.

    Parameters
    ----------
    reason : str
        What came in the way.
    interrupted : Decision
        The decision that was being carried out.
    receipts : tuple of Receipt
        The answers to its first commands.
    settings : mapping
        The controls as they are now.
    """
    done = 0
    for receipt in receipts:
        if receipt.outcome is not Outcome.DONE:
            break
        done += 1
    left = interrupted.actions[done:]
    if left and isinstance(left[0], Set) and holds(left[0].values, settings):
        left = left[1:]
    return Decision(
        reason=f"after {reason}: {len(left)} of {len(interrupted.actions)} actions left",
        verdict=interrupted.verdict,
        actions=left,
        trusted=interrupted.trusted,
    )


def measure_again(reason: str, again: Action | None) -> Decision:
    """The loop's decision after somebody else moved the microscope: what was measured before no longer holds."""
    if again is None:
        return Decision(reason=reason, verdict=Verdict.GIVE_UP)
    return Decision(reason=f"{reason}; measure again", actions=(again,))


def moved(
    controls: tuple[str, ...], decision: Decision, known: Mapping[str, float], now: Mapping[str, float]
) -> list[str]:
    """Controls that are neither where they were known to be nor where an interrupted decision wants them."""
    wanted = {name: v for action in decision.actions for one in _sets(action) for name, v in one.values.items()}
    return [
        c for c in controls if not any(c in there and same(there[c], now.get(c, math.nan)) for there in (known, wanted))
    ]


def holds(values: Mapping[str, float], settings: Mapping[str, float]) -> bool:
    """Whether controls have these values; setpoints come back as they were given, up to the last digits."""
    return all(name in settings and same(value, settings[name]) for name, value in values.items())


def same(a: float, b: float) -> bool:
    """Whether two values of a control are one."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def _sets(action: Action) -> list[Set]:
    return [one for one in getattr(action, "actions", (action,)) if isinstance(one, Set)]


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    item = getattr(value, "item", None)
    shape: object = getattr(value, "shape", ())
    if item is None or shape:
        raise TypeError(f"{type(value).__name__} is no number")
    return item()
