"""A pool from its start to its end, on every rank."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from mpi_kernels import failure, job, jsonfile, stopping
from mpi_kernels.contract import CLAIM_FILE, JOB_FILE, JobSpec
from mpi_kernels.errors import FormatError, KernelError
from mpi_kernels.events import host_name
from mpi_kernels.pool.crew import GRACE_S, Crew
from mpi_kernels.pool.desk import Desk
from mpi_kernels.pool.errors import PoolGone, PoolRefused
from mpi_kernels.pool.listener import Listener, addresses
from mpi_kernels.pool.records import (
    ENDED_FILE,
    ENDPOINT_FILE,
    HEARTBEAT_FILE,
    Endpoint,
    PoolSpec,
    Task,
    read_secret,
    read_spec,
    run_folder,
)
from mpi_kernels.pool.warming import warm
from mpi_kernels.ranks import Ranks, check_size

PULSE_S = 1.0
"""Between two heartbeats."""

SWITCH_S = 0.0005
"""At most so long rank 0's other threads wait for the one that computes: they answer clients (Python's own is 5 ms)."""

LOOK_S, LONGEST_LOOK_S, CONNECTED_LOOK_S = 0.005, 0.05, 0.25
"""Between two looks into the spool: at first, after a while without news, and while a client is connected."""

SHORTEST_S = 2 * stopping.LEAD_S
"""Of a task with a shorter limit there would be little to keep: whoever sent it stops it."""

ABORTED = 70
"""Exit code of ranks that can't go on together: they may be started again."""


def serve(folder: Path, world: Any) -> None:
    """Take tasks until the pool ends; every rank calls it.

    Raises
    ------
    KernelError, OSError
        It could not be started, or its ranks can't go on together: the caller ends them all.
    """
    rank = int(world.Get_rank())
    early: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: early.append(number))  # drained before it has begun
    spec = read_spec(folder)
    check_size(Ranks(world), spec.ranks, str(folder / "pool.json"))
    if (folder / ENDED_FILE).exists():
        raise PoolGone("it has ended", path=folder, next_step="start a new pool")
    found = warm(spec.device)
    crew = Crew(world, spec.nap_ms / 1000)
    if rank:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, crew.hurry)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        crew.serve()
        return
    lead = _Lead(folder, spec, crew, found)
    lead.serve(drained=bool(early))


