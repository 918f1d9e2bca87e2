"""Pools as jobs of a real Slurm: started once, found again, ended for real, and what happens to jobs without them."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import cluster
from benchmarks.cluster import Cluster
from emflow.errors import SubmitError, Unavailable
from emflow.records import EndCause, Resources, SchedulerPhase
from emflow.schedulers.pool_jobs import pool_of
from emflow.schedulers.pool_look import read_pool
from emflow.schedulers.pool_report import report
from emflow.schedulers.pool_setup import relay_of, spec_of
from emflow.schedulers.pool_signs import PREFIX
from mpi_kernels import jsonfile
from mpi_kernels.pool.records import POOL_FILE

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_mpi]


@pytest.fixture
def on_slurm(shared: Cluster, make_yard: Callable[..., Any]) -> Callable[..., Any]:
    """Make yards whose pools are jobs of the run's cluster."""
    assert shared.daemons
    return lambda **pool: make_yard("slurm", **pool)


def jobs(where: Cluster, name: str) -> list[str]:
    """Ids of the jobs with a pool's name that have not ended."""
    return where.run("squeue", "-h", f"--name={PREFIX}{name}", "-o", "%i").split()


def ranks_of(job: str) -> list[int]:
    """Processes of a job's ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            ours = f"SLURM_JOB_ID={job}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if ours and b"mpi_kernels.pool" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def stop_ranks(job: str) -> list[int]:
    """Hang the ranks of a job: Slurm goes on saying that it runs."""
    pids = [pid for pid in ranks_of(job) if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]
    assert len(pids) >= 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def test_a_pool_over_two_nodes_takes_jobs(shared: Cluster, on_slurm: Callable[..., Any]) -> None:
    yard = on_slurm()
    yard.config = msgspec.structs.replace(yard.config, slurm=msgspec.structs.replace(yard.config.slurm, nodes=2))
    yard.new_service()
    (pool,) = yard.up()
    (job,) = jobs(shared, pool)
    assert yard.folder.launched(pool).scheduler_id == job
    assert shared.run("squeue", "-h", "-j", job, "-o", "%D").split() == ["2"]
    names = [yard.submit(number) for number in (1, 2, 3)]
    yard.all_ended()
    assert all(yard.has_result(name) and pool_of(yard.ids[name]) == pool for name in names)


def test_without_a_pool_jobs_go_to_slurm_and_say_so(on_slurm: Callable[..., Any]) -> None:
    yard = on_slurm()
    yard.folder.hold(True)
    name = yard.submit(1)
    assert yard.ids[name].startswith("slurm:")
    assert yard.scheduler.find(name, yard.run_folder(name)) == [yard.ids[name]]
    said = yard.all_ended()[name]
    assert said.scheduler_id == yard.ids[name]
    assert said.reason.endswith("no pool takes tasks: a Slurm job of its own instead")
    assert yard.has_result(name)


def test_a_pool_that_somebody_cancels_gives_back_what_it_had_not_begun(
    shared: Cluster, on_slurm: Callable[..., Any]
) -> None:
    yard = on_slurm()
    (pool,) = yard.up()
    running = yard.submit(1, waits=True)
    yard.runs(running)
    queued = [yard.submit(2), yard.submit(3)]
    shared.run("scancel", *jobs(shared, pool))
    said = yard.all_ended()
    assert said[running].phase is SchedulerPhase.ENDED
    assert all(yard.has_result(name) for name in queued)
    assert not yard.has_result(running)
    assert {yard.claims(name) for name in yard.ids} == {1}
    yard.until(lambda: yard.folder.closed(pool), "not closed")
    assert yard.folder.closed(pool).seconds > 0
    assert yard.folder.closed(pool).nodes == 1


def test_a_pool_that_ended_while_no_service_looked_is_not_shown_as_there(
    shared: Cluster, on_slurm: Callable[..., Any]
) -> None:
    yard = on_slurm()
    (pool,) = yard.up()
    ids = jobs(shared, pool)
    shared.run("scancel", "--signal=KILL", "--full", *ids)
    end = time.monotonic() + 40.0
    while jobs(shared, pool):
        assert time.monotonic() < end
        time.sleep(0.1)
    (yard.folder.of(pool) / "ended.json").unlink(missing_ok=True)  # as if its node had died
    long_ago = time.time() - 60.0
    os.utime(yard.folder.of(pool) / "heartbeat", (long_ago, long_ago))
    found = report(yard.config)
    assert found.pools == ()
    assert found.last
    assert yard.folder.closed(pool) is None, "looking does nothing"


@pytest.mark.slow
def test_a_pool_that_hangs_is_ended_before_its_jobs_are_given_back(
    shared: Cluster, on_slurm: Callable[..., Any]
) -> None:
    yard = on_slurm()
    (pool,) = yard.up()
    yard.new_service(stale_s=6.0)
    queued = [yard.submit(1, waits=True), yard.submit(2)]
    yard.runs(queued[0])
    (job,) = jobs(shared, pool)
    hung = stop_ranks(job)

    def given_back() -> bool:
        yard.poll()
        there = yard.sent(queued[1]).to == yard.ids[queued[1]]
        last = read_pool(yard.folder.of(pool)).ended  # scancel wakes the ranks: then they say it themselves
        let_go = not jobs(shared, pool) or (last is not None and queued[1] in last.left)
        assert there or let_go, "given back while the pool could still run it"
        return not there

    yard.until(given_back, "not given back")
    yard.all_ended()
    yard.until(lambda: yard.folder.closed(pool), "not closed")
    assert not [pid for pid in hung if pid in ranks_of(job)]
    assert yard.has_result(queued[1])
    assert {yard.claims(name) for name in yard.ids} == {1}
    assert yard.folder.closed(pool).reason.startswith("no sign of life for")
    assert yard.folder.closed(pool).cause is EndCause.FAILED


@pytest.mark.slow
def test_an_allocation_whose_pool_is_silent_takes_jobs_as_steps(shared: Cluster, on_slurm: Callable[..., Any]) -> None:
    yard = on_slurm()
    (pool,) = yard.up()
    yard.new_service(stale_s=120.0)
    yard.until(yard.taking, "the pool is not known")
    (job,) = jobs(shared, pool)
    hung = stop_ranks(job)
    yard.until(lambda: not yard.taking() and yard.allocations() == [job], "not seen to be silent")
    name = yard.submit(1)
    assert yard.ids[name].startswith("step:")
    assert yard.scheduler.find(name, yard.run_folder(name)) == [yard.ids[name]]
    said = yard.all_ended()[name]
    assert said.reason.endswith("no pool takes tasks: a step in a pool's allocation instead")
    assert yard.has_result(name)
    for pid in hung:
        os.kill(pid, signal.SIGCONT)
    yard.until(lambda: pool in yard.taking(), "the pool does not take tasks again")
    again = yard.submit(2)
    yard.all_ended()
    assert pool_of(yard.ids[again]) is not None


def test_a_pool_whose_start_got_no_answer_is_found_by_its_name(shared: Cluster, on_slurm: Callable[..., Any]) -> None:
    """The service was killed between sbatch and the record of its answer."""
    yard = on_slurm()
    relay = relay_of(yard.config, yard.folder)
    relay.start()
    (pool,) = yard.folder.names()
    (job,) = jobs(shared, pool)
    (yard.folder.of(pool) / "launched.json").unlink()
    assert yard.up() == [pool]
    assert yard.folder.launched(pool).scheduler_id == job
    assert yard.folder.names() == [pool], "another one was started beside it"


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_pool_that_slurm_takes_while_it_says_no_is_not_started_twice(
    tmp_path: Path, make_yard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurmctld hangs: sbatch fails, and the job that lay in its queue runs afterwards."""
    with cluster.running(tmp_path / "own", extra="MessageTimeout=3") as own:
        for key, value in own.environment.items():
            monkeypatch.setenv(key, value)
        yard = make_yard("slurm")
        relay = relay_of(yard.config, yard.folder)
        own.signal("slurmctld", signal.SIGSTOP)
        try:
            with pytest.raises((SubmitError, Unavailable)):
                relay.start()
        finally:
            own.signal("slurmctld", signal.SIGCONT)
        try:
            (first,) = yard.folder.names()
            assert yard.folder.launched(first) is None
            up = yard.until(yard.taking, "no pool up", seconds=90.0)
            # on a machine that is very busy sbatch may give up before slurmctld has the job
            assert up == [first] or yard.folder.closed(first) is not None
            alive = own.run("squeue", "-h", "-o", "%j").split()
            assert alive == [f"{PREFIX}{name}" for name in up]
        finally:
            yard.close()


