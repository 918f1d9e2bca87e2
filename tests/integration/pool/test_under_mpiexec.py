"""Pools on this machine: they die, hang, are relieved and cancelled; no job is lost, and none runs twice."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from emflow.errors import ConfigError, NotAllowed
from emflow.records import EndCause, Resources, SchedulerPhase
from emflow.schedulers import processes
from emflow.schedulers.local import LocalRecord, LocalScheduler
from emflow.schedulers.pool_folder import Sent
from emflow.schedulers.pool_jobs import pool_of
from emflow.schedulers.pool_launch import hosts_of
from emflow.schedulers.pool_secret import make_secret
from emflow.schedulers.pool_sending import Sender

pytestmark = pytest.mark.needs_mpi
WAIT_S = 50.0


def leader(yard: Any, pool: str) -> processes.Process:
    """The process that a pool was started as."""
    found = processes.parse(yard.folder.launched(pool).scheduler_id)
    assert found is not None
    return found


def command(process: processes.Process) -> bytes:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return b""


def ranks_of(yard: Any, pool: str) -> list[processes.Process]:
    return [p for p in processes.family([leader(yard, pool)]) if b"mpi_kernels.pool" in command(p)]


def results(yard: Any) -> list[str]:
    return [name for name in yard.ids if yard.has_result(name)]


def test_jobs_go_to_the_pool_with_the_least_to_do(make_yard: Callable[..., Any]) -> None:
    yard = make_yard(count=2)
    both = yard.up(2)
    waiting = [yard.submit(1, waits=True), yard.submit(2, waits=True)]
    assert {pool_of(yard.ids[name]) for name in waiting} == set(both)
    yard.submit(3)
    yard.finish()
    assert {said.cause for said in yard.all_ended().values()} == {EndCause.COMPLETED}
    assert len(results(yard)) == 3


def test_a_killed_pool_loses_no_job_and_runs_none_twice(make_yard: Callable[..., Any]) -> None:
    yard = make_yard(count=2)
    yard.up(2)
    names = [yard.submit(number, waits=True) for number in (1, 2)]
    yard.runs(names[0])
    yard.runs(names[1])
    queued = [yard.submit(number) for number in (3, 4, 5, 6)]
    hurt = pool_of(yard.ids[names[0]])
    assert {pool_of(yard.ids[name]) for name in queued} == {pool_of(yard.ids[name]) for name in names}
    processes.kill([leader(yard, hurt)], 10.0)
    said = yard.until(lambda: (now := yard.poll())[names[0]].phase is SchedulerPhase.ENDED and now, "not ended")
    assert f"with pool {hurt}" in said[names[0]].reason
    yard.finish()
    yard.all_ended()
    assert results(yard) == [names[1], *queued]
    assert {yard.claims(name) for name in yard.ids} == {1}
    assert yard.folder.closed(hurt).reason.startswith("ended before its time")
    moved = [name for name in queued if pool_of(yard.ids[name]) == hurt]
    assert moved
    assert all(yard.sent(name).to != yard.ids[name] for name in moved)


def test_killed_ranks_cost_the_job_that_ran(yard: Any) -> None:
    (pool,) = yard.up()
    running = yard.submit(1, waits=True)
    yard.runs(running)
    queued = [yard.submit(2), yard.submit(3)]
    processes.send(ranks_of(yard, pool)[0], signal.SIGKILL)
    said = yard.all_ended()
    assert said[running].phase is SchedulerPhase.ENDED
    assert results(yard) == queued
    assert {yard.claims(name) for name in yard.ids} == {1}


def test_a_pool_that_hangs_is_ended_before_its_jobs_are_given_back(yard: Any) -> None:
    (pool,) = yard.up()
    yard.new_service(stale_s=3.0)
    running = yard.submit(1, waits=True)
    yard.runs(running)
    queued = yard.submit(2)
    before = processes.family([leader(yard, pool)])
    for process in before:
        os.kill(process.pid, signal.SIGSTOP)

    def given_back() -> bool:
        yard.poll()
        there = yard.sent(queued).to == yard.ids[queued]
        assert there or not any(process.alive for process in before), "given back while the pool could still run it"
        return not there

    yard.until(given_back, "not given back")
    said = yard.all_ended()
    assert results(yard) == [queued]
    assert said[running].phase is SchedulerPhase.ENDED
    assert yard.folder.closed(pool).reason.startswith("no sign of life for")
    assert {yard.claims(name) for name in yard.ids} == {1}


def test_the_next_service_finds_pools_and_jobs(yard: Any) -> None:
    (pool,) = yard.up()
    running, queued = yard.submit(1, waits=True), yard.submit(2)
    yard.runs(running)
    yard.new_service()
    for name in (running, queued):
        assert yard.scheduler.find(name, yard.run_folder(name)) == [yard.ids[name]]
    assert yard.status(running).phase is SchedulerPhase.RUNNING
    assert yard.status(queued).phase is SchedulerPhase.PENDING
    yard.until(lambda: yard.taking() == [pool], "the pool is not known")
    yard.finish()
    yard.all_ended()
    assert results(yard) == [running, queued]
    assert yard.folder.names() == [pool], "another pool was started beside it"
    for name in (running, queued):
        assert yard.scheduler.find(name, yard.run_folder(name)) == [yard.ids[name]]


def test_a_job_whose_record_was_lost_is_found_in_the_pool_s_hands(yard: Any) -> None:
    yard.up()
    running, queued = yard.submit(1, waits=True), yard.submit(2)
    yard.runs(running)
    for path in (yard.folder.root / "sent").iterdir():
        path.unlink()
    yard.new_service()
    for name in (running, queued):
        assert yard.scheduler.find(name, yard.run_folder(name)) == [yard.ids[name]]
    yard.finish()
    yard.all_ended()
    assert results(yard) == [running, queued]


def test_a_job_that_was_recorded_and_not_sent_is_not_found(yard: Any) -> None:
    """The service died between the record and the sending: the job is sent again, by whoever comes next."""
    yard.up()
    name, folder = yard.job(1)
    other = yard.submit(2)
    yard.folder.write_sent(
        Sent(job=name, folder=str(folder), ranks=2, time_limit_s=60, to=yard.ids[other].replace("-02", "-01"))
    )
    yard.new_service()
    assert yard.scheduler.find(name, folder) == []
    yard.ids[name] = yard.scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=60))
    yard.all_ended()
    assert results(yard) == [other, name]


def test_relay_leaves_no_gap(make_yard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that are old after 3 s relieve each other while jobs come all the time: each goes to a pool."""
    monkeypatch.setattr("emflow.schedulers.pool_plan.EARLIEST_RELAY", 1.0)
    yard = make_yard(walltime_s=300, relay_s=297.0)
    yard.up()
    end, number, pools = time.monotonic() + WAIT_S, 0, set()
    while len(pools) < 3 and time.monotonic() < end:
        number += 1
        name = yard.submit(number)
        yard.until(lambda name=name: yard.status(name).phase is SchedulerPhase.ENDED, f"{name} does not end")
        pools.add(pool_of(yard.sent(name).to))
        pause = time.monotonic() + 0.1
        yard.until(lambda pause=pause: time.monotonic() > pause, "the clock stands still")
    assert len(results(yard)) == number
    assert len(pools) == 3
    assert None not in pools, "a job went another way"
    first = yard.folder.names()[0]
    yard.until(lambda: yard.folder.closed(first), "the first pool is not over")
    assert yard.folder.closed(first).reason == "it was told to drain"


