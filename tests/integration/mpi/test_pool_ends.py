"""How a pool ends, and how its ranks are started again: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpi_kernels.events import read_events
from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.errors import PoolDrains, PoolGone, PoolUnreachable, WrongSecret
from mpi_kernels.pool.records import Beat

pytestmark = pytest.mark.needs_mpi
Start = Callable[..., Any]
Until = Callable[..., Any]


def claims(folder: Path) -> int:
    return [e.name for path in folder.glob("events-*.jsonl") for e in read_events(path)].count("claimed")


def test_it_drains_while_it_works(start: Start, yard: Any, until: Until) -> None:
    pool = start()
    pool.ready()
    slow, left = yard.faulty("slow", frames=120), yard.task()
    pool.send(slow)
    pool.send(left)
    until(lambda: yard.has(slow, "claim"), "it does not begin")
    pool.client.drain()
    beat = pool.client.beat()
    assert isinstance(beat, Beat)
    assert beat.state == "draining"
    with pytest.raises((PoolDrains, PoolGone)):
        pool.send(yard.task())
    last = pool.ended()
    assert (last.why, last.left, last.done) == ("drained", (left.job,), 1)
    assert pool.process.returncode == 0
    assert yard.has(slow)
    assert not yard.has(left, "claim")
    assert not pool.client.holds(left.job)
    with pytest.raises(PoolGone, match="told to drain"):
        pool.send(left)
    pool.client.drain()  # no error: it is what was wanted
    again = start(pool.folder)
    assert again.process.wait(30) != 0
    assert "it has ended" in again.log.read_text()


def test_usr1_drains(start: Start, yard: Any) -> None:
    pool = start()
    pool.ready()
    pool.send(task := yard.task())
    assert pool.end_of(task).how == "result"
    for pid in pool.ranks():  # as Slurm sends it, to every rank
        os.kill(pid, signal.SIGUSR1)
    assert pool.ended().why == "drained"
    assert pool.process.returncode == 0


@pytest.mark.parametrize(
    ("limit_s", "walltime_s", "code", "why"),
    [
        pytest.param(15.0, 0.0, "time-limit", "the time limit is near", id="of the task"),
        pytest.param(
            0.0, 30.0, "stopped", "the time of its pool is nearly up", id="of the pool", marks=pytest.mark.slow
        ),
    ],
)
def test_a_task_whose_time_is_up_leaves_what_it_has(
    start: Start, yard: Any, limit_s: float, walltime_s: float, code: str, why: str
) -> None:
    pool = start(walltime_s=walltime_s, warn_s=8.0)
    pool.ready()
    long = yard.long()
    pool.send(long, limit_s)
    assert pool.end_of(long).how == "error"
    error = json.loads((yard.folder(long) / "error.json").read_text())
    assert (error["code"], error["retryable"]) == (code, True)
    assert error["message"].startswith(f"{why}: ended after ")
    partial = json.loads((yard.folder(long) / "partial-1.json").read_text())
    assert 0 < partial["frames"] < 4_000_000
    if not walltime_s:  # and the next one has all the time it wants
        pool.send(task := yard.task())
        assert pool.end_of(task).how == "result"


def test_its_time_is_up(start: Start, yard: Any) -> None:
    pool = start(walltime_s=12.0, warn_s=10.0)
    endpoint = pool.ready()
    assert 0 < endpoint.stops_ns - time.time_ns() < 12e9
    last = pool.ended()
    assert (last.why, last.message) == ("time", "its time is up")
    assert time.time_ns() < endpoint.stops_ns


def test_sigterm_ends_what_runs_and_says_so(start: Start, yard: Any, until: Until) -> None:
    pool = start()
    endpoint = pool.ready()
    slow, left = yard.faulty("slow", frames=4000), yard.task()
    pool.send(slow)
    pool.send(left)
    until(lambda: yard.has(slow, "heartbeat"), "it does not begin")
    os.kill(endpoint.pid, signal.SIGTERM)
    last = pool.ended()
    assert (last.why, last.message, last.left) == ("stopped", "stopped by SIGTERM", (left.job,))
    assert json.loads((yard.folder(slow) / "error.json").read_text())["code"] == "stopped"


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_killed_are_started_again(start: Start, yard: Any, until: Until, rank: int) -> None:
    pool = start(script=True)
    first = pool.ready()
    pids = pool.ranks()
    assert len(pids) == 2
    assert first.pid in pids
    slow, waiting = yard.faulty("slow", frames=4000), yard.task()
    pool.send(slow)
    pool.send(waiting)
    until(lambda: yard.has(slow, "heartbeat"), "it does not begin")
    os.kill(first.pid if rank == 0 else next(pid for pid in pids if pid != first.pid), signal.SIGKILL)
    second = pool.ready(life=2)
    assert second.pid != first.pid
    until(lambda: yard.has(waiting), "what waited is not done")
    pool.send(after := yard.task())
    assert pool.end_of(after).how == "result"
    assert not pool.client.holds(slow.job)
    assert not yard.has(slow)
    assert [claims(yard.folder(task)) for task in (slow, waiting, after)] == [1, 1, 1]
    assert list((pool.folder / "taken").iterdir()) == []
    pool.client.drain()
    assert pool.ended().why == "drained"
    assert pool.process.returncode == 0


def test_a_task_that_kills_its_rank_is_not_begun_again(start: Start, yard: Any, until: Until) -> None:
    pool = start(script=True)
    pool.ready()
    killer, good = yard.faulty("kill", 33), yard.task()
    pool.send(killer)
    pool.send(good)
    pool.ready(life=2)
    until(lambda: yard.has(good), "what waited is not done")
    assert (claims(yard.folder(killer)), claims(yard.folder(good))) == (1, 1)
    assert not pool.client.holds(killer.job)


def test_ranks_that_die_at_once_are_given_up(start: Start, yard: Any) -> None:
    (yard.base / "pool" / "open").unlink(missing_ok=True)
    yard.write_secret(yard.base / "pool" / "open", 0o600)
    (yard.base / "pool" / "open").chmod(0o644)
    pool = start(script=True, secret=str(yard.base / "pool" / "open"))
    client = PoolClient(pool.folder, reach="spool")
    client.send((task := yard.task()).job, task.folder)
    last = pool.ended()
    assert (last.why, last.done) == ("gave-up", 0)
    assert pool.process.returncode != 0
    assert pool.log.read_text().count("others may have read it") == 3
    with pytest.raises(PoolGone, match="died too often"):
        pool.send(task)


@pytest.mark.slow
def test_a_cancelled_task_that_hangs_costs_the_ranks_but_no_other_task(start: Start, yard: Any, until: Until) -> None:
    pool = start(script=True)
    pool.ready()
    hanging, good = yard.faulty("hang", 33), yard.task()
    pool.send(hanging)
    pool.send(good)
    until(lambda: list(yard.base.glob("hang*.hangs")), "it does not hang")
    beats = [until(pool.client.beat, "no heartbeat"), until(pool.client.beat, "no heartbeat")]
    assert {beat.job for beat in beats} == {hanging.job}
    pool.client.cancel(hanging.job)
    pool.ready(life=2)
    until(lambda: yard.has(good), "what waited is not done")
    assert json.loads((yard.folder(hanging) / "error.json").read_text())["code"] == "stopped"
    assert (claims(yard.folder(hanging)), claims(yard.folder(good))) == (1, 1)


def test_a_client_that_can_not_get_through(start: Start, yard: Any, until: Until) -> None:
    """Another secret since, no listener, TCP only: each is told as what it is; through files it works all the same."""
    pool = start(reach="spool")
    pool.ready()
    pool.send(task := yard.task())
    until(lambda: yard.has(task), "it is not done")
    assert pool.client.endpoint().port == 0
    tcp = yard.instance(reach="tcp")
    client = PoolClient(tcp, timeout_s=0.2)
    with pytest.raises(PoolUnreachable, match="not said yet where it listens"):
        client.send(task.job, task.folder)
    (tcp / "endpoint.json").write_bytes((pool.folder / "endpoint.json").read_bytes())
    with pytest.raises(PoolUnreachable, match="takes files only"):
        client.send(task.job, task.folder)
    second = start(reach="auto")
    second.ready()
    yard.secret.write_text(secrets.token_hex(32))
    with pytest.raises(WrongSecret, match="hung up on our secret"):
        second.send(yard.task())


def test_ranks_that_a_job_left_out_take_part_in_the_next(start: Any, yard: Any) -> None:
    pool = start()
    pool.ready()
    tasks = [yard.task(ranks=1 + i % 2) for i in range(3)]
    for task in tasks:
        pool.send(task)
    assert [pool.end_of(task).how for task in tasks] == ["result"] * 3  # known frames are reduced by all or none
