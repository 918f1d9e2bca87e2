"""Makes every decision of an experiment again from its log and results, and compares: no microscope, no network."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import msgspec

from emflow.agent import judging
from emflow.agent.log import LOG_FILE, LogError, read_log
from emflow.agent.opening import make_policy
from emflow.agent.progress import Progress, Taken
from emflow.agent.protocol import Decision, Policy
from emflow.agent.records import Decided, Recovered, Seen, Started, planned
from emflow.agent.results import reload
from emflow.errors import UsageError
from emflow.records import acquisition_id


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One decision, as it was and as it is now.

    ``now`` is None where both are the same to the byte; ``off`` tells what of the record does not follow from those
    before it, such as settings that no receipt says.
    """

    number: int
    by: str
    based_on: tuple[str, ...]
    then: Decision
    now: Decision | None
    seconds: float
    off: str = ""

    @property
    def same(self) -> bool:
        """Whether it is the same decision, on what the log says was there."""
        return self.now is None and not self.off


def replay(folder: Path, runs: Path) -> Iterator[Compared]:
    """Make each decision again, in order.

    Parameters
    ----------
    folder : Path
        Of the experiment.
    runs : Path
        The folder of runs, below which the log's paths lie.

    Raises
    ------
    LogError
        The log was changed or is damaged.
    ResultError
        A result is gone or was changed.
    ConfigError
        The policy is not installed.
    """
    records = [line.record for line in read_log(folder / LOG_FILE)]
    if not records or not isinstance(records[0], Started):
        raise UsageError(f"{folder.name}: the experiment has not begun", next_step="There is nothing to replay yet")
    policy, _ = make_policy(records[0].policy, records[0].parameters)
    progress = Progress()
    for record in records:
        if isinstance(record, Decided):
            if record.by == "recovery" and (progress.recovered is None or progress.last is None):
                raise LogError(f"{folder.name}: decision {record.number} mends nothing that the log tells of")
            begin = time.perf_counter()
            now = _again(record, progress, policy, runs)
            same = msgspec.json.encode(now) == msgspec.json.encode(record.decision)
            same = same and planned(records[0].experiment, progress.number, now.actions) == record.commands
            yield Compared(
                number=record.number,
                by=record.by,
                based_on=record.based_on,
                then=record.decision,
                now=None if same else now,
                seconds=time.perf_counter() - begin,
                off=_off(record, progress),
            )
        progress.apply(record)


def _off(record: Decided, progress: Progress) -> str:
    """What of a decision's record does not follow from the records before it; empty where all does."""
    seen = _seen(progress, record)
    basis: tuple[str, ...] = (seen.job,) if seen else ()
    settings: Mapping[str, float] = progress.known
    if record.by == "recovery":
        recovered, last = cast("Recovered", progress.recovered), cast("Taken", progress.last)
        settings, basis = recovered.settings, last.decided.based_on
    elif seen is None or cast("Started", progress.started).mode in ("observe", "propose"):
        settings = record.settings  # they were read from the microscope
    wrong = {
        "number": record.number != progress.number,
        "based_on": record.based_on != basis,
        "settings": record.settings != dict(settings),
        "distrusted": seen is not None and record.by != "recovery" and bool(seen.distrusted) != (record.by == "gate"),
    }
    if seen is not None and record.by != "recovery":
        wrong["result"] = seen.job in progress.used or not _awaited(progress, seen)
    return ", ".join(name for name, is_wrong in wrong.items() if is_wrong)


def _awaited(progress: Progress, seen: Seen) -> bool:
    """Whether a result is of the scan that the newest decision made, with its settings."""
    started, awaited = cast("Started", progress.started), progress.awaited()
    if started.mode in ("observe", "propose"):
        return True
    if awaited is None:
        return False
    command, receipt, acquired = awaited
    scan = acquisition_id(started.share, os.fsencode(acquired.path), 0)
    settings = dict(progress.scan_settings(command.action, receipt))
    return (seen.acquisition, seen.job[:-3], seen.settings) == (scan, scan, settings)


def _again(record: Decided, progress: Progress, policy: Policy, runs: Path) -> Decision:
    started = cast("Started", progress.started)
    if record.by == "recovery":
        return _recovery(progress)
    seen = _seen(progress, record)
    if record.by == "gate":
        reason = seen.distrusted if seen else ""
        return judging.gate(reason, progress.last_acquire, progress.in_a_row("gate"))
    if seen is None:
        return judging.decide(started.policy, policy, None, record.settings, ())
    result = reload(runs, seen)
    try:
        return judging.decide(started.policy, policy, result, record.settings, progress.history)
    finally:
        result.close()


def _seen(progress: Progress, record: Decided) -> Seen | None:
    return next((s for s in reversed(progress.seen) if s.job in record.based_on), None)


def _recovery(progress: Progress) -> Decision:
    """The loop's own decision after an interruption; the record before it says which and why."""
    recovered, last = cast("Recovered", progress.recovered), cast("Taken", progress.last)
    return judging.after_trouble(recovered, last.decided.decision, tuple(last.receipts.values()), progress.last_acquire)
