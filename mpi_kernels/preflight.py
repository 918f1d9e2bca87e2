"""What a job looks at before it reads: whatever would make it fail late, or wrong, fails in the first moment.

That the world has the ranks that were asked for is seen even earlier (`mpi_kernels.ranks.world`).  What a rank finds is
judged by rank 0, and every rank raises the verdict, so that none waits for another one.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_kernels.agreement import known_to_all
from mpi_kernels.contract import CLAIM_FILE, JobSpec
from mpi_kernels.device import choose
from mpi_kernels.errors import KernelError, printable
from mpi_kernels.events import host_name
from mpi_kernels.plan import Plan, output_shape
from mpi_kernels.protocols import Source
from mpi_kernels.ranks import Ranks
from mpi_kernels.sparse import SparseSource

if TYPE_CHECKING:
    from mpi_kernels.selftest import Way

VISIBLE_S = 3.0
"""How long a node may take to see a file that another has just made.  An NFS client that has looked a name up before
believes for up to 30 s (acdirmin, nfs(5)) that it is not there; a run folder is new, so nobody has."""

LOOK_S = 0.02
"""Between two looks."""

MAX_SKEW_S = 1.0
"""Clocks of nodes further apart than this are told: heartbeats and events of two hosts are compared by their times."""


class Preflight(KernelError):
    """A node can't do its part of the job as it is set up."""

    code = "preflight"
    retryable = True


class Golden(KernelError):
    """A node computes wrong numbers from known frames."""

    code = "golden"


class NoRoom(KernelError):
    """The run folder's file system can't hold the result."""

    code = "no-space"
    retryable = True


@dataclass(slots=True)
class Looked:
    """What was looked at, and what was found that does not stop the job.

    Attributes
    ----------
    checked : list of str
        ``ranks``, ``folder``, ``clock``, ``card``, ``space``, ``golden``.
    warnings : list of str
        In plain words.
    golden : str
        Which way the known frames went; empty if they were not reduced.
    seconds : float
        Wall time on rank 0.
    """

    checked: list[str] = field(default_factory=lambda: ["ranks"])
    warnings: list[str] = field(default_factory=list)
    golden: str = ""
    seconds: float = 0.0


def node_name() -> str:
    """Name of the node, as the scheduler calls it; else of the host."""
    return os.environ.get("SLURMD_NODENAME") or host_name()


def nodes(folder: Path, job: JobSpec, claim: bytes, ranks: Ranks, *, told_ns: int) -> Looked:
    """See whether every rank's node has the run folder, the time, and the card; every rank calls it.

    Parameters
    ----------
    claim : bytes
        What rank 0 has just written: it is in no other folder, whatever its path is called.
    told_ns : int
        Wall time at which rank 0 began to say so, and the others knew.

    Raises
    ------
    Preflight
        On all ranks: a node does not see the run folder under its path, or sees another one there.
    """
    looked = Looked()
    facts: dict[str, Any] = {"node": node_name(), "told_ns": told_ns}
    facts["folder"] = _seen(folder / CLAIM_FILE, claim) if ranks.rank else ""
    if job.method.device == "gpu":  # the CPU computes the same: a missing card is told, never an error
        facts["card"] = "" if (card := choose()).index is not None else card.why
    told = ranks.gather_json(facts)
    wrong = "" if told is None else _judged(told, time.time_ns(), looked)
    verdict = json.loads(ranks.broadcast(json.dumps(wrong).encode("ascii") if not ranks.rank else None))
    if verdict:
        step = "mount the file system of the run folders under the same path on every node, or keep jobs off that node"
        raise known_to_all(Preflight(verdict, path=folder, next_step=step))
    return looked


def _judged(told: list[dict[str, Any]], now_ns: int, looked: Looked) -> str:
    """What is wrong, empty if nothing is; rank 0 adds what was looked at."""
    first = told[0]
    if len(told) > 1:
        looked.checked += ["folder", "clock"]
    if "card" in first:
        looked.checked.append("card")
    warnings: dict[str, None] = {}  # in order, each once
    for rank, facts in enumerate(told):
        # the answer was given between these two moments of rank 0's clock, whatever the messages took
        behind_s, ahead_s = (first["told_ns"] - facts["told_ns"]) / 1e9, (facts["told_ns"] - now_ns) / 1e9
        if max(behind_s, ahead_s) > MAX_SKEW_S:
            how = f"{behind_s:.1f} s behind" if behind_s > 0 else f"{ahead_s:.1f} s ahead of"
            warnings[f"the clock of {facts['node']} is at least {how} that of {first['node']}"] = None
        if facts.get("card"):
            warnings[f"rank {rank} on {facts['node']} computes on the CPU: {facts['card']}"] = None
    looked.warnings += warnings
    blind = [(rank, facts) for rank, facts in enumerate(told) if facts["folder"]]
    return "; ".join(f"rank {rank} on node {facts['node']} {facts['folder']}" for rank, facts in blind[:3])


def _seen(path: Path, content: bytes) -> str:
    """What is wrong with a file that should hold this; empty if nothing is."""
    until = time.monotonic() + VISIBLE_S
    while True:
        try:
            found: bytes | None = path.read_bytes()
        except OSError as error:
            found, why = None, error.strerror or str(error)
        if found == content:
            return ""
        if time.monotonic() >= until:
            break
        time.sleep(LOOK_S)
    if found is not None:
        return "sees another folder under the same path"
    return f"does not see {'the run folder' if not path.parent.is_dir() else f'{path.name} in it'}: {printable(why)}"