class _Lead:
    """Rank 0."""

    def __init__(self, folder: Path, spec: PoolSpec, crew: Crew, found: str) -> None:
        self._folder, self._spec, self._crew = folder, spec, crew
        before = _endpoint(folder)
        self._life = 1 if before is None else before.life + 1
        self._stops_ns = stops_ns(spec, before, os.environ)
        self._desk = Desk(folder, spec, self._life, crew.stop)
        self._listener: Listener | None = None
        self._over = threading.Event()
        self._stopped_by = 0
        self._say(f"{crew.size} ranks, {found}")

    def serve(self, *, drained: bool) -> None:
        """Take tasks until the pool ends, and say why it did."""
        sys.setswitchinterval(SWITCH_S)
        beats = threading.Thread(target=self._beats, name="pool-heartbeat", daemon=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGUSR2, self._crew.interrupted)
        if drained:
            self._desk.drain("drained")
        ended = self._desk.resume()
        try:
            self._listen()
            beats.start()
            for end in ended:
                self._say(f"{end.job}: {end.how}, {end.why}")
            self._work()
            last = self._desk.close(self._farewell())
        finally:
            self._over.set()
        beats.join()
        self._say(f"ends: {last.message}; {last.done} tasks done, {len(last.left)} left")
        if self._listener is not None:
            self._listener.push({"over": last.why})
            self._listener.close()
        self._crew.dismiss()

    def _work(self) -> None:
        look_s = LOOK_S
        spool = self._spec.reach != "tcp"
        while self._desk.draining is None:
            news = self._desk.look() if spool else False
            self._check_time()
            connected = self._listener is not None and self._listener.connected
            look_s = LOOK_S if news else min(2 * look_s, CONNECTED_LOOK_S if connected else LONGEST_LOOK_S)
            task = self._desk.next(look_s)
            if task is not None:
                self._do(task)
                look_s = LOOK_S

    def _do(self, task: Task) -> None:
        """One task; only what leaves the ranks unfit for the next gets out of here."""
        folder: Path | None = None
        error: BaseException | None = None
        ranks = 0
        try:
            folder = run_folder(self._spec.runs, task)
            ranks = 0 if (folder / CLAIM_FILE).exists() else self._ranks(folder, task)
        except PoolRefused as refused:
            folder, error = None, refused
        except Exception as wrong:  # noqa: BLE001  a task that can't be read must not end the pool, again and again
            error = wrong
        if folder is not None and ranks:
            self._limit(task)
            error = self._crew.run(folder, ranks)
        if error is not None:
            self._say(f"{task.job}: {failure.one_line(error)}")
        self._desk.finished(task, error, folder, self._crew.begun_ns)

    def _limit(self, task: Task) -> None:
        """Have the task that begins end in time by itself: before its own limit, or before the pool's."""
        stopping.clear()
        left_s = (self._stops_ns - time.time_ns()) / 1e9 if self._stops_ns else None
        if task.time_limit_s and (left_s is None or task.time_limit_s < left_s):
            stopping.expire(task.time_limit_s if task.time_limit_s >= SHORTEST_S else None)
        else:
            stopping.expire(left_s, "the time of its pool is nearly up", limit=False)

    def _ranks(self, folder: Path, task: Task) -> int:
        """How many ranks a job wants; one that can't run here fails before any rank begins it."""
        attempt = job.Attempt(folder, Ranks())
        try:
            spec = jsonfile.read(JobSpec, folder / JOB_FILE)
            if spec.job != task.job:
                raise FormatError(f"it describes {spec.job!r:.60}, not {task.job}", path=folder / JOB_FILE)
            if not 1 <= spec.ranks <= self._crew.size:
                raise PoolRefused(
                    f"{task.job} asks for {spec.ranks} ranks; this pool has {self._crew.size}",
                    next_step="start a pool with more ranks, or plan the job with fewer",
                )
        except PoolRefused:
            raise
        except (KernelError, OSError) as error:
            attempt.fail(error)
            raise
        return spec.ranks

    def _listen(self) -> None:
        """Open the ear, if it has one, and say where it is."""
        where: tuple[str, ...] = ()
        if self._spec.reach != "spool":
            secret = read_secret(self._spec.secret)
            near = self._spec.gateway == host_name()
            where = ("127.0.0.1",) if near else (*addresses(), "127.0.0.1")
            bind = "127.0.0.1" if near else "0.0.0.0"  # noqa: S104  the client is on another machine, and proves itself
            self._listener = Listener(secret, self._spec.name, bind, self._desk.answer)
            self._desk.push = self._listener.push
            self._listener.start()
        self._beat(starting=True)
        endpoint = Endpoint(
            host=host_name(),
            addresses=where,
            port=0 if self._listener is None else self._listener.port,
            pid=os.getpid(),
            scheduler_id=os.environ.get("SLURM_JOB_ID", ""),
            ranks=self._crew.size,
            nodes=self._crew.nodes,
            wall_ns=time.time_ns(),
            stops_ns=self._stops_ns,
            life=self._life,
        )
        jsonfile.publish(self._folder / ENDPOINT_FILE, jsonfile.encode(endpoint))

    def _beats(self) -> None:
        """Thread: heartbeat, time and spool, also while the ranks compute or hang."""
        while True:
            over = self._over.is_set()
            with contextlib.suppress(OSError):  # the share is away: the next one will do
                self._beat()
            if over:
                return
            self._check_time()
            if self._spec.reach != "tcp":
                self._desk.look(afresh=True)
            if self._desk.overdue(GRACE_S):
                self._say("a cancelled job does not stop: the ranks are ended")
                self._crew.abort(ABORTED)
            self._over.wait(PULSE_S)

    def _beat(self, *, starting: bool = False) -> None:
        temporary = self._folder / f".{HEARTBEAT_FILE}.{os.getpid()}"
        temporary.write_bytes(jsonfile.encode(self._desk.beat(starting=starting)))
        temporary.replace(self._folder / HEARTBEAT_FILE)

    def _check_time(self) -> None:
        if self._stops_ns and time.time_ns() > self._stops_ns - int(self._spec.warn_s * 1e9):
            self._desk.drain("time")

    def _signalled(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """USR1 drains; TERM and INT end the job that runs as well."""
        if number == signal.SIGUSR1:
            self._desk.drain("drained")
            return
        self._stopped_by = number
        self._desk.drain("stopped")
        self._crew.stop_running()

    def _farewell(self) -> str:
        if self._stopped_by:
            return f"stopped by {signal.Signals(self._stopped_by).name}"
        return {"time": "its time is up", "drained": "it was told to drain"}.get(self._desk.draining or "", "")

    def _say(self, text: str) -> None:
        print(f"pool {self._spec.name}: {text}", file=sys.stderr, flush=True)


def stops_ns(spec: PoolSpec, before: Endpoint | None, environment: Mapping[str, str]) -> int:
    """Wall time of the pool's end; 0 if it has none.

    What Slurm says wins (``SLURM_JOB_END_TIME``; 22.05 does not say it), then what an earlier life said.  Else the time
    counts from when the job script began, or from now.
    """
    said = environment.get("SLURM_JOB_END_TIME", "")
    if said.isdecimal():
        return int(said) * 1_000_000_000
    if before is not None:
        return before.stops_ns
    began = environment.get("EMFLOW_POOL_BEGAN", "")
    began_ns = int(began) * 1_000_000_000 if began.isdecimal() else time.time_ns()
    return began_ns + int(spec.walltime_s * 1e9) if spec.walltime_s else 0


def _endpoint(folder: Path) -> Endpoint | None:
    with contextlib.suppress(FileNotFoundError):
        return jsonfile.read(Endpoint, folder / ENDPOINT_FILE)
    return None
