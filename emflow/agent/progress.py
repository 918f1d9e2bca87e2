"""Where an experiment is, made from its log's records alone: the same live, after a restart and in a replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from emflow.agent.protocol import History, Step
from emflow.agent.records import (
    Decided,
    Ended,
    Planned,
    Received,
    Record,
    Recovered,
    Resumed,
    Seen,
    Started,
    Told,
    acquires,
    acquisitions,
)
from emflow.microscope.protocol import Acquired, Action, Batch, Outcome, Receipt


@dataclass
class Taken:
    """One decision with what became of it; ``scan_settings`` are those of the scan that it was based on."""

    decided: Decided
    scan_settings: dict[str, float]
    receipts: dict[str, Receipt] = field(default_factory=dict)

    @property
    def outstanding(self) -> list[Planned]:
        """Commands without a final answer, in order."""
        return [c for c in self.decided.commands if c.id not in self.receipts]

    @property
    def trouble(self) -> Receipt | None:
        """The first answer that is not DONE."""
        return next((r for r in self.receipts.values() if r.outcome is not Outcome.DONE), None)

    def step(self) -> Step:
        """As a policy sees it."""
        order = [c.id for c in self.decided.commands]
        return Step(
            number=self.decided.number,
            decision=self.decided.decision,
            settings=self.scan_settings,
            receipts=tuple(self.receipts[i] for i in order if i in self.receipts),
        )


class Progress:
    """The fold of a log's records."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.started: Started | None = None
        self.ended: Ended | None = None
        self.taken: list[Taken] = []
        self.seen: list[Seen] = []
        self.known: dict[str, float] = {}
        self.approved: set[int] = set()
        self.held: set[int] = set()
        self.resting: Told | None = None
        self.recovered: Recovered | None = None
        for record in records:
            self.apply(record)

    def apply(self, record: Record) -> None:
        """Take one more record in."""
        match record:
            case Started():
                self.started = record
            case Seen():
                self.seen.append(record)
            case Decided():
                self._decided(record)
            case Received():
                self._received(record.receipt)
            case Recovered():
                self.recovered = record
            case Told(what="approve"):
                self.approved.add(record.number)
            case Told(what="hold"):
                self.held.add(record.number)
                self.resting = record
            case Told(what="pause"):
                self.resting = record
            case Told(what="resume"):
                self.resting = None
            case Ended():
                self.ended = record
            case Told() | Resumed():
                pass

    def _decided(self, record: Decided) -> None:
        seen = next((s for s in reversed(self.seen) if s.job in record.based_on), None)
        self.taken.append(Taken(record, dict(seen.settings) if seen else {}))
        self.known = dict(record.settings)
        self.recovered = None

    def _received(self, receipt: Receipt) -> None:
        for taken in self.taken:
            if any(c.id == receipt.command for c in taken.decided.commands):
                taken.receipts[receipt.command] = receipt
        if receipt.outcome is Outcome.DONE and receipt.after:
            self.known = dict(receipt.after)

    # --- what the loop asks

    @property
    def last(self) -> Taken | None:
        """The newest decision."""
        return self.taken[-1] if self.taken else None

    @property
    def number(self) -> int:
        """Number of the next decision."""
        return len(self.taken)

    @property
    def history(self) -> History:
        """All steps so far, as a policy sees them.

        What the loop did to carry out an interrupted decision belongs to that decision: its answers follow there.
        """
        steps: list[Step] = []
        for taken in self.taken:
            step = taken.step()
            if taken.decided.by == "recovery" and steps:
                before = steps.pop()
                step = msgspec.structs.replace(before, receipts=before.receipts + step.receipts)
            steps.append(step)
        return tuple(steps)

    @property
    def receipts(self) -> list[Receipt]:
        """All final answers."""
        return [r for taken in self.taken for r in taken.receipts.values()]

    @property
    def acquisitions(self) -> int:
        """How many acquisitions were made."""
        return sum(len(r.acquired) for r in self.receipts)

    @property
    def dose_e(self) -> float:
        """Electrons that were put on the specimen."""
        return sum(r.dose_e for r in self.receipts)

    def in_a_row(self, by: str) -> int:
        """How many of the newest decisions were made by the loop for one reason."""
        count = 0
        for taken in reversed(self.taken):
            if taken.decided.by != by:
                break
            count += 1
        return count

    @property
    def last_acquire(self) -> Action | None:
        """The newest action that makes an acquisition; of a batch only what acquires, so that it can be repeated."""
        actions = (c.action for taken in reversed(self.taken) for c in reversed(taken.decided.commands))
        newest = next((acquisitions(a) for a in actions if acquires(a)), ())
        return newest[0] if len(newest) == 1 else Batch(actions=newest) if newest else None

    @property
    def used(self) -> set[str]:
        """Jobs and acquisitions that a decision was based on."""
        jobs = {job for taken in self.taken for job in taken.decided.based_on}
        return jobs | {s.acquisition for s in self.seen if s.job in jobs}

    def awaited(self) -> tuple[Planned, Receipt, Acquired] | None:
        """The acquisition whose result the next decision waits for: the last one of the newest decision."""
        if self.last is None or self.last.outstanding or self.last.trouble:
            return None
        for command in reversed(self.last.decided.commands):
            receipt = self.last.receipts[command.id]
            if receipt.acquired:
                return command, receipt, receipt.acquired[-1]
        return None

    def strays(self) -> list[tuple[str, Acquired]]:
        """Acquisitions of this experiment that no decision waits for, or ever will, with their command."""
        awaited = self.awaited()
        made = [(r.command, a) for r in self.receipts for a in r.acquired]
        if awaited:
            made.remove((awaited[1].command, awaited[2]))
        return made

    def scan_settings(self, action: Action, receipt: Receipt) -> Mapping[str, float]:
        """All controls when a scan was made: a batch may have set some before its last action."""
        return receipt.after if hasattr(action, "actions") else receipt.before