def test_cancel_ends_a_job_that_waits_and_one_that_runs(yard: Any) -> None:
    (pool,) = yard.up()
    running, queued, after = yard.submit(1, waits=True), yard.submit(2), yard.submit(3)
    yard.runs(running)
    yard.scheduler.cancel(yard.ids[queued])
    assert yard.status(queued).phase is SchedulerPhase.ENDED
    yard.scheduler.cancel(yard.ids[running])
    assert yard.status(running).phase is SchedulerPhase.ENDED
    yard.all_ended()
    assert results(yard) == [after]
    assert yard.claims(queued) == 0
    assert yard.taking() == [pool], "the pool itself goes on"


def test_hosts_are_handed_to_mpiexec_and_nothing_else_is(make_yard: Callable[..., Any]) -> None:
    yard = make_yard(hosts=("localhost",))
    (pool,) = yard.up()
    name = yard.submit(1)
    yard.all_ended()
    assert results(yard) == [name]
    (mpiexec,) = [p for p in processes.family([leader(yard, pool)]) if b"mpiexec\0" in command(p)]
    assert b"-hosts\0localhost\0" in command(mpiexec)
    for bad in ("-x", "a b", "$(id)", "a;b", "a,b", ""):
        wrong = msgspec.structs.replace(yard.config, pool=msgspec.structs.replace(yard.config.pool, hosts=(bad,)))
        with pytest.raises(ConfigError, match="no host's name"):
            hosts_of(wrong)


