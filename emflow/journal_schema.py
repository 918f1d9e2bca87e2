"""The journal's tables, and the numbered steps that bring an older file up to date."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from emflow.errors import Busy, JournalError, JournalFull, NotAllowed, Unavailable, printable
from emflow.records import AcquisitionState, JobState

BUSY_TIMEOUT_S = 10.0
"""Other processes hold the write lock for one short transaction; this is a stuck process."""

REBUILD = "Keep a copy of the file, then run: emflow rebuild"

# The page cache of these is not shared between hosts, so that WAL's shared memory breaks (sqlite.org/wal.html).
REMOTE = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}
)


@dataclass(frozen=True, slots=True)
class Step:
    """One migration: the ``user_version`` that it leads to, why it exists, and its statements."""

    version: int
    why: str
    sql: tuple[str, ...]


def _one_of(values: Iterable[str]) -> str:
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


STEPS: tuple[Step, ...] = (
    Step(
        1,
        "acquisitions, their jobs, and the events of both",
        (
            f"""
            CREATE TABLE acquisition (
                seq         INTEGER PRIMARY KEY,  -- order of first sight
                id          TEXT NOT NULL UNIQUE CHECK (length(id) = 16 AND id NOT GLOB '*[^0-9a-f]*'),
                share       TEXT NOT NULL,
                relpath     BLOB NOT NULL CHECK (length(relpath) > 0),  -- names need not be valid text
                generation  INTEGER NOT NULL CHECK (generation >= 0),
                state       TEXT NOT NULL CHECK (state IN {_one_of(AcquisitionState)}),
                day         TEXT NOT NULL CHECK (day GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]'),
                trace       TEXT NOT NULL,
                seen_ns     INTEGER NOT NULL,
                changed_ns  INTEGER NOT NULL,
                fingerprint TEXT NOT NULL,  -- size mtime_ns ctime_ns: a file's dates may need more than 64 bits
                format      TEXT NOT NULL,
                kind        TEXT NOT NULL CHECK (kind IN ('', 'image', 'stack', '4d')),
                frames      INTEGER NOT NULL CHECK (frames >= 0),
                reason      TEXT NOT NULL,
                digest      TEXT,
                supersedes  TEXT,
                UNIQUE (share, relpath, generation),
                CHECK (digest IS NOT NULL OR state NOT IN ('STAGED', 'DONE'))
            ) STRICT
            """,
            "CREATE INDEX acquisition_state ON acquisition (state, seq)",
            f"""
            CREATE TABLE job (
                seq          INTEGER PRIMARY KEY,
                name         TEXT NOT NULL UNIQUE CHECK (name = acquisition || '-' || printf('%02d', attempt)),
                acquisition  TEXT NOT NULL REFERENCES acquisition (id),
                attempt      INTEGER NOT NULL CHECK (attempt BETWEEN 0 AND 99),
                state        TEXT NOT NULL CHECK (state IN {_one_of(JobState)}),
                recipe       TEXT NOT NULL,
                scheduler    TEXT NOT NULL,
                scheduler_id TEXT NOT NULL,
                reason       TEXT NOT NULL,
                planned_ns   INTEGER NOT NULL,
                changed_ns   INTEGER NOT NULL,
                UNIQUE (acquisition, attempt)
            ) STRICT
            """,
            "CREATE INDEX job_state ON job (state, seq)",
            f"""
            CREATE TABLE event (
                number   INTEGER PRIMARY KEY,  -- order of arrival in this journal
                trace    TEXT NOT NULL,
                subject  TEXT NOT NULL,
                plane    TEXT NOT NULL CHECK (plane IN {_one_of(("data", "control", "management"))}),
                host     TEXT NOT NULL,
                pid      INTEGER NOT NULL,
                seq      INTEGER NOT NULL,
                name     TEXT NOT NULL,
                wall_ns  INTEGER NOT NULL,
                mono_ns  INTEGER NOT NULL,
                attrs    TEXT NOT NULL,  -- a JSON object in ASCII
                UNIQUE (host, pid, seq, wall_ns)  -- a pid comes back, a pid at the same nanosecond does not
            ) STRICT
            """,
            "CREATE INDEX event_trace ON event (trace)",
            "CREATE INDEX event_subject ON event (subject)",
            "CREATE INDEX event_name ON event (name)",
            """
            CREATE TRIGGER event_is_never_changed BEFORE UPDATE ON event
            BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
            """,
            """
            CREATE TRIGGER event_is_never_deleted BEFORE DELETE ON event
            BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
            """,
        ),
    ),
    Step(
        2,
        "what jobs cost, by day, and the memory that an attempt had",
        (
            "ALTER TABLE job ADD COLUMN memory_mib INTEGER NOT NULL DEFAULT 0 CHECK (memory_mib >= 0)",
            "ALTER TABLE job ADD COLUMN nodes INTEGER NOT NULL DEFAULT 0 CHECK (nodes >= 0)",
            "ALTER TABLE job ADD COLUMN started_ns INTEGER NOT NULL DEFAULT 0",
            """
            CREATE TABLE usage (
                job    TEXT NOT NULL REFERENCES job (name),
                day    TEXT NOT NULL CHECK (day GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]'),  -- UTC
                node_s REAL NOT NULL CHECK (node_s >= 0),
                PRIMARY KEY (job, day)
            ) STRICT
            """,
            "CREATE INDEX usage_day ON usage (day)",
            "CREATE INDEX acquisition_trace ON acquisition (trace)",  # an experiment is the beginning of its traces
        ),
    ),
)
"""A step that was released is never edited: what changes the tables, or a state's name, is a new step."""


