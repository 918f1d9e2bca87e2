"""Where a pool's tasks lie between their arrival and their end: taken once, from TCP or the spool, one after the other.

A task's file in ``taken/`` is what says that it is the pool's; it is there before the client is told so, and goes when
the task has ended.  So ranks that are started again know what was theirs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpi_kernels import failure, jsonfile
from mpi_kernels.contract import CLAIM_FILE, ERROR_FILE, HEARTBEAT_FILE, JOB_NAME, RESULT_FILE
from mpi_kernels.errors import FormatError, KernelError
from mpi_kernels.pool.errors import PoolError, PoolRefused
from mpi_kernels.pool.records import (
    CANCEL_SUFFIX,
    DRAIN_FILE,
    ENDED_FILE,
    SPOOL,
    TAKEN,
    Beat,
    Ended,
    How,
    PoolSpec,
    Task,
    TaskEnd,
    Why,
    check_task,
    run_folder,
)

NO_TASK: tuple[str, int, int] = ("", 0, 0)

WORDS = 250
"""Characters of an error that clients are told: each takes up to 14 bytes of a line of 4096, as JSON within JSON."""


class Desk:
    """The tasks of a pool, for the thread that runs them and for those that bring them.

    Parameters
    ----------
    folder : Path
        Of the pool's instance.
    spec : PoolSpec
    life : int
        How often the ranks were started.
    stop : callable
        Stops a job that runs.
    """

    def __init__(self, folder: Path, spec: PoolSpec, life: int, stop: Callable[[str], None]) -> None:
        self._folder, self._spec, self._life, self._stop = folder, spec, life, stop
        self._lock = threading.RLock()
        self._waiting: OrderedDict[str, tuple[Task, int]] = OrderedDict()  # with the monotonic time of its taking
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._seen: list[str] = []  # in the spool
        self._running = NO_TASK  # job, and wall time of its start and of its last progress
        self._cancelled_at: float | None = None
        self._done = self._failed = self._taken_ns = 0
        self._why: Why | None = None
        self.push: Callable[[dict[str, Any]], None] = lambda _: None
        for name in (SPOOL, TAKEN):
            (folder / name).mkdir(exist_ok=True)

    # --- tasks come

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a client is told; whatever is wrong with its question is an answer too."""
        try:
            do = body.get("do")
            if do == "send":
                return self.take(jsonfile.from_plain(Task, body.get("task")))
            if do == "cancel":
                return {"cancelled": self.cancel(str(body.get("job")))}
            if do == "drain":
                self.drain("drained")
                return {"ok": True}
            return {"beat": jsonfile.encode(self.beat()).decode("ascii")}
        except (PoolError, FormatError) as error:
            return {"refused": error.message[:WORDS], "next_step": error.next_step}
        except OSError as error:
            return {"refused": f"the pool can't write its record: {error.strerror}", "again": True}

    def take(self, task: Task) -> dict[str, Any]:
        """Take a task; one that is here already is not taken again.

        Raises
        ------
        PoolRefused
            Its names are no good, or there is no such run folder.
        OSError
            It could not be written down, and was not taken.
        """
        arrived_ns = time.monotonic_ns()
        check_task(task)
        with self._lock:
            if task.job in self._waiting or task.job == self._running[0]:
                return {"taken": task.job}
            if self._why is not None:
                return {"drains": self._why}
            run_folder(self._spec.runs, task)
            _note(self._taken(task.job), jsonfile.encode(task))
            self._put(task, arrived_ns)
        return {"taken": task.job}

    def look(self, *, afresh: bool = False) -> bool:
        """Take what lies in the spool; whether it has changed since the last look.

        Parameters
        ----------
        afresh : bool
            Ask the file server itself: an NFS client believes what it knows of a folder, for up to a minute, until it
            has changed it.  Source: nfs(5), acdirmax.
        """
        try:
            if afresh:
                os.utime(self._folder / SPOOL)
            names = sorted(entry.name for entry in os.scandir(self._folder / SPOOL) if not entry.name.startswith("."))
        except OSError:  # the share is away: it will be back
            return False
        for name in names:
            with contextlib.suppress(OSError):  # it is looked at again
                self._spooled(name)
        changed, self._seen = names != self._seen, names
        return changed

    def resume(self) -> list[TaskEnd]:
        """Take again what an earlier life had taken and not begun; what it had begun is the service's."""
        ended = []
        for path in sorted((self._folder / TAKEN).glob("*.json")):
            try:
                task = jsonfile.read(Task, path)
                folder = run_folder(self._spec.runs, task)
            except KernelError:
                path.unlink(missing_ok=True)
                continue
            if (folder / CLAIM_FILE).exists():
                path.unlink(missing_ok=True)
                ended.append(TaskEnd(job=task.job, how=_how(folder, "lost"), why="the ranks were ended"))
            else:
                self._put(task, time.monotonic_ns())
        return ended

    def cancel(self, job: str) -> bool:
        """Stop a task that waits or runs; False if it is not here."""
        with self._lock:
            if self._waiting.pop(job, None) is not None:
                self._gone(TaskEnd(job=job, how="cancelled", why="before it began"))
                return True
            if job and job == self._running[0]:
                self._cancelled_at = self._cancelled_at or time.monotonic()
                self._stop(job)
                return True
        return False

    # --- and go

    def next(self, timeout_s: float) -> Task | None:
        """The oldest task that waits; it runs from now on.  None if there is none within the time, or no more."""
        task = None
        with self._lock:
            if self._waiting and self._why is None:
                _, (task, self._taken_ns) = self._waiting.popitem(last=False)
                now = time.time_ns()
                self._running, self._cancelled_at = (task.job, now, now), None
        if task is None and self._why is None:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=timeout_s)
        return task

    def finished(self, task: Task, error: BaseException | None, folder: Path | None, begun_ns: int) -> None:
        """Take leave of the task that ran: what failed, its run folder if it has one, when all ranks had begun."""
        why = "" if error is None else failure.one_line(error)[:WORDS]
        with self._lock:
            how: How = "cancelled" if self._cancelled_at is not None else "refused" if folder is None else "error"
            how = how if folder is None else _how(folder, how if error is not None else "claimed")
            self._running, self._cancelled_at = NO_TASK, None
            self._done += 1
            self._failed += how != "result"
            dispatch_ms = max(0.0, round((begun_ns - self._taken_ns) / 1e6, 3))  # 0: it never began
            self._gone(TaskEnd(job=task.job, how=how, why=why, dispatch_ms=dispatch_ms))

    def drain(self, why: Why) -> None:
        """Take nothing new, and end after the task that runs; also from a signal handler."""
        if self._why is None:
            self._why = why
        self._bell.put(None)

    @property
    def draining(self) -> Why | None:
        """Why nothing new is taken, if so."""
        return self._why

    def overdue(self, seconds: float) -> bool:
        """Whether the task that runs was cancelled so long ago, and still runs."""
        at = self._cancelled_at
        return at is not None and time.monotonic() - at > seconds

    def close(self, message: str) -> Ended:
        """Publish ``ended.json``; nothing is taken any more."""
        with self._lock:
            self._why = self._why or "stopped"
            left = tuple(self._waiting)
            ended = Ended(why=self._why, message=message, left=left, done=self._done, wall_ns=time.time_ns())
            jsonfile.publish(self._folder / ENDED_FILE, jsonfile.encode(ended))
        return ended

    # --- how it is

    def beat(self, *, starting: bool = False) -> Beat:
        """The state of now."""
        job, begun, _ = self._running
        state = "starting" if starting else "draining" if self._why else "working" if job else "idle"
        return Beat(
            state=state,  # type: ignore[arg-type]
            job=job,
            queued=len(self._waiting),
            done=self._done,
            failed=self._failed,
            wall_ns=time.time_ns(),
            task_ns=begun,
            progress_ns=self._progress(),
            life=self._life,
        )

    def _progress(self) -> int:
        """When the task last showed progress: by the heartbeat in its run folder."""
        job, begun, seen = self._running
        if not job:
            return 0
        match = JOB_NAME.fullmatch(job)
        assert match is not None
        with contextlib.suppress(OSError, KernelError):
            task = jsonfile.read(Task, self._taken(job))
            beat = Path(self._spec.runs, task.folder, HEARTBEAT_FILE).stat().st_mtime_ns
            with self._lock:
                if self._running[0] == job and beat > seen:
                    self._running = (job, begun, beat)
                    return beat
        return seen

    # --- inside

    def _taken(self, job: str) -> Path:
        return self._folder / TAKEN / f"{job}.json"

    def _put(self, task: Task, arrived_ns: int) -> None:
        with self._lock:
            self._waiting[task.job] = (task, arrived_ns)
        self._bell.put(None)

    def _gone(self, end: TaskEnd) -> None:
        self._taken(end.job).unlink(missing_ok=True)
        self.push({"ended": jsonfile.encode(end).decode("ascii")})

    def _spooled(self, name: str) -> None:
        path = self._folder / SPOOL / name
        if name == DRAIN_FILE:
            path.unlink(missing_ok=True)
            self.drain("drained")
        elif name.endswith(CANCEL_SUFFIX):
            path.unlink(missing_ok=True)
            self.cancel(name.removesuffix(CANCEL_SUFFIX))
        elif name.endswith(".json") and JOB_NAME.fullmatch(name.removesuffix(".json")) and self._why is None:
            self._take_spooled(path, name.removesuffix(".json"))

    def _take_spooled(self, path: Path, job: str) -> None:
        arrived_ns = time.monotonic_ns()
        with self._lock:
            known = job in self._waiting or job == self._running[0]
            try:
                if known:
                    path.unlink(missing_ok=True)
                    return
                task = jsonfile.read(Task, path)
                if task.job != job:
                    raise PoolRefused(f"it names {task.job!r:.60}")
                run_folder(self._spec.runs, task)
                path.replace(self._taken(job))
            except FileNotFoundError:  # its sender took it back
                return
            except KernelError as error:
                path.unlink(missing_ok=True)
                self._gone(TaskEnd(job=job, how="refused", why=failure.one_line(error)[:WORDS]))
                return
            self._put(task, arrived_ns)


def _how(folder: Path, otherwise: How) -> How:
    """How a task ended, as its run folder says."""
    if (folder / RESULT_FILE).exists():
        return "result"
    return "error" if otherwise in ("lost", "claimed") and (folder / ERROR_FILE).exists() else otherwise


def _note(path: Path, data: bytes) -> None:
    """Write a small file, not to last: it has to outlive the ranks, and whoever loses its node asks the run folder."""
    try:
        with path.open("wb") as file:
            file.write(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
