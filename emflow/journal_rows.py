"""Records as rows of the journal's tables, and back."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from emflow.errors import StaleState
from emflow.records import Acquisition, AcquisitionState, Fingerprint, Job, JobState
from mpi_kernels.contract import Event

Plane = Literal["data", "control", "management"]
S = TypeVar("S", AcquisitionState, JobState)

EVENT_COLUMNS = ("trace", "subject", "plane", "host", "pid", "seq", "name", "wall_ns", "mono_ns", "attrs")
_ACQUISITION_COLUMNS = tuple(f.name for f in msgspec.structs.fields(Acquisition))
_JOB_COLUMNS = tuple(f.name for f in msgspec.structs.fields(Job))
_INT64 = 1 << 63
_SEQUENCE = itertools.count(1)  # of this process: two journals in it never give two events the same number


def text(value: str) -> str:
    r"""Text that SQLite can hold: what is not valid Unicode becomes an escape such as ``\udcff``."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def column(value: Any) -> Any:
    """A field of a record as a value of SQLite."""
    if isinstance(value, Fingerprint):
        return f"{value.size} {value.mtime_ns} {value.ctime_ns}"
    return text(value) if isinstance(value, str) else value


def values_of(record: Acquisition | Job) -> dict[str, Any]:
    """A record as columns."""
    columns = _ACQUISITION_COLUMNS if isinstance(record, Acquisition) else _JOB_COLUMNS
    return {name: column(getattr(record, name)) for name in columns}


def acquisition_of(row: sqlite3.Row) -> Acquisition:
    """A row of ``acquisition`` as a record."""
    values = {name: row[name] for name in _ACQUISITION_COLUMNS}
    size, mtime_ns, ctime_ns = map(int, row["fingerprint"].split())
    values["fingerprint"] = Fingerprint(size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)
    values["state"] = AcquisitionState(row["state"])
    return Acquisition(**values)


def job_of(row: sqlite3.Row) -> Job:
    """A row of ``job`` as a record."""
    return Job(**{name: row[name] for name in _JOB_COLUMNS} | {"state": JobState(row["state"])})


def event_of(row: sqlite3.Row) -> Event:
    """A row of ``event`` as a record."""
    return Event(**{name: row[name] for name in EVENT_COLUMNS} | {"attrs": json.loads(row["attrs"])})


def happened(*, subject: str, trace: str, name: str, attrs: Mapping[str, Any], plane: Plane, host: str) -> Event:
    """An event of this process, now."""
    return Event(
        trace=trace,
        subject=subject,
        plane=plane,
        host=host,
        pid=os.getpid(),
        seq=next(_SEQUENCE),
        name=name,
        wall_ns=time.time_ns(),
        mono_ns=time.monotonic_ns(),
        attrs=dict(attrs),
    )


def values_of_event(event: Event) -> tuple[Any, ...]:
    """An event as columns; attributes keep text that is not valid Unicode, as JSON escapes."""
    if not all(-_INT64 <= n < _INT64 for n in (event.pid, event.seq, event.wall_ns, event.mono_ns)):
        raise ValueError(f"numbers of this event do not fit into 64 bits: {event!r:.200}")
    values = {name: column(getattr(event, name)) for name in EVENT_COLUMNS}
    values["attrs"] = json.dumps(event.attrs, allow_nan=False, separators=(",", ":"))
    return tuple(values.values())


def changed(columns: Mapping[str, Any], known: Collection[str], **always: Any) -> dict[str, Any]:
    """Columns of an update; a name that may not be changed is a `ValueError`."""
    wrong = sorted(set(columns) - set(known))
    if wrong:
        raise ValueError(f"{wrong[0]!r} can't be changed; known: {', '.join(sorted(known))}")
    return {name: column(value) for name, value in {**columns, **always, "changed_ns": time.time_ns()}.items()}


def allowed(from_: S | Collection[S], to: S, moves: Mapping[S, frozenset[S]]) -> frozenset[S]:
    """The states that a move may start from; `ValueError` where the table of moves forbids one of them."""
    states = frozenset({from_} if isinstance(from_, (AcquisitionState, JobState)) else from_)
    for state in states:
        if to not in moves[state]:
            after = ", ".join(sorted(moves[state])) or "nothing"
            raise ValueError(f"{state} → {to} is not allowed; after {state} comes {after}")
    return states


def in_state(record: Acquisition | Job, states: Collection[Any], key: str) -> None:
    """Raise `StaleState` where a record is in none of some states."""
    if record.state not in states:
        raise StaleState(f"{key} is {record.state}, not {' or '.join(sorted(states))}: somebody else moved it")


def told(old: str, reason: str, attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes of a move's event."""
    return {"from": str(old), **({"reason": reason} if reason else {}), **(attrs or {})}