def open_database(path: Path, *, read_only: bool = False, steps: Collection[Step] = STEPS) -> sqlite3.Connection:
    """Open a journal file and bring its tables up to date.

    Raises
    ------
    JournalError
        Damaged, newer than this program, on a network disk, or a rebuild of it was cut short.
    """
    if path.with_name(path.name + ".new").exists():
        raise JournalError(
            f"{printable(str(path))}: it is being rebuilt, or that was cut short", next_step="Run: emflow rebuild"
        )
    if read_only and not path.exists():
        raise Unavailable(f"{printable(str(path))}: no journal yet", next_step="Start the service: emflow run")
    kind = _network_disk(path.parent)
    if kind:
        raise JournalError(
            f"{printable(str(path))}: a journal can't live on a network disk ({kind})",
            next_step="Point state in [service] at a folder on a local disk",
        )
    try:
        return _open(path, read_only, steps)
    except sqlite3.Error as error:
        raise translated(error, path) from error


def _open(path: Path, read_only: bool, steps: Collection[Step]) -> sqlite3.Connection:
    # as_uri() quotes, which keeps ? and # of a folder's name out of the URI's query
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            migrate(connection, steps, path=path)
        _check_version(connection, len(steps), path)
        if not read_only:  # reads all of both tables: for the service's start, not for each look
            _check_pages(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection, steps: Collection[Step], *, path: Path) -> None:
    """Run the steps that a file has not seen yet, all in one transaction."""
    numbers = [step.version for step in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise AssertionError(f"migrations must be numbered 1, 2, 3 …, not {numbers}")
    if version_of(connection) >= len(steps):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        done = version_of(connection)  # again: another process may have migrated in between
        if done == 0 and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise JournalError(f"{printable(str(path))}: a database, but not a journal of emflow")
        for step in steps:
            if step.version > done:
                for statement in step.sql:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {step.version:d}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def version_of(connection: sqlite3.Connection) -> int:
    """Number of the last step that a file has seen."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _check_version(connection: sqlite3.Connection, newest: int, path: Path) -> None:
    version = version_of(connection)
    if version > newest:
        raise JournalError(
            f"{printable(str(path))}: written by a newer emflow (tables {version}, known are {newest})",
            next_step="Use that emflow, or keep a copy of the file and run: emflow rebuild",
        )
    if version < newest:
        raise JournalError(
            f"{printable(str(path))}: written by an older emflow", next_step="Start the service once: emflow run"
        )


def _check_pages(connection: sqlite3.Connection, path: Path) -> None:
    # events are many and only history: damage there shows when they are read
    for (table,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name != 'event'"):
        said = connection.execute(f"PRAGMA quick_check('{table}')").fetchone()[0]
        if said != "ok":
            raise JournalError(f"{printable(str(path))}: damaged ({printable(said)})", next_step=REBUILD)


def translated(error: sqlite3.Error, path: Path) -> Exception:
    """Our error for one of SQLite's; programming errors stay as they are."""
    where = printable(str(path))
    code = getattr(error, "sqlite_errorname", "") or ""
    if code.startswith("SQLITE_FULL"):
        return JournalFull(f"{where}: the disk of the journal is full", next_step="Make room; nothing is lost")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Busy(f"{where}: another process has held the journal for {BUSY_TIMEOUT_S:.0f} s")
    if code.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")):
        return NotAllowed(f"{where}: the journal may not be written: {error}")
    if code.startswith("SQLITE_CANTOPEN"):
        return NotAllowed(f"{where}: the journal can't be opened: {error}", next_step="Check the folder and its rights")
    if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR", "SQLITE_SCHEMA")):
        return JournalError(f"{where}: damaged or unreadable: {error}", next_step=REBUILD)
    if isinstance(error, sqlite3.IntegrityError):
        return ValueError(f"{where}: {error}")
    if type(error) is sqlite3.DatabaseError:
        return JournalError(f"{where}: {error}", next_step=REBUILD)
    return error


def _network_disk(folder: Path) -> str:
    """Type of the network file system that a folder is on; empty for a local disk, or where Linux can't tell."""
    try:
        device = folder.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            kind = fields[fields.index("-") + 1]  # optional fields end with a dash: proc(5)
            return kind if kind in REMOTE else ""
    return ""
