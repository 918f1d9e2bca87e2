"""The journal's connection to SQLite: transactions, statements and our errors; it knows nothing of what is stored."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from emflow.journal_schema import open_database, translated


class Database:
    """One connection, for one thread.

    Table and column names in statements are this package's own; values always travel as parameters.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._connection = open_database(path, read_only=read_only)
        self._depth = 0
        self._version = self._data_version()

    def close(self) -> None:
        """Close the file; the last one to do so folds the write-ahead log in."""
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; an inner one joins the outer, yet undoes itself alone if it fails."""
        depth = self._depth
        # always IMMEDIATE: a read transaction that wants to write later fails at once with SQLITE_BUSY_SNAPSHOT
        self.run("BEGIN IMMEDIATE" if depth == 0 else f"SAVEPOINT inner_{depth}")
        self._depth += 1
        try:
            yield
            self.run("COMMIT" if depth == 0 else f"RELEASE inner_{depth}")
        except BaseException:
            if self._connection.in_transaction:  # a full disk makes SQLite roll back by itself
                self._undo(depth)
            raise
        finally:
            self._depth = depth

    def _undo(self, depth: int) -> None:
        if depth == 0:
            self.run("ROLLBACK")
        else:
            self.run(f"ROLLBACK TO inner_{depth}")
            self.run(f"RELEASE inner_{depth}")

    def run(self, sql: str, values: Collection[Any] = ()) -> int:
        """Run a statement that returns no rows; returns how many it changed."""
        try:
            return self._connection.execute(sql, tuple(values)).rowcount
        except sqlite3.Error as error:
            raise translated(error, self.path) from error

    def all(self, sql: str, values: Collection[Any] = ()) -> list[sqlite3.Row]:
        """Every row of a query: no cursor stays open, which would hold a read transaction."""
        try:
            return self._connection.execute(sql, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise translated(error, self.path) from error

    def changed_elsewhere(self) -> bool:
        """Whether another connection has written since the last call."""
        before, self._version = self._version, self._data_version()
        return self._version != before

    def _data_version(self) -> int:
        return int(self.all("PRAGMA data_version")[0][0])

    def insert(self, table: str, key: str, values: Mapping[str, Any]) -> bool:
        """Insert a row; False if its key is there already."""
        sql = (
            f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"  # noqa: S608
            f" ON CONFLICT ({key}) DO NOTHING"
        )
        return self.run(sql, values.values()) == 1

    def update(self, table: str, key: str, value: str, state: str, columns: Mapping[str, Any]) -> None:
        """Change the row with a key, provided that it is in a state."""
        sets = ", ".join(f"{name} = ?" for name in columns)
        sql = f"UPDATE {table} SET {sets} WHERE {key} = ? AND state = ?"  # noqa: S608
        if self.run(sql, [*columns.values(), value, str(state)]) != 1:
            raise AssertionError(f"{value} left {state} inside this transaction")

    def in_states(
        self, table: str, states: Collection[str] | None, limit: int | None, newest_first: bool
    ) -> list[sqlite3.Row]:
        """Rows in some states, or in any, ordered by first sight."""
        order = f"ORDER BY seq {'DESC' if newest_first else 'ASC'} LIMIT ?"
        most = -1 if limit is None else limit
        if states is None:
            return self.all(f"SELECT * FROM {table} {order}", (most,))  # noqa: S608
        # one ordered walk over the index for each state, merged: IN (...) with ORDER BY would sort all of them first
        walks = " UNION ALL ".join([f"SELECT * FROM {table} WHERE state = ?"] * len(states))  # noqa: S608
        return self.all(f"{walks} {order}", [*map(str, states), most]) if states else []

    def counts(self, table: str) -> dict[str, int]:
        """Number of rows in each state that any row is in."""
        rows = self.all(f"SELECT state, count(*) FROM {table} GROUP BY state")  # noqa: S608
        return {row[0]: row[1] for row in rows}
