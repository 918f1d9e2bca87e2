"""The ranks of a pool: rank 0 gives orders, the others wait for them asleep, and all do a job together.

Orders, reports and bad news are small messages on a communicator of their own, so that they get through whatever has
become of the one that a job uses.  An order goes to each rank by itself: down a tree, every rank on the way would add
its nap.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from mpi_kernels import job
from mpi_kernels.agreement import agreed, owner
from mpi_kernels.events import host_name
from mpi_kernels.failure import Stopped, one_line
from mpi_kernels.pool.team import NAP_S, SPIN_S, Elsewhere, Stuck, Team
from mpi_kernels.ranks import Ranks

GRACE_S = 10.0
"""So long the ranks may take to come together after one of them has failed; then all are ended."""

KEPT = 64
"""Teams that were given up and whose buffers are kept: what was on its way has come in long before there are more."""

MOST = 1000
"""Teams that are given up before the ranks are ended and started again: MPICH has 2048 communicators, and a task that
was cut off may hold its own for ever."""

MESSAGE = 8192
"""Bytes of the longest message: a path of 4096 bytes (PATH_MAX), escaped, and some words."""

ORDER, NOTICE, REPORT = 1, 2, 3


class Crew:
    """One rank's part in a pool.

    Parameters
    ----------
    world : mpi4py.MPI.Comm
        All ranks of the pool.
    nap_s : float
        How long an idle rank sleeps between two looks.

    Attributes
    ----------
    begun_ns : int
        Monotonic time at which the last task began on this rank; on rank 0, on the last rank of its machine.
    nodes : tuple of str
        Host of each rank; on rank 0.
    """

    def __init__(self, world: Any, nap_s: float) -> None:
        self._comm, self._nap_s = world.Dup(), nap_s
        self.rank, self.size = int(world.Get_rank()), int(world.Get_size())
        self._teams: dict[int, Team] = {self.size: Team(world.Dup(), self._look)}
        self._given_up: list[Team] = []
        self._lost = 0
        self._number, self._job = 0, ""
        self._failed = 0, 0  # task and rank of the last bad news
        self.begun_ns = 0
        self._running = False
        self._stopped = ""  # the last job that was to be stopped
        self._patience: float | None = None  # by then (monotonic) it must have gone on
        self._sends: list[Any] = []
        self.nodes: tuple[str, ...] = tuple(Ranks(world).gather_json(host_name()) or ())

    # --- rank 0

    def run(self, folder: Path, ranks: int) -> BaseException | None:
        """Do the job of a run folder on the first ``ranks`` ranks; rank 0 calls it.

        Returns
        -------
        BaseException or None
            What failed, recorded in ``error.json``; the ranks are fit for the next task.

        Raises
        ------
        Stuck
            The ranks did not come together again after one of them had failed, or tasks were cut off too often.
        """
        self._number += 1
        order = {"do": "run", "task": self._number, "folder": str(folder), "ranks": ranks}
        for rank in range(1, ranks):
            self._send(order, rank, ORDER)
        error = self._do(self._number, folder, ranks)
        failed, cut_off = self._reports(ranks, error)
        if failed or error is not None:
            torn = ranks if cut_off else 0
            self._give_up(torn)
            for rank in range(1, ranks):
                self._send({"do": "settled", "ranks": torn}, rank, ORDER)
        if self._lost >= MOST:
            raise Stuck(f"{self._lost} tasks were cut off: MPI runs out of communicators")
        return Elsewhere(min(failed)) if error is None and failed else error

    def stop(self, name: str) -> None:
        """Stop a job that runs or is about to, from any thread of rank 0."""
        self._stopped = name
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR2)  # ends its sleep, too

    def stop_running(self) -> None:
        """Stop the job that runs, if one does; only in a signal handler of rank 0's main thread."""
        if self._running:
            self._stopped = self._job
            self.interrupted()

    def interrupted(self, number: int = 0, frame: FrameType | None = None) -> None:  # noqa: ARG002
        """Signal handler of rank 0: what `stop` has asked for happens here, in the main thread."""
        if self._running and self._job == self._stopped:
            self._stopped = ""  # once: error.json is being written
            raise Stopped(signal.SIGTERM)

    def dismiss(self) -> None:
        """Let the other ranks go; rank 0 calls it."""
        for rank in range(1, self.size):
            self._send({"do": "end"}, rank, ORDER)
        for request in self._sends:
            request.Wait()

    # --- the other ranks

    def serve(self) -> None:
        """Follow rank 0's orders until it lets this rank go.

        Raises
        ------
        Stuck
            The ranks can't go on together.
        """
        while (order := self._order())["do"] != "end":
            if order["do"] == "settled":
                self._patience = None
                self._give_up(order["ranks"])
                continue
            number = order["task"]
            error = self._do(number, Path(order["folder"]), order["ranks"])
            report = {"task": number, "rank": self.rank, "ok": error is None, "begun_ns": self.begun_ns}
            report["cut_off"] = error is not None and not agreed(error)
            self._send(report, 0, REPORT)
            if error is not None:
                self._patience = time.monotonic() + GRACE_S

    def hurry(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Signal handler of the other ranks: rank 0 got the signal too, and will let them go, or is no more."""
        self._patience = time.monotonic() + GRACE_S

    # --- all of them

    def abort(self, code: int) -> None:
        """End every rank of the pool at once, from any thread."""
        self._comm.Abort(code)

    def _do(self, number: int, folder: Path, ranks: int) -> BaseException | None:
        team = self._teams.get(ranks)
        if team is None:
            group = self._comm.Get_group().Incl(range(ranks))
            team = self._teams[ranks] = Team(self._comm.Create_group(group, number & 0x7FFF), self._look)
            group.Free()
        self._number, self._job = number, f"{folder.parent.name}-{folder.name}"
        self.begun_ns = time.monotonic_ns()
        try:
            self._running = True
            try:
                self.interrupted()
                job.run(folder, Ranks(team), allocation=True)
            finally:
                self._running = False
        except Stuck:
            raise
        except BaseException as error:  # noqa: BLE001  whatever a plug-in raises, the pool goes on: sys.exit too
            if not isinstance(error, Elsewhere) and owner(error) in (None, self.rank):
                print(f"pool: rank {self.rank}: {folder.parent.name}: {one_line(error)}", file=sys.stderr, flush=True)
            if not isinstance(error, Elsewhere) and not agreed(error):
                for rank in set(range(ranks)) - {self.rank}:
                    self._send({"task": number, "rank": self.rank}, rank, NOTICE)
            return error
        return None

    def _look(self) -> None:
        """Raise if the task that runs can't go on, every time: who catches it may wait for the others again."""
        while (told := self._told(NOTICE)) is not None:
            if told["task"] == self._number:  # else it is old: two ranks may have failed at the same time
                self._failed = told["task"], told["rank"]
        if self._failed[0] == self._number:
            raise Elsewhere(self._failed[1])
        self._check_patience()

    def _reports(self, ranks: int, error: BaseException | None) -> tuple[set[int], bool]:
        """Wait until all ranks are done with a task; those that failed, and whether any left the others waiting."""
        missing, wrong = set(range(1, ranks)), set()
        cut_off = error is not None and not agreed(error)
        until = time.monotonic() + SPIN_S
        end = time.monotonic() + GRACE_S if error is not None else None
        while missing:
            report = self._told(REPORT)
            now = time.monotonic()
            if report is not None:
                missing.discard(report["rank"])
                if self.nodes[report["rank"]] == self.nodes[0]:  # clocks of other machines can't be compared
                    self.begun_ns = max(self.begun_ns, report["begun_ns"])
                cut_off = cut_off or report["cut_off"]
                if not report["ok"]:
                    wrong.add(report["rank"])
                    end = end or now + GRACE_S
            elif end is not None and now > end:
                raise Stuck(f"ranks {sorted(missing)} did not come back within {GRACE_S:g} s after one had failed")
            elif now > until:
                time.sleep(NAP_S)
        return wrong, cut_off

    def _give_up(self, ranks: int) -> None:
        team = self._teams.pop(ranks, None)
        if team is not None:
            self._lost += 1
            self._given_up = [*self._given_up[1 - KEPT :], team]

    def _order(self) -> dict[str, Any]:
        from mpi4py import MPI

        buffer, status = bytearray(MESSAGE), MPI.Status()
        request = self._comm.Irecv([buffer, MPI.BYTE], source=0, tag=ORDER)
        while not request.Test(status):
            self._check_patience()
            time.sleep(self._nap_s)
        order: dict[str, Any] = json.loads(bytes(buffer[: status.Get_count(MPI.BYTE)]))
        return order

    def _check_patience(self) -> None:
        if self._patience is not None and time.monotonic() > self._patience:
            raise Stuck(f"rank {self.rank} has heard nothing of rank 0 for {GRACE_S:g} s")

    def _told(self, tag: int) -> dict[str, Any] | None:
        """The next message with a tag, if one has come."""
        from mpi4py import MPI

        status = MPI.Status()
        if not self._comm.Iprobe(source=MPI.ANY_SOURCE, tag=tag, status=status):
            return None
        buffer = bytearray(status.Get_count(MPI.BYTE))
        self._comm.Recv([buffer, MPI.BYTE], source=status.Get_source(), tag=tag)
        told: dict[str, Any] = json.loads(bytes(buffer))
        return told

    def _send(self, message: dict[str, Any], rank: int, tag: int) -> None:
        """Send without waiting: who gets it may be busy for minutes."""
        from mpi4py import MPI

        self._sends = [request for request in self._sends if not request.Test()]
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        self._sends.append(self._comm.Isend([data, MPI.BYTE], dest=rank, tag=tag))