def test_a_job_is_stopped_at_its_time_limit(yard: Any) -> None:
    yard.up()
    name = yard.submit(1, waits=True, time_limit_s=1)
    said = yard.all_ended()
    assert said[name].phase is SchedulerPhase.ENDED
    assert yard.sent(name).cancelled
    assert (yard.run_folder(name) / "error.json").exists()


def test_a_job_that_was_to_be_stopped_when_the_service_died_is_stopped(yard: Any) -> None:
    yard.up()
    name = yard.submit(1, waits=True)
    yard.runs(name)
    yard.folder.write_sent(msgspec.structs.replace(yard.sent(name), cancelled=True))
    yard.new_service()
    said = yard.all_ended()
    assert said[name].phase is SchedulerPhase.ENDED
    assert not yard.has_result(name)


def test_a_job_whose_record_was_lost_while_it_ran_is_followed(yard: Any) -> None:
    yard.up()
    running, queued = yard.submit(1, waits=True), yard.submit(2)
    yard.runs(running)
    (yard.folder.root / "sent" / f"{running}.json").unlink()
    (yard.folder.root / "sent" / f"{queued}.json").write_bytes(b"")
    yard.new_service()
    assert yard.status(running).phase is SchedulerPhase.RUNNING
    assert yard.status(queued).phase is SchedulerPhase.PENDING
    yard.scheduler.cancel(yard.ids[running])
    assert yard.status(running).phase is SchedulerPhase.ENDED
    yard.all_ended()
    assert results(yard) == [queued]


def test_without_a_pool_a_job_goes_another_way_and_says_so(yard: Any, caplog: pytest.LogCaptureFixture) -> None:
    yard.folder.hold(True)
    with caplog.at_level(logging.WARNING, "emflow"):
        names = [yard.submit(1), yard.submit(2)]
    assert all(yard.ids[name].startswith("local:") for name in names)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["no pool takes tasks: a job of its own on this machine instead"]
    for name in names:
        assert yard.scheduler.find(name, yard.run_folder(name)) == [yard.ids[name]]
        assert told[0] in yard.status(name).reason
    said = yard.all_ended()
    assert {status.scheduler_id for status in said.values()} == set(yard.ids.values())
    assert results(yard) == names
    yard.scheduler.cancel(*yard.ids.values())


def test_a_job_that_was_to_go_another_way_when_the_service_died_goes_there_once(yard: Any) -> None:
    """Its pool was over, and the record of where it goes next has no id: it is looked for before it is sent."""
    yard.folder.hold(True)
    given = "pool:20240501T120000-00/"
    names = []
    for number in (1, 2):
        name, folder = yard.job(number)
        names.append(name)
        yard.ids[name] = given + name
        yard.folder.write_sent(
            Sent(job=name, folder=str(folder), ranks=2, time_limit_s=60, to="local:", why="no pool takes tasks")
        )
    sent = LocalScheduler().submit(names[0], yard.run_folder(names[0]), Resources(ranks=2, time_limit_s=60))
    yard.new_service()
    assert yard.scheduler.find(names[0], yard.run_folder(names[0])) == [f"local:{sent}"]
    assert yard.scheduler.find(names[1], yard.run_folder(names[1])) == []
    said = yard.all_ended()
    assert {status.scheduler_id for status in said.values()} == set(yard.ids.values())
    assert results(yard) == names
    assert yard.sent(names[0]).to == f"local:{sent}"
    assert {yard.claims(name) for name in names} == {1}


