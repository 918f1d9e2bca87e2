"""How far a closed loop is, told by its journal, its events and the experiment's own log."""

from __future__ import annotations

from pathlib import Path

import msgspec

from emflow.agent.log import LOG_FILE, read_log
from emflow.agent.protocol import Decision
from emflow.agent.records import Decided, Ended, Record
from emflow.config import Config
from emflow.journal import Journal
from emflow.timeline import acquisition_events, loop_times
from mpi_kernels.contract import JOB_NAME

COLUMNS = {
    "write": ("sent", "noted"),
    "noticed": ("noted", "ready"),
    "staged": ("ready", "staged"),
    "running": ("staged", "submitted"),
    "reduced": ("submitted", "result"),
    "decided": ("result", "decided"),
}
"""Columns of the live table: the two marks of `emflow.timeline.LOOP_BARS` between which a step lies."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One commanded acquisition.

    Attributes
    ----------
    number : int
        Counts from 1.
    command, acquisition : str
        Id of its command, and in the service.
    seconds : dict
        By column of `COLUMNS`, as far as it came.
    decision : Decision or None
        What its result led to.
    """

    number: int
    command: str
    acquisition: str
    seconds: dict[str, float]
    decision: Decision | None = None


def experiment_of(config: Config) -> str | None:
    """The one experiment that there is, as soon as it has a log."""
    found = sorted(path.parent.name for path in config.service.experiments.glob(f"*/{LOG_FILE}"))
    return found[0] if found else None


def records(config: Config, experiment: str) -> list[Record]:
    """What an experiment's log holds by now."""
    path: Path = config.service.experiments / experiment / LOG_FILE
    return [line.record for line in read_log(path)]


def ending(known: list[Record]) -> Ended | None:
    """Why the experiment is over, if it is."""
    return next((record for record in known if isinstance(record, Ended)), None)


def stages(journal: Journal, config: Config, experiment: str) -> list[Stage]:
    """The acquisitions of an experiment, in the order in which the service saw them."""
    decisions: dict[str, Decision] = {}
    for record in records(config, experiment):
        if isinstance(record, Decided):
            jobs = (JOB_NAME.fullmatch(name) for name in record.based_on)
            decisions |= {job["acquisition"]: record.decision for job in jobs if job}
    found: list[Stage] = []
    for acquisition in journal.acquisitions():
        if acquisition.trace.startswith(f"{experiment}-"):
            times = loop_times(acquisition_events(journal, config, acquisition))
            marks = {name: (times.get(first), times.get(last)) for name, (first, last) in COLUMNS.items()}
            found.append(
                Stage(
                    number=len(found) + 1,
                    command=acquisition.trace,
                    acquisition=acquisition.id,
                    seconds={n: (b - a) / 1e9 for n, (a, b) in marks.items() if a is not None and b is not None},
                    decision=decisions.get(acquisition.id),
                )
            )
    return found