def test_a_pool_that_was_written_down_and_not_sent_is_not_waited_for_for_ever(
    shared: Cluster, on_slurm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emflow.schedulers.pool_relay.LOST_S", 2.0)
    yard = on_slurm()
    name = yard.folder.new_name()
    jsonfile.publish(
        yard.folder.of(name) / POOL_FILE, jsonfile.encode(dataclasses.replace(spec_of(yard.config), name=name))
    )
    yard.until(lambda: yard.folder.closed(name), "not closed")
    assert not jobs(shared, name)
    assert yard.folder.closed(name).young


def test_what_slurm_will_never_take_is_told(on_slurm: Callable[..., Any]) -> None:
    yard = on_slurm(walltime_s=7 * 86400)
    yard.until(lambda: "no pool can be started" in yard.scheduler.trouble, "nobody says so")
    assert "time limit" in yard.scheduler.trouble.lower()
    name = yard.submit(1)
    assert yard.ids[name].startswith("slurm:")
    assert "time limit" in yard.sent(name).why.lower()
    yard.all_ended()
    assert yard.has_result(name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_relay_with_short_walltimes_leaves_no_gap(on_slurm: Callable[..., Any]) -> None:
    """Pools of 60 s relieve each other for two and a half minutes: each job goes to a pool."""
    yard = on_slurm(walltime_s=60, relay_s=25.0)
    yard.up()
    end, number, took = time.monotonic() + 150.0, 0, []
    while time.monotonic() < end:
        number += 1
        begin = time.monotonic()
        name, folder = yard.job(number)
        yard.ids = {name: yard.scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=60))}
        yard.until(lambda name=name: yard.status(name).phase is SchedulerPhase.ENDED, f"{name} does not end")
        took.append(time.monotonic() - begin)
        assert pool_of(yard.sent(name).to) is not None, yard.sent(name)
        assert yard.has_result(name)
        pause = begin + 1.6
        yard.until(lambda pause=pause: time.monotonic() > pause, "the clock stands still")
    print(f"{number} jobs, median {sorted(took)[number // 2]:.3f} s, slowest {max(took):.3f} s")
    assert len(yard.folder.names()) >= 3
