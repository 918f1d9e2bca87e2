"""A pool on a real cluster of two virtual nodes: pool.sbatch, a task over TCP, a dead rank, USR1."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.records import Beat, TaskEnd

if TYPE_CHECKING:
    from benchmarks.cluster import Cluster

pytestmark = [pytest.mark.needs_mpi, pytest.mark.needs_slurm]
SCRIPT = Path(__file__).resolve().parents[3] / "slurm" / "pool.sbatch"
Until = Callable[..., Any]


class SlurmPool:
    """A pool that is a job."""

    def __init__(self, slurm: Cluster, folder: Path, until: Until) -> None:
        self.slurm, self.folder, self.until = slurm, folder, until
        self.client = PoolClient(folder, reach="tcp", timeout_s=10.0)
        self.log = folder / "pool.out"
        flags = ["--ntasks=2", "--nodes=2", "--ntasks-per-node=1", "--time=5", f"--output={self.log}"]
        exported = f"PATH={os.environ['PATH']},EMFLOW_PYTHON={sys.executable},PYTHONPATH={Path(__file__).parent}"
        exported += f",EMFLOW_SITE={SCRIPT.with_name('site.sh')}"
        self.id = slurm.run("sbatch", "--parsable", f"--export={exported}", *flags, str(SCRIPT), str(folder)).strip()
        self.ends: list[TaskEnd] = []

    def ready(self, life: int = 1) -> Any:
        def there() -> Any:
            found = self.client.endpoint()
            return found if found is not None and found.life >= life else None

        return self.until(there, "the pool does not start", 40.0)

    def end_of(self, job: str) -> TaskEnd:
        def said() -> TaskEnd | None:
            self.ends += self.client.ended()
            return next((end for end in self.ends if end.job == job), None)

        found: TaskEnd = self.until(said, f"{job} does not end")
        return found

    def state(self) -> str:
        return self.slurm.run("squeue", "-h", "-t", "all", "-j", self.id, "-o", "%T").strip()


@contextmanager
def pool(slurm: Cluster, yard: Any, until: Until) -> Iterator[SlurmPool]:
    found = SlurmPool(slurm, yard.instance(gateway="elsewhere", walltime_s=300.0), until)
    try:
        yield found
    finally:
        found.client.close()
        slurm.run("scancel", found.id)
        until(lambda: found.state() not in ("RUNNING", "COMPLETING"), "it does not end")


def test_two_nodes(slurm: Cluster, yard: Any, kernels: SimpleNamespace, mpiexec: str, until: Until) -> None:
    cold = yard.task()
    assert kernels.launch(mpiexec, 2, "-m", "mpi4py", "-m", "mpi_kernels", yard.folder(cold)).returncode == 0
    with pool(slurm, yard, until) as warm:
        endpoint = warm.ready()
        assert endpoint.scheduler_id == warm.id
        assert endpoint.ranks == len(endpoint.nodes) == 2
        assert 200e9 < endpoint.stops_ns - endpoint.wall_ns < 301e9
        task, bad, slow = yard.task(), yard.faulty("raise", 33), yard.faulty("slow", frames=80)
        for one in (task, bad, slow):
            warm.client.send(one.job, one.folder)
        assert warm.end_of(task.job).how == "result"
        assert warm.end_of(bad.job).how == "error"
        assert yard.maps(task) == yard.maps(cold)
        until(lambda: yard.has(slow, "claim"), "it does not begin")
        slurm.run("scancel", "--signal=USR1", warm.id)
        until(warm.client.last, "it does not drain")
        last = warm.client.last()
        assert last is not None
        assert (last.why, last.left, last.done) == ("drained", (), 3)
        assert yard.has(slow)
        until(lambda: warm.state() == "COMPLETED", "the job does not end")


def test_a_rank_dies_and_the_allocation_goes_on(slurm: Cluster, yard: Any, until: Until) -> None:
    with pool(slurm, yard, until) as warm:
        first = warm.ready()
        slow, waiting = yard.faulty("slow", frames=4000), yard.task()
        warm.client.send(slow.job, slow.folder)
        warm.client.send(waiting.job, waiting.folder)
        until(lambda: yard.has(slow, "heartbeat"), "it does not begin")
        beat = warm.client.beat()
        assert isinstance(beat, Beat)
        assert (beat.job, beat.queued) == (slow.job, 1)
        os.kill(first.pid, signal.SIGKILL)
        second = warm.ready(life=2)
        assert (second.scheduler_id, second.pid == first.pid) == (warm.id, False)
        until(lambda: yard.has(waiting), "what waited is not done")
        assert not yard.has(slow)
        assert not warm.client.holds(slow.job)
        warm.client.drain()
        until(lambda: warm.state() == "COMPLETED", "the job does not end")