def room(folder: Path, plan: Plan) -> None:
    """Raise `NoRoom` where the outputs of a plan can't fit; what they take is known from their shapes.

    Quotas are not seen here; a disk that fills up later is told when the result is written.
    """
    needed = sum(
        math.prod(output_shape(o, plan.header)) * np.dtype(o.dtype).itemsize
        for step in plan.steps
        for o in step.outputs.values()
    )
    facts = os.statvfs(folder)
    if not facts.f_blocks:  # a file system that does not say
        return
    free = (facts.f_bfree if os.geteuid() == 0 else facts.f_bavail) * facts.f_frsize
    if free < needed:
        raise NoRoom(
            f"{free / 2**20:.1f} MiB are free, and the result takes at least {needed / 2**20:.1f} MiB",
            path=folder,
            next_step="make room; the next attempt starts by itself",
        )


# --- golden -----------------------------------------------------------------------------------------------------------

_DONE: set[tuple[str, int]] = set()
"""Ways that have been proven, and with how many ranks: ranks that stay warm do it once for each.  Rank 0's counts: the
others may have been left out of a job, or may not know that one was cut off."""


def golden(job: JobSpec, source: Source, plan: Plan, ranks: Ranks) -> str:
    """Reduce known frames on the very path that a job will use, and compare; every rank calls it.

    The same kernels, way of reading, kind of pixels, compression and number of threads, merged between the same ranks;
    once for each such path in the life of a process.  Only if the answer is wrong does each rank compute it alone, to
    find the node.

    Returns
    -------
    str
        The way; empty where there are no known frames of this kind of pixels.

    Raises
    ------
    Golden
        On all ranks: the answer is wrong.
    """
    data = None
    if not ranks.rank:
        plain = _way(source, plan)
        data = json.dumps([plain, (str(_from_plain(plain, job)), ranks.size) in _DONE]).encode("ascii")
    plain, known = json.loads(ranks.broadcast(data))
    way = _from_plain(plain, job)
    if way is None or known:
        return "" if way is None else str(way)
    with _known_file(way) as path:
        wrong = json.loads(ranks.broadcast(_answer(way, path, ranks)))
        if wrong:
            alone = json.loads(_answer(way, path, Ranks()) or b'""')
            _blame(wrong, ranks.gather_json([node_name(), alone]), ranks)
    _DONE.add((str(way), ranks.size))
    return str(way)


def _way(source: Source, plan: Plan) -> list[Any] | None:
    """What decides the path of a job, as rank 0 has it; None: pixels that no known frames are made of."""
    delivered, layout = np.dtype(plan.header.dtype), source.layout
    plain = layout is not None and np.dtype(layout.dtype).newbyteorder("=") == delivered  # else the format decodes
    stored = np.dtype(layout.dtype) if layout is not None and plain else delivered
    if stored.kind not in "iuf" or stored == np.float16 or stored.itemsize > 8:
        return None
    blocks = any(not step.terms for step in plan.steps)
    codec: str = layout.codec if layout is not None and plain else ""
    if isinstance(source, SparseSource) and stored.kind == "u":
        codec = "events"
    return [stored.str, blocks, codec]


def _from_plain(plain: list[Any] | None, job: JobSpec) -> Way | None:
    from mpi_kernels.selftest import Way  # only where frames are needed: most jobs of a warm rank need none

    return None if plain is None else Way(plain[0], job.method, blocks=plain[1], codec=plain[2])


@contextmanager
def _known_file(way: Way) -> Iterator[str]:
    """Path of a file that only this rank has, in memory where the system can do that."""
    from mpi_kernels.selftest import known_bytes

    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("emflow-golden")
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(known_bytes(way))
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
    else:
        with tempfile.TemporaryDirectory(prefix="emflow-golden-") as folder:
            path = Path(folder) / "frames"
            path.write_bytes(known_bytes(way))
            yield str(path)


def _answer(way: Way, path: str, ranks: Ranks) -> bytes | None:
    """What is wrong with the answer of these ranks, as JSON, on the first of them; None elsewhere."""
    from mpi_kernels import plan
    from mpi_kernels.engine import reduce
    from mpi_kernels.selftest import compare, open_known

    source = open_known(way, path)
    try:
        reduced = reduce(plan.make(way.recipe(), source.header), source, ranks, method=way.method)
    finally:
        source.close()
    if reduced is None:
        return None
    wrong = compare(way, reduced)
    used = f"kernel {reduced.method['kernel']} on the {reduced.method['device']}, reading {reduced.method['reading']}"
    return json.dumps("" if wrong is None else f"{used}, pixels {way.stored}: {wrong}").encode("ascii")


def _blame(wrong: str, told: list[Any] | None, ranks: Ranks) -> None:
    """Raise `Golden` on every rank, with the nodes that are wrong alone."""
    told = json.loads(ranks.broadcast(None if told is None else json.dumps(told).encode("ascii")))
    bad = {node: mistake for node, mistake in told if mistake}
    if bad:
        who = "; ".join(f"node {node} computes known frames wrong ({mistake})" for node, mistake in bad.items())
        step = "keep jobs off this node, and run `python -m mpi_kernels --selftest` there"
    else:
        who = f"each node is right alone, but what MPI merges of {ranks.size} ranks is wrong ({wrong})"
        step = "is it the MPI that mpi4py was built for? `srun python -m mpi_kernels --selftest` tells"
    raise known_to_all(Golden(who, next_step=step))
