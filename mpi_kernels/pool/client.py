"""Hands tasks to a pool: over TCP, or as files in its spool where TCP does not get through.  Standard library only."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpi_kernels import jsonfile
from mpi_kernels.errors import FormatError
from mpi_kernels.events import host_name
from mpi_kernels.pool.errors import PoolDrains, PoolError, PoolGone, PoolRefused, PoolUnreachable, WrongSecret
from mpi_kernels.pool.line import Line
from mpi_kernels.pool.records import (
    CANCEL_SUFFIX,
    DRAIN_FILE,
    ENDED_FILE,
    ENDPOINT_FILE,
    HEARTBEAT_FILE,
    SPOOL,
    TAKEN,
    Beat,
    Ended,
    Endpoint,
    Reach,
    Task,
    TaskEnd,
    check_task,
    read_secret,
    read_spec,
)

REST_S = 5.0
"""So long after TCP has failed it is not tried again, where there is the spool."""


class PoolClient:
    """One pool, from outside.

    Every call is over TCP if the pool can be reached so, else through files; with ``reach`` "tcp" or "spool" only so.
    What fails may be called again: the pool takes a task once, however often it is handed over.

    Parameters
    ----------
    folder : Path
        Of the pool's instance.
    reach : {"auto", "tcp", "spool"}
    timeout_s : float
        Of one call over TCP, connecting included.

    Raises
    ------
    PoolGone
        There is no pool in this folder.
    """

    def __init__(self, folder: Path, *, reach: Reach = "auto", timeout_s: float = 2.0) -> None:
        self._folder, self._timeout_s = folder, timeout_s
        try:
            self._spec = read_spec(folder)
        except FileNotFoundError as error:
            raise PoolGone("there is no pool", path=folder, next_step="start one") from error
        self._reach: Reach = reach if self._spec.reach == "auto" else self._spec.reach
        self._line: Line | None = None
        self._endpoint: Endpoint | None = None
        self._failed_at: float | None = None
        self._ended: list[TaskEnd] = []

    # --- tasks

    def send(self, job: str, folder: str | Path, *, time_limit_s: float = 0.0) -> None:
        """Hand a job over; returns when it is the pool's (TCP) or lies in its spool.

        Parameters
        ----------
        job : str
            ``<acquisition>-<nn>``.
        folder : str or Path
            Its run folder: below the pool's ``runs``, or relative to it.
        time_limit_s : float
            When it ends by itself; 0: it has as long as the pool.

        Raises
        ------
        PoolGone
            The pool has ended; the task is not its.
        PoolDrains
            The pool takes nothing new.
        PoolRefused
            It will never take it.
        PoolUnreachable
            Nobody answers, and files are not allowed.  Whether it was taken is not known: ask the run folder.
        WrongSecret
            The secret can't be used, or is not the pool's.
        """
        task = Task(job=job, folder=self._relative(Path(folder)), time_limit_s=time_limit_s)
        check_task(task)
        self._check_ended()
        said = self._ask({"do": "send", "task": asdict(task)})
        if said is None:
            beat = self._last_beat()
            if beat is not None and beat.state == "draining":
                raise self._drains()
            self._spool(f"{job}.json", jsonfile.encode(task))
            if self._taken_back(f"{job}.json"):
                raise self._gone()
        elif "drains" in said:
            raise self._drains()
        self._raise_refused(said)

    def cancel(self, job: str) -> None:
        """Stop a job of the pool, waiting or running; a job that is not the pool's is no error."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / SPOOL / f"{job}.json").unlink()
        said = self._ask({"do": "cancel", "job": job})
        if said is None and (self._folder / TAKEN / f"{job}.json").exists():
            self._spool(f"{job}{CANCEL_SUFFIX}", b"")

    def drain(self) -> None:
        """Tell the pool to take nothing new, finish what runs, and end."""
        if (self._folder / ENDED_FILE).exists():
            return
        said = self._ask({"do": "drain"})
        if said is None:
            self._spool(DRAIN_FILE, b"")
        self._raise_refused(said)

    def holds(self, job: str) -> bool:
        """Whether a job is in the pool's hands, waiting or running: by its files, so it holds after a restart too."""
        names = (self._folder / SPOOL / f"{job}.json", self._folder / TAKEN / f"{job}.json")
        return self.last() is None and any(path.exists() for path in names)

    # --- how it is

    def beat(self) -> Beat | None:
        """The pool's state: as it says itself over TCP, else as the heartbeat file says; None if there is neither."""
        with contextlib.suppress(PoolUnreachable):
            said = self._ask({"do": "beat"})
            if said is not None and "beat" in said:
                return jsonfile.decode(Beat, str(said["beat"]))
        return self._last_beat()

    def endpoint(self) -> Endpoint | None:
        """Where the pool listens, and until when; None before it takes tasks."""
        with contextlib.suppress(FileNotFoundError):
            return jsonfile.read(Endpoint, self._folder / ENDPOINT_FILE)
        return None

    def last(self) -> Ended | None:
        """``ended.json``: why the pool ended, and what it left; None while it has not."""
        with contextlib.suppress(FileNotFoundError):
            return jsonfile.read(Ended, self._folder / ENDED_FILE)
        return None

    def ended(self) -> list[TaskEnd]:
        """Tasks that ended since the last call, as far as the pool could tell us; does not wait."""
        if self._line is not None:
            try:
                while (said := self._line.hear(0.0)) is not None:
                    self._note(said)
            except (OSError, PoolError):
                self._hang_up()
        found, self._ended = self._ended, []
        return found

    def close(self) -> None:
        """Hang up."""
        self._hang_up()

    def fileno(self) -> int | None:
        """Of the line, to wait for what `ended` will tell; None while there is none."""
        return None if self._line is None else self._line.socket.fileno()

    # --- TCP

    def _ask(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """What the pool says; None if it is to be told through files.  A line that broke is tried once more."""
        if self._reach == "spool":
            return None
        rests = self._failed_at is not None and time.monotonic() - self._failed_at < REST_S
        if self._reach == "auto" and rests and self._line is None:
            return None
        until = time.monotonic() + self._timeout_s
        for again in (True, False):
            fresh = self._line is None
            try:
                return self._asked(body, until)
            except WrongSecret:
                self._hang_up()
                raise
            except (OSError, PoolUnreachable) as error:
                self._hang_up()
                if again and not fresh and time.monotonic() < until:
                    continue
                if self._reach == "auto":
                    self._failed_at = time.monotonic()
                    return None
                self._check_ended()
                if isinstance(error, PoolUnreachable):
                    raise
                raise self._unreachable(str(error)) from error
        return None

    def _asked(self, body: dict[str, Any], until: float) -> dict[str, Any]:
        if self._line is None:
            self._line = self._connect(until)
        self._line.say(body)
        while True:
            said = self._line.hear(until - time.monotonic())
            if said is None:
                raise self._unreachable(f"no answer within {self._timeout_s:g} s")
            if not self._note(said):
                return said

    def _connect(self, until: float) -> Line:
        endpoint = self.endpoint()
        if endpoint is None:
            raise self._unreachable("it has not said yet where it listens")
        if not endpoint.port:
            raise self._unreachable("it takes files only")
        secret = read_secret(self._spec.secret)
        wrong: Exception | None = None
        local = ("127.0.0.1",) if endpoint.host == host_name() else ()
        for address in dict.fromkeys((*local, *endpoint.addresses)):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                return Line((address, endpoint.port), secret, self._spec.name, left)
            except OSError as error:
                wrong = error
        raise self._unreachable(str(wrong or "no address answers"))

    def _unreachable(self, why: str) -> PoolUnreachable:
        return PoolUnreachable(
            f"pool {self._spec.name} can't be reached: {why}",
            path=self._folder,
            next_step='ask its heartbeat whether it lives; with [pool] reach = "auto" files are used meanwhile',
        )

    def _note(self, said: dict[str, Any]) -> bool:
        if "ended" in said:
            self._ended.append(jsonfile.decode(TaskEnd, str(said["ended"])))
        return "ended" in said

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    # --- files

    def _spool(self, name: str, data: bytes) -> None:
        spool = self._folder / SPOOL
        spool.mkdir(exist_ok=True)
        jsonfile.publish(spool / name, data)

    def _taken_back(self, name: str) -> bool:
        """Whether the pool ended before it took this file: then it is ours again."""
        if not (self._folder / ENDED_FILE).exists():
            return False
        with contextlib.suppress(FileNotFoundError):
            (self._folder / SPOOL / name).unlink()
            return True
        return False

    def _last_beat(self) -> Beat | None:
        with contextlib.suppress(OSError, FormatError):
            return jsonfile.read(Beat, self._folder / HEARTBEAT_FILE)
        return None

    # --- what goes wrong

    def _relative(self, folder: Path) -> str:
        if folder.is_absolute():
            try:
                return folder.relative_to(self._spec.runs).as_posix()
            except ValueError as error:
                step = f"pools take what is below {self._spec.runs}"
                raise PoolRefused("this is no run folder of this pool", path=folder, next_step=step) from error
        return folder.as_posix()

    def _check_ended(self) -> None:
        if (self._folder / ENDED_FILE).exists():
            raise self._gone()

    def _gone(self) -> PoolGone:
        last = self.last()
        why = "" if last is None else f": {last.message}"
        return PoolGone(f"pool {self._spec.name} has ended{why}", next_step="give the task to another pool")

    def _drains(self) -> PoolDrains:
        return PoolDrains(f"pool {self._spec.name} takes nothing new", next_step="give the task to another pool")

    @staticmethod
    def _raise_refused(said: dict[str, Any] | None) -> None:
        if said is not None and "refused" in said:
            error = PoolRefused(str(said["refused"]), next_step=str(said.get("next_step", "")))
            error.retryable = bool(said.get("again"))
            raise error
