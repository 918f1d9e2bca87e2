"""A communicator whose waiting ends when another rank has failed: then the ranks are free for the next task.

A rank that fails leaves the others in a collective that can never end; MPI alone knows only to abort them all.  Here
every collective is the non-blocking one, and who waits for it looks out for bad news.  The communicator is then given
up, with what hangs in it; the next task gets a new one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mpi_kernels.errors import KernelError

SPIN_S = 0.001
"""So long a rank spins: most collectives are over by then."""

NAP_S = 0.0001
"""Between two looks afterwards: leaves the core to ranks that still compute, and to the threads of this one."""


class Elsewhere(KernelError):
    """Another rank has failed; what it says is in ``error.json``."""

    code = "elsewhere"
    retryable = True

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} has failed", next_step="its own error says why")


class Stuck(KernelError):
    """These ranks can't go on together: they are ended, and started again."""

    code = "stuck"
    retryable = True


class Team:
    """What `mpi_kernels.ranks.Ranks` needs of a communicator, for one task after the other.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Used for nothing else.
    look : callable
        Raises if the task can't go on; called now and then while this rank waits, and by a job while it computes.
    """

    def __init__(self, comm: Any, look: Callable[[], None]) -> None:
        from mpi4py import MPI

        self._comm, self.look = comm, look
        self._predefined = (MPI.SUM, MPI.MAX, MPI.MIN)
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)  # has no non-blocking form, so it is asked once
        self._on_node = int(node.Get_size())
        node.Free()
        self._left: list[Any] = []

    def Get_rank(self) -> int:  # noqa: N802  mpi4py's names, here and below
        """Of this process."""
        return int(self._comm.Get_rank())

    def Get_size(self) -> int:  # noqa: N802
        """Ranks in the team."""
        return int(self._comm.Get_size())

    def Bcast(self, buffer: Any, root: int = 0) -> None:  # noqa: N802
        """As mpi4py's."""
        self._wait(self._comm.Ibcast(buffer, root=root))

    def Reduce(self, given: Any, merged: Any, op: Any, root: int = 0) -> None:  # noqa: N802
        """As mpi4py's; an operation of our own can't be given up, since MPI would call it after it is gone."""
        request = self._comm.Ireduce(given, merged, op=op, root=root)
        try:
            self._wait(request)
        except BaseException as error:
            if op in self._predefined:
                raise
            raise Stuck(f"a merge was cut off: {error}") from error

    def Allreduce(self, given: Any, merged: Any, op: Any) -> None:  # noqa: N802
        """As mpi4py's."""
        self._wait(self._comm.Iallreduce(given, merged, op=op))

    def Allgather(self, given: Any, joined: Any) -> None:  # noqa: N802
        """As mpi4py's."""
        self._wait(self._comm.Iallgather(given, joined))

    def Gatherv(self, given: Any, joined: Any, root: int = 0) -> None:  # noqa: N802
        """As mpi4py's."""
        self._wait(self._comm.Igatherv(given, joined, root=root))

    def Split_type(self, kind: Any) -> _Node:  # noqa: N802, ARG002
        """The ranks of this node; they were counted when the team was made."""
        return _Node(self._on_node)

    def Abort(self, code: int) -> None:  # noqa: N802
        """End every rank of the pool."""
        self._comm.Abort(code)

    def _wait(self, request: Any) -> None:
        until = time.monotonic() + SPIN_S
        try:
            while not request.Test():
                self.look()
                if time.monotonic() > until:
                    time.sleep(NAP_S)
        except BaseException:
            self._left.append(request)  # MPI may still write into its buffers: they live as long as the team
            raise


class _Node:
    def __init__(self, size: int) -> None:
        self._size = size

    def Get_size(self) -> int:  # noqa: N802
        """Ranks on it."""
        return self._size

    def Free(self) -> None:  # noqa: N802
        """Nothing is held."""
