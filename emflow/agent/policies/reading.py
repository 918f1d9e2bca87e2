"""What policies read: a number of a result by its name, and how often results were distrusted."""

from __future__ import annotations

import math

from emflow.agent.protocol import History, Result


def scalar(result: Result, name: str) -> float | None:
    """The value of ``<reduction>.<scalar>``; None if there is none, or it is no finite number."""
    reduction, _, which = name.partition(".")
    value = result.scalars.get(reduction, {}).get(which)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def distrusted(history: History) -> int:
    """Decisions in a row, up to the last one, that distrusted the result that they rest on."""
    count = 0
    for step in reversed(history):
        if step.decision.trusted:
            break
        count += 1
    return count
