"""How jobs end on a real cluster, and what is left of them."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cluster import Cluster
from emflow.errors import Unavailable
from emflow.records import EndCause, Resources, SchedulerPhase
from mpi_kernels import jsonfile
from mpi_kernels.contract import RESULT_FILE, ReductionSpec, ResultManifest

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_mpi, pytest.mark.timeout(300)]
ONE = Resources(ranks=1, time_limit_s=300)
TWO_NODES = "[slurm]\nnodes = 2\n"
TWO_PARTITIONS = """\
PartitionName=bulk Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 State=UP
PartitionName=live Nodes=ALL MaxTime=60 PriorityTier=10 State=UP"""


def test_job_on_two_nodes_and_what_is_said_of_it(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path, ranks=2)
    scheduler = jobs.make_scheduler(tmp_path, TWO_NODES)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=300))
    said = jobs.until_ended(scheduler, name, scheduler_id)
    assert (said.phase, said.cause, said.nodes) == (SchedulerPhase.ENDED, EndCause.COMPLETED, 2)
    assert said.elapsed_s >= 0
    assert said.node in shared.nodes
    assert jsonfile.read(ResultManifest, folder / RESULT_FILE).ranks == 2
    assert (folder / "job.out").exists()


def test_cancel_leaves_no_process(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path, ranks=2, waits=True)
    scheduler = jobs.make_scheduler(tmp_path, TWO_NODES)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=300))
    jobs.until_claimed(folder)
    said = jobs.status(scheduler, name, scheduler_id)
    assert (said.phase, said.nodes) == (SchedulerPhase.RUNNING, 2)
    assert len(jobs.processes_of(folder)) >= 3  # srun and two ranks
    scheduler.cancel(scheduler_id)
    assert jobs.processes_of(folder) == []
    said = jobs.status(scheduler, name, scheduler_id)
    assert (said.phase, said.cause) == (SchedulerPhase.ENDED, EndCause.CANCELLED)
    assert not (folder / RESULT_FILE).exists()


def test_cancel_ends_ranks_whose_srun_was_killed(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path, ranks=2, waits=True)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=300))
    jobs.until_claimed(folder)
    clients = [pid for pid in jobs.processes_of(folder) if b"srun" in Path(f"/proc/{pid}/cmdline").read_bytes()[:20]]
    assert clients
    for pid in clients:
        os.kill(pid, signal.SIGKILL)
    scheduler.cancel(scheduler_id)
    assert jobs.processes_of(folder) == []
    assert jobs.status(scheduler, name, scheduler_id).phase is SchedulerPhase.ENDED


def test_cancel_of_a_job_whose_node_is_away_holds_the_service_up_once(
    own: Cluster, jobs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emflow.schedulers.slurm.CANCEL_S", 3.0)
    name, folder = jobs.plan(tmp_path, waits=True)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_claimed(folder)
    nodes = [daemon for daemon in own.daemons if daemon != "slurmctld"]
    for node in nodes:
        own.signal(node, signal.SIGSTOP)
    for most_s in (60.0, 2.9):
        began = time.monotonic()
        with pytest.raises(Unavailable, match="still processes of"):
            scheduler.cancel(scheduler_id)
        assert time.monotonic() - began < most_s
    for node in nodes:
        own.signal(node, signal.SIGCONT)
    jobs.eventually(lambda: jobs.status(scheduler, name, scheduler_id).phase is SchedulerPhase.ENDED)
    scheduler.cancel(scheduler_id)


def test_cancel_of_a_job_that_waits(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path, '[slurm]\nflags = ["--begin=now+1hour"]\n')
    scheduler_id = scheduler.submit(name, folder, ONE)
    assert jobs.status(scheduler, name, scheduler_id).phase is SchedulerPhase.PENDING
    scheduler.cancel(scheduler_id)
    said = jobs.status(scheduler, name, scheduler_id)
    assert (said.phase, said.cause, said.nodes) == (SchedulerPhase.ENDED, EndCause.CANCELLED, 0)


def test_cancel_leaves_jobs_of_others_alone(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    """An id that belongs to no job of ours: it was forgotten, and given away."""
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/bash\nsleep 60\n")
    other = shared.run("sbatch", "--parsable", "--job-name=theirs", "-o", "/dev/null", str(script)).strip()
    jobs.make_scheduler(tmp_path).cancel(other)
    assert shared.run("squeue", "-h", "-t", "all", "-j", other, "-o", "%T").strip() in ("PENDING", "RUNNING")
    shared.run("scancel", other)


@pytest.mark.slow
def test_job_goes_on_while_slurmctld_is_restarted(own: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path, waits=True)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_claimed(folder)
    own.signal("slurmctld", signal.SIGKILL)
    with pytest.raises(Unavailable):
        jobs.make_scheduler(tmp_path).poll({name: scheduler_id})
    own.start_daemon("slurmctld")
    restarted = jobs.make_scheduler(tmp_path)
    jobs.eventually(lambda: jobs.status(restarted, name, scheduler_id).phase is SchedulerPhase.RUNNING)
    assert restarted.find(name, folder) == [scheduler_id]
    restarted.cancel(scheduler_id)


def test_controller_that_hangs_takes_half_of_the_time_at_most(
    hanging: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    hanging.signal("slurmctld", signal.SIGSTOP)
    with pytest.raises(Unavailable, match="squeue"):
        scheduler.poll({name: scheduler_id})
    with pytest.raises(Unavailable, match="asked again in some seconds"):
        scheduler.poll({name: scheduler_id})
    hanging.signal("slurmctld", signal.SIGCONT)
    assert jobs.until_ended(scheduler, name, scheduler_id).cause is EndCause.COMPLETED


def test_job_that_slurm_forgot_is_gone_and_found_by_its_claim(
    own: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    """A controller that lost its state: the ended job is not known any more, and not failed for that."""
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_ended(scheduler, name, scheduler_id)
    own.signal("slurmctld", signal.SIGKILL)
    shutil.rmtree(own.root / "state")
    (own.root / "state").mkdir()
    own.start_daemon("slurmctld")
    own.until(lambda: "idle" in own.run("sinfo", "-h", "-o", "%T"), "the nodes are not back")
    fresh = jobs.make_scheduler(tmp_path)
    said = jobs.status(fresh, name, scheduler_id)
    assert (said.phase, said.cause) == (SchedulerPhase.GONE, EndCause.UNSAID)
    assert fresh.find(name, folder) == [scheduler_id], "its claim tells who worked there"
    assert fresh.find(f"{name[:-2]}88", folder) == []


@pytest.mark.slow
def test_job_that_ended_long_ago_is_gone(
    make_cluster: Callable[..., Cluster], jobs: SimpleNamespace, tmp_path: Path
) -> None:
    """MinJobAge; slurmctld looks for what it may forget once a minute."""
    make_cluster(min_job_age_s=2)
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_ended(scheduler, name, scheduler_id)
    jobs.eventually(lambda: jobs.status(scheduler, name, scheduler_id).phase is SchedulerPhase.GONE, 200.0)
    assert scheduler.find(name, folder) == [scheduler_id]
    told = {finding.part: finding for finding in scheduler.check()}["Slurm accounting"]
    assert told.ok
    assert "2 s after its end" in told.found
    assert "MinJobAge" in told.found


@pytest.mark.slow
def test_node_that_dies(own: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    """slurmd, slurmstepd and the ranks of a node are killed at once, as a power cut does."""
    name, folder = jobs.plan(tmp_path, waits=True)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_claimed(folder)
    node = jobs.status(scheduler, name, scheduler_id).node
    own.signal(node, signal.SIGKILL)
    for pid in [*steps_of(own, scheduler_id), *jobs.processes_of(folder)]:
        os.kill(pid, signal.SIGKILL)
    said = jobs.until_ended(scheduler, name, scheduler_id, 200.0)
    assert (said.phase, said.cause) == (SchedulerPhase.ENDED, EndCause.NODE_FAIL)
    assert "NODE_FAIL" in said.reason


def steps_of(cluster: Cluster, scheduler_id: str) -> list[int]:
    """The slurmstepd of a job; each is known by its title, as in ``slurmstepd: [17.batch]``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"slurmstepd: [{scheduler_id}.".encode() in (entry / "cmdline").read_bytes():
                environ = (entry / "environ").read_bytes()
                found += [int(entry.name)] * (str(cluster.root).encode() in environ)
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_time_limit(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    """Slurm counts in minutes, and ends a job up to half a minute late."""
    (tmp_path / "setup.sh").write_text(f"export PYTHONPATH={Path(__file__).parent}\n")
    parameters = {"marker": str(tmp_path / "first")}
    endless = ReductionSpec(use="waits_once:WaitsOnce", name="w", parameters=parameters)
    name, folder = jobs.plan(tmp_path, reduction=endless)
    scheduler = jobs.make_scheduler(tmp_path, '[slurm]\nsetup = "setup.sh"\n')
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    said = jobs.until_ended(scheduler, name, scheduler_id, 200.0)
    assert (said.phase, said.cause) == (SchedulerPhase.ENDED, EndCause.TIMEOUT)
    assert said.elapsed_s >= 60
    assert jobs.processes_of(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["CANCEL", "REQUEUE"])
def test_preempted_job_has_ended_and_is_not_put_back(
    mode: str, make_cluster: Callable[..., Cluster], jobs: SimpleNamespace, tmp_path: Path
) -> None:
    """A live partition takes the nodes of a bulk one; --no-requeue holds also where the site requeues."""
    preemption = f"PreemptType=preempt/partition_prio\nPreemptMode={mode}"
    own = make_cluster(partitions=TWO_PARTITIONS, extra=preemption)
    (tmp_path / "live").mkdir()
    name, folder = jobs.plan(tmp_path, ranks=2, waits=True)
    bulk = jobs.make_scheduler(tmp_path, '[slurm]\npartition = "bulk"\nflags = ["--exclusive"]\nnodes = 2\n')
    scheduler_id = bulk.submit(name, folder, Resources(ranks=2, time_limit_s=300))
    jobs.until_claimed(folder)
    other, second = jobs.plan(tmp_path / "live", ranks=1)
    live = jobs.make_scheduler(tmp_path / "live", '[slurm]\npartition = "live"\n')
    live_id = live.submit(other, second, ONE)
    said = jobs.until_ended(bulk, name, scheduler_id)
    assert (said.phase, said.cause) == (SchedulerPhase.ENDED, EndCause.PREEMPTED)
    jobs.until_ended(live, other, live_id)
    assert (second / RESULT_FILE).exists()
    assert own.run("squeue", "-h", "-t", "pending,running,suspended").strip() == ""
