"""Stop rules: when an experiment ends whatever its policy thinks."""

from __future__ import annotations

from collections.abc import Sequence

from emflow.agent.progress import Progress
from emflow.agent.protocol import Ending, StopRules
from emflow.agent.records import acquisitions


def over(rules: StopRules, progress: Progress, active_s: float) -> tuple[Ending, str] | None:
    """Which rule, if any, forbids to carry out what is left of the newest decision.

    Parameters
    ----------
    rules : StopRules
        0 means without bound.
    progress : Progress
        The experiment so far, with the decision in question as its newest.
    active_s : float
        Seconds that the experiment was at work, over all restarts.
    """
    if rules.max_time_s and active_s >= rules.max_time_s:
        return Ending.TIME, f"{active_s:.0f} s of {rules.max_time_s:g} s"
    still = 0 if progress.last is None else sum(len(acquisitions(c.action)) for c in progress.last.outstanding)
    made = progress.acquisitions
    if still and rules.max_acquisitions and made + still > rules.max_acquisitions:
        return Ending.ACQUISITIONS, f"{made} acquisitions of {rules.max_acquisitions}"
    following = _next_dose(progress) * still
    if still and rules.max_dose_e and progress.dose_e + following > rules.max_dose_e:
        return Ending.DOSE, f"{progress.dose_e:.3g} e and {following:.3g} e more would pass {rules.max_dose_e:.3g} e"
    worse = no_better([t.decided.decision.merit for t in progress.taken])
    if rules.no_improvement and worse >= rules.no_improvement:
        return Ending.NO_IMPROVEMENT, f"{worse} decisions in a row without a better merit"
    return None


def no_better(merits: Sequence[float | None]) -> int:
    """How many merits since the best one; None says nothing and is not counted."""
    best, count = float("inf"), 0
    for merit in (m for m in merits if m is not None):
        best, count = (merit, 0) if merit < best else (best, count + 1)
    return count


def _next_dose(progress: Progress) -> float:
    """What one more acquisition will cost: as much as the last one did."""
    doses = [r.dose_e for r in progress.receipts if r.acquired]
    return doses[-1] if doses else 0.0
