"""What an experiment tells of itself while it runs, made from its log."""

from __future__ import annotations

from emflow.agent.log import ExperimentLog
from emflow.agent.progress import Progress
from emflow.agent.records import AgentStatus, Decided, Row, Started, State

ROWS = 30
"""Decisions that the status tells of."""


def status_of(log: ExperimentLog, progress: Progress, state: State, seconds: float, *, held: str = "") -> AgentStatus:
    """An experiment's status from its log; ``held`` says what it waits for in that state."""
    started, last, ended = progress.started, progress.last, progress.ended
    decision = last.decided.decision if last else None
    told = next((t.decided.decision for t in reversed(progress.taken) if t.decided.decision.merit is not None), None)
    open_ = decision is not None and bool(decision.actions) and (state == "asking" or _shows_only(started))
    return AgentStatus(
        state=state,
        experiment=started.experiment if started else "",
        mode=started.mode if started else "",
        policy=started.policy if started else "",
        number=last.decided.number if last else -1,
        pending=decision if open_ else None,
        measured=_measured(progress),
        merit=told.merit if told else None,
        merit_unit=told.merit_unit if told else "",
        acquisitions=progress.acquisitions,
        dose_e=progress.dose_e,
        seconds=round(seconds, 3),
        ending=ended.ending.value if ended else "",
        reason=ended.reason if ended else decision.reason if decision else "",
        held=held,
        rows=_rows(log, progress),
    )


def _shows_only(started: Started | None) -> bool:
    return started is not None and started.mode == "propose"


def _measured(progress: Progress) -> dict[str, float]:
    """What was measured last."""
    found = (t.decided.decision.measured for t in reversed(progress.taken))
    return next((m for m in found if m), {})


def _rows(log: ExperimentLog, progress: Progress) -> tuple[Row, ...]:
    at = {line.record.number: line.active_s for line in log.lines if isinstance(line.record, Decided)}
    rows, made = [], 0
    for taken in progress.taken:
        number, decision = taken.decided.number, taken.decided.decision
        rows.append(
            Row(
                number=number,
                by=taken.decided.by,
                reason=decision.reason,
                acquisitions=made,
                measured=decision.measured,
                merit=decision.merit,
                seconds=round(at[number] - at.get(number - 1, 0.0), 3),
                trusted=decision.trusted,
            )
        )
        made += sum(len(r.acquired) for r in taken.receipts.values())
    return tuple(rows[-ROWS:])
