"""What jobs cost: node-seconds by job and day (UTC), in a table of the journal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from emflow.journal_database import Database

DAY_NS = 86_400 * 10**9
HOUR_S = 3600.0


class Usage:
    """The table ``usage``; sums are node-hours."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def book(self, job: str, node_s: Mapping[str, float]) -> None:
        """Keep the node-seconds of a job by day; what was booked for it before is replaced, so that twice is once."""
        with self._db.transaction():
            self._db.run("DELETE FROM usage WHERE job = ?", (job,))
            for day, spent in node_s.items():
                self._db.run("INSERT INTO usage (job, day, node_s) VALUES (?, ?, ?)", (job, day, float(spent)))

    def of_day(self, day: str) -> float:
        """Node-hours of all jobs on a day such as ``2026-11-28``."""
        return self._hours("SELECT sum(node_s) FROM usage WHERE day = ?", day)

    def of_acquisition(self, acquisition: str) -> float:
        """Node-hours of all attempts at an acquisition."""
        return self._hours(
            "SELECT sum(node_s) FROM usage JOIN job ON job.name = usage.job WHERE job.acquisition = ?", acquisition
        )

    def of_experiment(self, experiment: str) -> float:
        """Node-hours of all jobs on acquisitions that commands of an experiment made."""
        # the command is the acquisition's trace, and begins with the experiment's id and a hyphen; "." comes after "-"
        return self._hours(
            "SELECT sum(node_s) FROM acquisition JOIN job ON job.acquisition = acquisition.id"
            " JOIN usage ON usage.job = job.name WHERE trace >= ? AND trace < ?",
            f"{experiment}-",
            f"{experiment}.",
        )

    def of_job(self, job: str) -> dict[str, float]:
        """Node-seconds of a job by day."""
        return {row["day"]: row["node_s"] for row in self._db.all("SELECT * FROM usage WHERE job = ?", (job,))}

    def _hours(self, sql: str, *values: str) -> float:
        return float(self._db.all(sql, values)[0][0] or 0.0) / HOUR_S


def by_day(started_ns: int, ended_ns: int, nodes: int) -> dict[str, float]:
    """Node-seconds between two wall times, by day: a job that runs over midnight belongs to both."""
    return {day: (stop - start) / 1e9 * nodes for day, start, stop in _days(started_ns, ended_ns)}


def day_of(wall_ns: int) -> str:
    """The UTC day of a wall time."""
    return datetime.fromtimestamp(wall_ns // 10**9, UTC).date().isoformat()


def _days(started_ns: int, ended_ns: int) -> Iterator[tuple[str, int, int]]:
    while started_ns < ended_ns:
        stop = min(ended_ns, (started_ns // DAY_NS + 1) * DAY_NS)
        yield day_of(started_ns), started_ns, stop
        started_ns = stop
