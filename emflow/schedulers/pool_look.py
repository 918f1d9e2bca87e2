"""What a pool itself writes into its folder, read without asking it; and what is in its hands."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from emflow.errors import printable
from emflow.schedulers.pool_folder import PoolFolder
from emflow.schedulers.pool_plan import Seen, Standing
from mpi_kernels import jsonfile
from mpi_kernels.errors import FormatError
from mpi_kernels.pool.errors import PoolRefused
from mpi_kernels.pool.records import (
    ENDED_FILE,
    ENDPOINT_FILE,
    HEARTBEAT_FILE,
    POOL_FILE,
    SPOOL,
    TAKEN,
    Beat,
    Ended,
    Endpoint,
    PoolSpec,
    Task,
    check_task,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What there was in a pool's folder at one moment.

    Attributes
    ----------
    beat : bytes
        The heartbeat as it is: that it changes is the sign of life, whatever it says.
    """

    spec: PoolSpec | None
    endpoint: Endpoint | None
    told: Beat | None
    ended: Ended | None
    beat: bytes = b""

    @property
    def begun(self) -> bool:
        """Whether its ranks have started."""
        return self.told is not None

    @property
    def left_s(self) -> float | None:
        """Until its walltime is up, at its last heartbeat and by its own clock; None before it takes tasks."""
        if self.endpoint is None or self.told is None or not self.endpoint.stops_ns:
            return None
        return (self.endpoint.stops_ns - self.told.wall_ns) / 1e9

    @property
    def age_s(self) -> float:
        """Since it was started, at its last heartbeat and by its own clock; 0 before it takes tasks."""
        if self.endpoint is None or self.told is None:
            return 0.0
        if self.spec is not None and self.left_s is not None and self.spec.walltime_s:
            return max(0.0, self.spec.walltime_s - self.left_s)
        return max(0.0, (self.told.wall_ns - self.endpoint.wall_ns) / 1e9)

    @property
    def nodes(self) -> int:
        """Nodes that it has."""
        return len(set(self.endpoint.nodes)) if self.endpoint is not None else 0

    @property
    def host(self) -> str:
        """Where its ranks are, for people."""
        if self.endpoint is None:
            return ""
        return ",".join(dict.fromkeys(printable(node) for node in self.endpoint.nodes or (self.endpoint.host,)))


def read_pool(folder: Path) -> Found:
    """What a pool has written; a file that is torn or foreign counts as not there."""
    beat = b""
    try:
        beat = (folder / HEARTBEAT_FILE).read_bytes()
        told: Beat | None = _decoded(Beat, beat)
    except (OSError, FormatError):
        told = None
    return Found(
        spec=_record(PoolSpec, folder / POOL_FILE),
        endpoint=_record(Endpoint, folder / ENDPOINT_FILE),
        told=told,
        ended=_record(Ended, folder / ENDED_FILE),
        beat=beat,
    )


def standing_of(found: Found, *, queued: bool, silent: bool, leaving: bool) -> Standing:
    """One word for how a pool is."""
    if queued:
        return "queued"
    if silent:
        return "silent"
    if leaving or found.ended is not None or (found.told is not None and found.told.state == "draining"):
        return "draining"
    if found.told is None or found.endpoint is None or found.told.state == "starting":
        return "starting"
    return "working" if found.told.state == "working" else "idle"


def seen(
    name: str, found: Found, standing: Standing, *, silence_s: float = 0.0, allocation: str = "", fallback: PoolSpec
) -> Seen:
    """A pool for those who plan; ``fallback`` describes one whose ``pool.json`` was not written."""
    spec, told = found.spec or fallback, found.told
    left_s = found.left_s
    return Seen(
        name=name,
        standing=standing,
        ranks=spec.ranks,
        walltime_s=spec.walltime_s,
        warn_s=spec.warn_s,
        left_s=None if left_s is None else left_s - silence_s,
        host=found.host,
        job=told.job if told is not None else "",
        done=told.done if told is not None else 0,
        nodes=found.nodes,
        age_s=found.age_s,
        allocation=allocation,
        deaf=standing == "draining" and found.ended is None and told is not None and told.state != "draining",
    )


def holds(folder: Path, job: str) -> bool:
    """Whether a job is in a pool's hands: it waits there, or is being reduced."""
    return any((folder / place / f"{job}.json").exists() for place in (SPOOL, TAKEN))


def task_folder(folder: Path, job: str) -> str:
    """Run folder, below the root of them all, of a job in a pool's hands; empty if it is not there, or no good."""
    tasks = (_record(Task, folder / place / f"{job}.json") for place in (SPOOL, TAKEN))
    task = next((one for one in tasks if one is not None), None)
    with contextlib.suppress(PoolRefused):
        if task is not None and task.job == job:
            check_task(task)
            return task.folder
    return ""


def hands(folder: Path) -> frozenset[str]:
    """All jobs in a pool's hands."""
    jobs: set[str] = set()
    for place in (SPOOL, TAKEN):
        with contextlib.suppress(OSError), os.scandir(folder / place) as entries:
            jobs.update(entry.name.removesuffix(".json") for entry in entries)
    return frozenset(jobs)


def holder_of(folder: PoolFolder, job: str) -> str | None:
    """The pool that has a job in its hands, newest pool first; None if none has."""
    return next((name for name in reversed(folder.open_names()) if holds(folder.of(name), job)), None)


def empty_hands(folder: Path) -> None:
    """Take the waiting tasks out of a pool that has ended: should it turn up after all, it finds nothing to do."""
    for place in (SPOOL, TAKEN):
        for path in (folder / place).glob("*.json"):
            path.unlink(missing_ok=True)


def _record(kind: type[T], path: Path) -> T | None:
    try:
        found: T = _decoded(cast("Hashable", kind), path.read_bytes())
    except (OSError, FormatError):
        return None
    return found


@functools.lru_cache(maxsize=512)
def _decoded(kind: Hashable, data: bytes) -> Any:
    """A record from its bytes: the same few files are looked at for every job, and hardly ever change."""
    return jsonfile.decode(cast("type[Any]", kind), data)
