"""The ranks of a job: mpi4py under a launcher, one process without; arrays and JSON as buffers, never pickles.

``mpi4py`` is imported, and so MPI initialised, only where a launcher has left its marks in the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mpi_kernels.errors import LaunchError

Merge = Literal["sum", "max", "min"]

LAUNCHER_MARKS = ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE")
"""Set by hydra, Slurm's pmi2 and pmix, and Open MPI's mpirun in every rank."""


class Ranks:
    """A world of ranks; ``Ranks()`` is one process without MPI.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        The communicator; None for one process.
    """

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()

    def share(self, frames: int, align: int = 1) -> tuple[int, int]:
        """Bounds ``(start, stop)`` of this rank's contiguous frames, on multiples of ``align``."""
        chunks = -(-frames // align)
        start, stop = (align * (chunks * r // self.size) for r in (self.rank, self.rank + 1))
        return min(start, frames), min(stop, frames)

    def share_of(self, start: int, stop: int, align: int = 1) -> tuple[int, int]:
        """The same of frames ``start:stop``; ``start`` is a multiple of ``align``."""
        first, last = self.share(stop - start, align)
        return start + first, start + last

    def broadcast(self, data: bytes | None) -> bytes:
        """Bytes of rank 0, on every rank."""
        if self._comm is None:
            assert data is not None
            return data
        length = np.array([0 if data is None else len(data)], np.int64)
        self._comm.Bcast(length, root=0)
        buffer = np.frombuffer(data, np.uint8).copy() if data is not None else np.empty(int(length[0]), np.uint8)
        self._comm.Bcast(buffer, root=0)
        return buffer.tobytes()

    def reduce(self, array: np.ndarray, how: Merge) -> np.ndarray | None:
        """Merge arrays of one shape and dtype on rank 0 (None elsewhere); integers wrap, so the caller bounds them.

        Notes
        -----
        A NaN on any rank wins over numbers in ``max`` and ``min`` as it does in numpy; MPI leaves that open, so NaN
        are merged on their own.
        """
        if self._comm is None:
            return array
        if array.dtype in (np.dtype(np.float16), np.dtype(np.bool_)):  # MPI has no such numbers
            wide = self.reduce(array.astype(np.float32), how)
            return None if wide is None else wide.astype(array.dtype)
        if how == "sum" or array.dtype.kind != "f":
            return self._reduced(np.ascontiguousarray(array), how)
        nan = self._reduced(np.isnan(array).astype(np.uint8), "max")
        merged = self._reduced(np.where(np.isnan(array), -np.inf if how == "max" else np.inf, array), how)
        if merged is not None:
            assert nan is not None
            merged[nan.astype(bool)] = np.nan
        return merged

    def reduce_pairs(self, pairs: np.ndarray) -> np.ndarray | None:
        """Sum of (2, ...) float64 ``[high, low]`` numbers of twice the precision on rank 0 (None elsewhere).

        Rounding to float64 at the very end hides in what order the ranks were added.
        """
        if self._comm is None:
            return pairs
        from mpi4py import MPI

        def add(given: Any, kept: Any, _: Any) -> None:
            a, b = (np.frombuffer(buffer, np.float64).reshape(2, -1) for buffer in (given, kept))
            b[...] = add_pairs(a, b)

        operation = MPI.Op.Create(add, commute=True)
        whole = MPI.DOUBLE.Create_contiguous(pairs.size).Commit()  # one element: MPI may cut a buffer between elements
        try:
            sent = np.ascontiguousarray(pairs)
            merged = np.empty_like(sent) if not self.rank else None
            self._comm.Reduce([sent, 1, whole], None if merged is None else [merged, 1, whole], op=operation, root=0)
            return merged
        finally:
            whole.Free()
            operation.Free()

    def all(self, flag: bool) -> bool:
        """Whether it is so on every rank."""
        if self._comm is None:
            return flag
        from mpi4py import MPI

        found = np.array([flag], np.int8)
        self._comm.Allreduce(MPI.IN_PLACE, found, op=MPI.MIN)
        return bool(found[0])

    def on_node(self) -> int:
        """Ranks of the node that this one runs on."""
        if self._comm is None:
            return 1
        from mpi4py import MPI

        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        try:
            return int(node.Get_size())
        finally:
            node.Free()

    def _reduced(self, array: np.ndarray, how: Merge) -> np.ndarray | None:
        from mpi4py import MPI

        operation = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}[how]
        if self.rank:
            self._comm.Reduce(array, None, op=operation, root=0)
            return None
        merged = array.copy()
        self._comm.Reduce(MPI.IN_PLACE, merged, op=operation, root=0)
        return merged

    def gather_rows(self, rows: np.ndarray) -> np.ndarray | None:
        """Shares in rank order, joined along the first axis on rank 0 (None elsewhere); any dtype.

        The counts are in rows, not bytes: MPI-3 counts are 32-bit.
        """
        if self._comm is None:
            return rows
        counts = np.empty(self.size, np.int64)
        self._comm.Allgather(np.array([len(rows)], np.int64), counts)
        width = int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.dtype.itemsize
        from mpi4py import MPI

        row = MPI.BYTE.Create_contiguous(width).Commit()
        try:
            sent = [np.ascontiguousarray(rows), len(rows), row]
            if self.rank:
                self._comm.Gatherv(sent, None, root=0)
                return None
            joined = np.empty((int(counts.sum()), *rows.shape[1:]), rows.dtype)
            starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
            self._comm.Gatherv(sent, [joined, (counts.tolist(), starts.tolist()), row], root=0)
            return joined
        finally:
            row.Free()

    def gather_json(self, value: Any) -> list[Any] | None:
        """Small values that JSON knows, in rank order on rank 0 (None elsewhere)."""
        if self._comm is None:
            return [value]
        text = json.dumps(value).encode("ascii") + b"\n"
        joined = self.gather_rows(np.frombuffer(text, np.uint8))
        return None if joined is None else [json.loads(line) for line in joined.tobytes().splitlines()]

    def look(self) -> None:
        """Raise if another rank has failed, where the communicator can know it: that of a pool (`pool.team`) does."""
        look = getattr(self._comm, "look", None)
        if look is not None:
            look()

    def abort(self, code: int) -> None:
        """End every rank at once; returns only where there is no MPI."""
        if self._comm is not None:
            self._comm.Abort(code)


def add_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two (2, n) arrays of ``[high, low]`` pairs.  Source: Dekker 1971, doi:10.1007/BF01397083, add2."""
    with np.errstate(invalid="ignore", over="ignore"):
        high = a[0] + b[0]
        part = high - a[0]
        low = (a[0] - (high - part)) + (b[0] - part) + a[1] + b[1]
        low[~np.isfinite(high)] = 0.0
        total = high + low
        return np.stack((total, low - (total - high)))


def world(environment: Mapping[str, str] = os.environ) -> Ranks:
    """All ranks that the launcher has started; one process where there is no launcher.

    Raises
    ------
    LaunchError
        There is a launcher but no mpi4py, or the world has another size than the launcher was asked for.
    """
    if not launched(environment):
        ranks = Ranks()
    else:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            step = "install mpi4py with the MPI that this launcher belongs to"
            raise LaunchError(f"ranks were started, but MPI can't be loaded: {error}", next_step=step) from error
        ranks = Ranks(MPI.COMM_WORLD)
    for name, wanted in asked(environment).items():
        check_size(ranks, wanted, name)
    return ranks


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several ranks, or as one rank under MPI."""
    tasks = environment.get("SLURM_NTASKS", "")
    return any(mark in environment for mark in LAUNCHER_MARKS) or (
        "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and tasks.isdecimal() and int(tasks) > 1
    )


def asked(environment: Mapping[str, str]) -> dict[str, int]:
    """How many ranks the job script and Slurm's step say there are, by variable."""
    names = ["EMFLOW_RANKS"]
    if "SLURM_STEP_ID" in environment:
        names.append("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    return {n: int(environment[n]) for n in names if environment.get(n, "").isdecimal()}


def check_size(ranks: Ranks, wanted: int, who: str) -> None:
    """Raise `LaunchError` if the world does not have the ranks that were asked for.

    A wrong ``srun --mpi`` starts N worlds of one rank that each do all the work and exit 0; nothing else tells.
    """
    if ranks.size != wanted:
        raise LaunchError(
            f"{who} asks for {wanted} ranks, but this MPI world has {ranks.size}",
            next_step=f"start it with `mpiexec -n {wanted}`, or correct srun's --mpi: the wrong PMI starts singletons",
        )
