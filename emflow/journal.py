"""The journal: where every acquisition and job is, and all that happened to them; SQLite on a local disk.

Every move is compare-and-set and in one transaction with its event.  One `Journal` belongs to one thread; other
processes may have the file open too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emflow.errors import UsageError, printable
from emflow.journal_database import Database
from emflow.journal_rows import (
    EVENT_COLUMNS,
    Plane,
    acquisition_of,
    allowed,
    changed,
    event_of,
    happened,
    in_state,
    job_of,
    text,
    told,
    values_of,
    values_of_event,
)
from emflow.journal_usage import Usage
from emflow.records import ACQUISITION_MOVES, JOB_MOVES, Acquisition, AcquisitionState, Job, JobState
from mpi_kernels.contract import JOB_NAME, Event

_PAGE = 1000
_SMALL_PAGE = 64
_ACQUISITION_CHANGES = frozenset({"fingerprint", "format", "kind", "frames", "digest", "supersedes"})
_JOB_CHANGES = frozenset({"scheduler", "scheduler_id", "memory_mib", "nodes", "started_ns"})
_EVENT_INSERT = (
    f"INSERT INTO event ({', '.join(EVENT_COLUMNS)}) VALUES ({', '.join('?' * len(EVENT_COLUMNS))})"  # noqa: S608
    " ON CONFLICT (host, pid, seq, wall_ns) DO NOTHING"
)


class Journal:
    """The journal file.

    Parameters
    ----------
    path : path-like
        The file; made if it is not there.
    read_only : bool
        For those who only look: never writes, never migrates.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.changes = 0
        """Number of events that this object has written: unchanged means that nothing moved."""
        self._db = Database(self.path, read_only=read_only)
        self.usage = Usage(self._db)
        self._host = socket.gethostname()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the last one to do so folds the write-ahead log in."""
        self._db.close()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """All or nothing, one commit; inside another one it joins that, yet still undoes itself alone if it fails."""
        return self._db.transaction()

    def changed_elsewhere(self) -> bool:
        """Whether another connection has written since the last call."""
        return self._db.changed_elsewhere()

    # --- acquisitions

    def add_acquisition(
        self, acquisition: Acquisition, *, attrs: Mapping[str, Any] | None = None, event: str = "noticed"
    ) -> bool:
        """Journal a new acquisition; False if its id is there already."""
        with self.transaction():
            added = self._db.insert("acquisition", "id", values_of(acquisition))
            if added:
                self._event(acquisition.id, acquisition.trace, event, attrs or {})
        return added

    def move_acquisition(
        self,
        key: str,
        from_: AcquisitionState | Collection[AcquisitionState],
        to: AcquisitionState,
        *,
        reason: str = "",
        attrs: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> Acquisition:
        """Move an acquisition on, with an event named like the new state in lower case.

        Parameters
        ----------
        key : str
            Its id.
        from_, to : AcquisitionState
            Where it must be (one of them), and where it goes.
        reason : str
            Why; replaces the old reason.
        attrs : dict
            More for the event, beside ``from`` and ``reason``.
        **columns
            New values of ``fingerprint``, ``format``, ``kind``, ``frames``, ``digest`` or ``supersedes``.

        Raises
        ------
        StaleState
            It is in another state; nothing was changed.
        ValueError
            The table of moves forbids it, or a column is not one of those.
        """
        states = allowed(from_, to, ACQUISITION_MOVES)
        with self.transaction():
            old = self.acquisition(key)
            in_state(old, states, key)
            self._db.update(
                "acquisition", "id", old.id, old.state, changed(columns, _ACQUISITION_CHANGES, state=to, reason=reason)
            )
            self._event(key, old.trace, to.lower(), told(old.state, reason, attrs))
            return self.acquisition(key)

    def update_acquisition(
        self,
        key: str,
        state: AcquisitionState,
        *,
        event: str | None = None,
        attrs: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> Acquisition:
        """Change columns (also ``reason``) of an acquisition that stays in its state, else `StaleState`."""
        with self.transaction():
            old = self.acquisition(key)
            in_state(old, {state}, key)
            self._db.update("acquisition", "id", old.id, old.state, changed(columns, _ACQUISITION_CHANGES | {"reason"}))
            if event is not None:
                self._event(key, old.trace, event, attrs or {})
            return self.acquisition(key)

    def acquisition(self, key: str) -> Acquisition:
        """The acquisition with an id; `UsageError` if there is none."""
        rows = self._db.all("SELECT * FROM acquisition WHERE id = ?", (text(key),))
        if not rows:
            raise UsageError(f"no acquisition has the id '{printable(key)}'")
        return acquisition_of(rows[0])

    def latest(self, share: str, relpath: bytes) -> Acquisition | None:
        """The newest generation of a file, if it was ever seen."""
        rows = self._db.all(
            "SELECT * FROM acquisition WHERE share = ? AND relpath = ? ORDER BY generation DESC LIMIT 1",
            (share, relpath),
        )
        return acquisition_of(rows[0]) if rows else None

    def known(self, share: str) -> Iterator[Acquisition]:
        """The newest generation of every file of a share, in the order of their paths, read in pages."""
        after = b""
        while True:
            # the other columns are those of the row with max(): sqlite.org/lang_select.html#bareagg
            rows = self._db.all(
                "SELECT *, max(generation) FROM acquisition WHERE share = ? AND relpath > ?"
                " GROUP BY relpath ORDER BY relpath LIMIT ?",
                (share, after, _PAGE),
            )
            yield from map(acquisition_of, rows)
            if len(rows) < _PAGE:
                return
            after = rows[-1]["relpath"]

    def acquisitions(
        self,
        states: Collection[AcquisitionState] | None = None,
        *,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[Acquisition]:
        """Acquisitions in some states (all of them by default), in the order in which they were first seen."""
        return [acquisition_of(row) for row in self._db.in_states("acquisition", states, limit, newest_first)]

    def walk(self, state: AcquisitionState) -> Iterator[Acquisition]:
        """Acquisitions in a state, oldest first, read in small pages: whoever finds enough stops early."""
        after = -1
        while True:
            rows = self._db.all(
                "SELECT * FROM acquisition WHERE state = ? AND seq > ? ORDER BY seq LIMIT ?",
                (state.value, after, _SMALL_PAGE),
            )
            yield from map(acquisition_of, rows)
            if len(rows) < _SMALL_PAGE:
                return
            after = rows[-1]["seq"]

    def find(self, said: str) -> list[Acquisition]:
        """What a person may mean: an id, the start of one, a job's name, or a path or part of it."""
        job = JOB_NAME.fullmatch(said)
        start = job["acquisition"] if job else said
        rows: list[sqlite3.Row] = []
        if start and not set(start) - set("0123456789abcdef"):
            rows = self._db.all("SELECT * FROM acquisition WHERE id >= ? AND id < ? ORDER BY seq", (start, start + "g"))
        path = os.fsencode(said)
        if path and not rows:
            rows = self._db.all("SELECT * FROM acquisition WHERE relpath = ? ORDER BY seq", (path,))
        if path and not rows:
            rows = self._db.all("SELECT * FROM acquisition WHERE instr(relpath, ?) > 0 ORDER BY seq", (path,))
        return [acquisition_of(row) for row in rows]

    # --- jobs

    def add_job(self, job: Job, *, attrs: Mapping[str, Any] | None = None, event: str = "planned") -> bool:
        """Journal a new job; False if its name is there already."""
        with self.transaction():
            added = self._db.insert("job", "name", values_of(job))
            if added:
                trace = self.acquisition(job.acquisition).trace
                told = {"recipe": job.recipe, "scheduler": job.scheduler, **(attrs or {})}
                self._event(job.name, trace, event, told)
        return added

    def move_job(
        self,
        name: str,
        from_: JobState | Collection[JobState],
        to: JobState,
        *,
        reason: str = "",
        attrs: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> Job:
        """Move a job on; like `move_acquisition`, with the columns of `update_job`."""
        states = allowed(from_, to, JOB_MOVES)
        with self.transaction():
            old = self.job(name)
            in_state(old, states, name)
            self._db.update("job", "name", name, old.state, changed(columns, _JOB_CHANGES, state=to, reason=reason))
            trace = self.acquisition(old.acquisition).trace
            self._event(name, trace, to.lower(), told(old.state, reason, attrs))
            return self.job(name)

    def update_job(self, name: str, state: JobState, **columns: Any) -> Job:
        """Change ``reason``, ``scheduler_id``, ``memory_mib``, ``nodes`` or ``started_ns`` of a job that stays."""
        with self.transaction():
            in_state(self.job(name), {state}, name)
            self._db.update("job", "name", name, state, changed(columns, _JOB_CHANGES | {"reason"}))
            return self.job(name)

    def job(self, name: str) -> Job:
        """The job with a name; `UsageError` if there is none."""
        rows = self._db.all("SELECT * FROM job WHERE name = ?", (text(name),))
        if not rows:
            raise UsageError(f"no job is called '{printable(name)}'")
        return job_of(rows[0])

    def jobs(self, acquisition: str) -> list[Job]:
        """The jobs of an acquisition, first attempt first."""
        rows = self._db.all("SELECT * FROM job WHERE acquisition = ? ORDER BY attempt", (text(acquisition),))
        return [job_of(row) for row in rows]

    def jobs_in(self, states: Collection[JobState]) -> list[Job]:
        """Jobs in some states, oldest first."""
        return [job_of(row) for row in self._db.in_states("job", states, None, False)]

    def counts(self) -> tuple[dict[AcquisitionState, int], dict[JobState, int]]:
        """How many acquisitions, and how many jobs, are in each state, zeros included."""
        acquisitions, jobs = self._db.counts("acquisition"), self._db.counts("job")
        return {s: acquisitions.get(s, 0) for s in AcquisitionState}, {s: jobs.get(s, 0) for s in JobState}

    def count(self, states: Collection[AcquisitionState]) -> int:
        """How many acquisitions are in some states."""
        return sum(self._db.all("SELECT count(*) FROM acquisition WHERE state = ?", (s.value,))[0][0] for s in states)

    # --- events

    def append(
        self, *, subject: str, trace: str, plane: Plane, name: str, attrs: Mapping[str, Any] | None = None
    ) -> None:
        """Journal something that happened in this process and moved nothing."""
        with self.transaction():
            self._event(subject, trace, name, attrs or {}, plane)

    def merge(self, events: Iterable[Event]) -> int:
        """Take over events of other processes, each once however often it comes; returns how many were new."""
        with self.transaction():
            return sum(self._db.run(_EVENT_INSERT, values_of_event(event)) for event in events)

    def events(
        self,
        *,
        trace: str | None = None,
        subject: str | None = None,
        names: Collection[str] | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[tuple[int, Event]]:
        """Events in order of arrival, with their numbers, which rise; ``after`` a number that the caller has seen."""
        asked = {"trace": trace and {trace}, "subject": subject and {subject}, "name": names}
        given = {name: [text(v) for v in values] for name, values in asked.items() if values is not None}
        where = [f"{name} IN ({', '.join('?' * len(values))})" for name, values in given.items()]
        rows = self._db.all(
            f"SELECT * FROM event WHERE {' AND '.join([*where, 'number > ?'])} ORDER BY number LIMIT ?",  # noqa: S608
            [*itertools.chain(*given.values()), after, -1 if limit is None else limit],
        )
        return [(row["number"], event_of(row)) for row in rows]

    def _event(
        self, subject: str, trace: str, name: str, attrs: Mapping[str, Any], plane: Plane = "management"
    ) -> None:
        event = happened(subject=subject, trace=trace, name=name, attrs=attrs, plane=plane, host=self._host)
        self._db.run(_EVENT_INSERT, values_of_event(event))
        self.changes += 1