def test_a_job_that_nobody_takes_is_not_offered_at_every_look(yard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.folder.hold(True)
    name, folder = yard.job(1)
    yard.ids[name] = f"pool:20240501T120000-00/{name}"
    yard.folder.write_sent(Sent(job=name, folder=str(folder), ranks=2, time_limit_s=60, to="local:"))
    other = LocalRecord(job="fedcba9876543210-01", scheduler_id="1", host="h")
    (folder / "local.json").write_bytes(msgspec.json.encode(other))  # so that this one is refused
    offered = []
    send = Sender.send
    monkeypatch.setattr(Sender, "send", lambda self, sent: offered.append(sent.job) or send(self, sent))
    for _ in range(4):
        said = yard.status(name)
        assert said.phase is SchedulerPhase.PENDING
        assert "already started" in said.reason
    assert offered == [name]
    (folder / "local.json").unlink()
    yard.all_ended()
    assert results(yard) == [name]


def test_a_wrong_secret_sends_jobs_another_way(yard: Any) -> None:
    (pool,) = yard.up()
    secret = yard.folder.root / "secret"
    secret.unlink()
    make_secret(yard.folder.root)
    name = yard.submit(1)
    assert yard.ids[name].startswith("local:")
    assert "secret" in yard.sent(name).why
    yard.all_ended()
    assert results(yard) == [name]
    yard.folder.write_leaving(pool)
    yard.until(lambda: yard.folder.closed(pool), "it idles on, and is charged for")
    assert yard.folder.closed(pool).reason == "it was told to drain"


def test_a_secret_that_others_may_read_starts_no_pool(yard: Any) -> None:
    secret = make_secret(yard.folder.root)
    assert secret.stat().st_mode & 0o777 == 0o600
    secret.chmod(0o644)
    with pytest.raises(NotAllowed, match="others may"):
        make_secret(yard.folder.root)
    (finding,) = (found for found in yard.scheduler.check() if found.part == "pool secret")
    assert not finding.ok
    assert finding.fix
    yard.scheduler.tend()
    time.sleep(0.1)
    assert yard.folder.names() == []


@pytest.mark.slow
def test_pools_that_die_young_are_started_ever_more_slowly(yard: Any) -> None:
    for _ in range(2):
        (pool,) = yard.up()
        processes.kill([leader(yard, pool)], 10.0)
        yard.until(lambda pool=pool: yard.folder.closed(pool), "not closed")
        assert yard.folder.closed(pool).young
    yard.until(lambda: "soon after their start" in yard.scheduler.trouble, "nobody says so")
    yard.up()


def test_a_second_service_leaves_the_pools_of_the_first_alone(make_yard: Callable[..., Any]) -> None:
    first = make_yard()
    (pool,) = first.up()
    other = make_yard(folder=first.config.pool.folder)
    other.until(lambda: "those of the service" in other.scheduler.trouble, "nobody says so")
    (finding,) = (found for found in other.scheduler.check() if found.part == "pool folder")
    assert not finding.ok
    assert first.folder.names() == first.taking() == [pool]
    other.closed = True  # nothing is its own
    other.scheduler.close()


def test_a_pool_that_was_meant_to_start_and_did_not_is_closed(yard: Any) -> None:
    """The service died between the intent and the start."""
    name = yard.folder.new_name()
    yard.until(lambda: yard.folder.closed(name), "not closed")
    assert yard.up() != [name]
