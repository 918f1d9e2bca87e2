"""A pool of two warm ranks: what it makes of tasks, good and bad ones, of one client and of two."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_kernels import jsonfile
from mpi_kernels.contract import Ready, ReductionSpec
from mpi_kernels.events import read_events
from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.errors import PoolGone, PoolRefused
from mpi_kernels.pool.records import Task

pytestmark = pytest.mark.needs_mpi


def events(folder: Path) -> list[str]:
    return [event.name for path in sorted(folder.glob("events-*.jsonl")) for event in read_events(path)]


def test_a_result_has_the_bits_of_a_cold_job(pool: Any, yard: Any, kernels: SimpleNamespace, mpiexec: str) -> None:
    cold = yard.task()
    done = kernels.launch(mpiexec, 2, "-m", "mpi4py", "-m", "mpi_kernels", yard.folder(cold))
    assert done.returncode == 0, done.stderr
    warm = yard.task()
    pool.send(warm)
    assert pool.end_of(warm).how == "result"
    assert len(yard.maps(cold)) == 12
    assert yard.maps(warm) == yard.maps(cold)
    assert json.loads((yard.folder(warm) / "result.json").read_text())["ranks"] == 2


def test_a_growing_acquisition_has_the_bits_of_a_whole_one(pool: Any, yard: Any, until: Callable[..., Any]) -> None:
    whole, growing, stalls, good = (
        yard.task(),
        yard.task(growing=True),
        yard.task(growing=True, stall_s=0.3),
        yard.task(),
    )
    above = yard.folder(growing).parent
    for task in (whole, growing, stalls, good):
        pool.send(task)
    jsonfile.publish(above / "ready-1.json", jsonfile.encode(Ready(frames=20, complete=False, digest=None)))
    until(lambda: "started" in events(yard.folder(growing)), "it does not begin")
    jsonfile.publish(above / "ready-2.json", jsonfile.encode(Ready(frames=42, complete=True, digest="0" * 32)))
    assert [pool.end_of(task).how for task in (whole, growing, stalls, good)] == ["result", "result", "error", "result"]
    assert yard.maps(growing) == yard.maps(whole)
    assert json.loads((yard.folder(stalls) / "error.json").read_text())["code"] == "stalled"


def test_twenty_in_a_row(pool: Any, yard: Any) -> None:
    tasks = [yard.task(ranks=1 + i % 2) for i in range(20)]
    for task in tasks:
        pool.send(task)
    assert [pool.end_of(task).how for task in tasks] == ["result"] * 20
    assert len({json.dumps(sorted(map(repr, yard.maps(task).items()))) for task in tasks[1::2]}) == 1
    assert all(events(yard.folder(task)).count("claimed") == 1 for task in tasks)
    assert not list((pool.folder / "taken").iterdir())


@pytest.mark.parametrize(
    ("how", "at", "code"),
    [
        ("raise", 3, "missing-data"),
        ("raise", 33, "missing-data"),
        ("bug", 33, "unexpected"),
        ("sys.exit", 3, "unexpected"),
    ],
)
def test_a_rank_that_fails_costs_its_task_only(pool: Any, yard: Any, how: str, at: int, code: str) -> None:
    before, bad, good = pool.client.endpoint(), yard.faulty(how, at), yard.task()
    pool.send(bad)
    pool.send(good)
    assert pool.end_of(bad).how == "error"
    assert pool.end_of(good).how == "result"
    error = json.loads((yard.folder(bad) / "error.json").read_text())
    assert (error["code"], error["rank"]) == (code, at // 20)
    assert not yard.has(bad)
    assert pool.client.endpoint() == before


def test_what_rank_0_alone_finds_out(pool: Any, yard: Any) -> None:
    """No file, no such format, no such reduction, no job.json, half of one, another's: six errors, and a result."""
    before = pool.client.endpoint()
    gone = yard.task(Path("/nowhere/scan.npy"))
    unknown = yard.task(form="no_such_module:Format")
    recipe = yard.task(reductions=[ReductionSpec(use="no_such_module:Reduction", name="x")])
    empty, torn, other = yard.task(), yard.task(), yard.task()
    (yard.folder(empty) / "job.json").unlink()
    (yard.folder(torn) / "job.json").write_text('{"job":')
    shutil.copy(yard.folder(gone) / "job.json", yard.folder(other) / "job.json")
    bad = [gone, unknown, recipe, empty, torn, other]
    good = yard.task()
    for task in [*bad, good]:
        pool.send(task)
    assert [pool.end_of(task).how for task in [*bad, good]] == ["error"] * 6 + ["result"]
    codes = [json.loads((yard.folder(task) / "error.json").read_text())["code"] for task in bad]
    assert codes == ["format", "recipe", "recipe", "no-file", "format", "format"]
    assert pool.client.endpoint() == before


def test_a_job_for_more_ranks_is_refused_and_left_alone(pool: Any, yard: Any) -> None:
    task = yard.task(ranks=3)
    pool.send(task)
    end = pool.end_of(task)
    assert end.how == "refused"
    assert "asks for 3 ranks; this pool has 2" in end.why
    assert sorted(p.name for p in yard.folder(task).iterdir()) == ["job.json"]


def test_what_is_sent_twice_or_claimed_by_another_is_not_done_again(pool: Any, yard: Any) -> None:
    first, twice, claimed = yard.faulty("slow", frames=20), yard.task(), yard.task()
    (yard.folder(claimed) / "claim").write_text("{}")
    for task in (first, twice, twice, claimed):
        pool.send(task)
    assert pool.end_of(claimed).how == "claimed"
    pool.send(twice)
    pool.send(last := yard.task())
    pool.end_of(last)
    assert events(yard.folder(twice)).count("claimed") == 1
    assert not yard.has(claimed)


def test_cancelled_while_it_waits_and_while_it_runs(pool: Any, yard: Any, until: Callable[..., Any]) -> None:
    before, slow, waiting, good = pool.client.endpoint(), yard.faulty("slow", frames=4000), yard.task(), yard.task()
    for task in (slow, waiting, good):
        pool.send(task)
    assert pool.client.holds(waiting.job)
    pool.client.cancel(waiting.job)
    pool.client.cancel(waiting.job)
    pool.client.cancel("0" * 16 + "-99")
    assert pool.end_of(waiting).how == "cancelled"
    assert not yard.has(waiting, "claim")
    runs = until(lambda: yard.has(slow, "heartbeat") and pool.client.beat(), "it does not run")
    assert (runs.state, runs.job, runs.queued) == ("working", slow.job, 1)
    pool.client.cancel(slow.job)
    assert pool.end_of(slow).how == "cancelled"
    assert json.loads((yard.folder(slow) / "error.json").read_text())["code"] == "stopped"
    assert pool.end_of(good).how == "result"
    assert pool.client.endpoint() == before
    assert not pool.client.holds(slow.job)


HOSTILE = [
    ("0" * 16 + "-01", "../" + "0" * 16 + "/01"),
    ("0" * 16 + "-01", "2026-11-28/../2026-11-28/" + "0" * 16 + "/01"),
    ("0" * 16 + "-01", "/etc"),
    ("0" * 16 + "-01", "2026-11-28/" + "1" * 16 + "/01"),
    ("0" * 16 + "-01", "2026-11-28/" + "0" * 16 + "/02"),
    ("0" * 16 + "-01\n", "2026-11-28/" + "0" * 16 + "/01"),
    ("../../x", "2026-11-28/" + "0" * 16 + "/01"),
    ("$(touch x)", "$(touch x)"),
    ("", ""),
]


@pytest.mark.parametrize(("job", "folder"), HOSTILE)
def test_hostile_names_are_refused_on_both_sides(pool: Any, job: str, folder: str) -> None:
    with pytest.raises(PoolRefused):
        pool.client.send(job, folder)
    line = pool.client._connect(time.monotonic() + 20.0)  # past the client's own check
    try:
        line.say({"do": "send", "task": {"job": job, "folder": folder}})
        said = line.hear(20.0)
        assert said is not None
        assert "refused" in said
        for nonsense in ({"do": "send"}, {"do": "send", "task": []}, {"do": "send", "task": {"job": 1, "folder": {}}}):
            line.say(nonsense)
            said = line.hear(20.0)
            assert said is not None
            assert "refused" in said
    finally:
        line.close()


def test_a_link_leads_nowhere(pool: Any, yard: Any, tmp_path: Path) -> None:
    task = yard.task()
    yard.folder(task).rename(tmp_path / "01")
    yard.folder(task).symlink_to(tmp_path / "01")
    with pytest.raises(PoolRefused, match="a link"):
        pool.send(task)
    with pytest.raises(PoolRefused, match="no such run folder"):
        pool.client.send("f" * 16 + "-01", "2026-11-28/" + "f" * 16 + "/01")
    with pytest.raises(PoolRefused, match="no run folder of this pool"):
        pool.client.send("f" * 16 + "-01", tmp_path)


def test_two_clients(pool: Any, yard: Any) -> None:
    other = PoolClient(pool.folder, timeout_s=10.0)
    try:
        mine, yours = yard.task(), yard.task()
        pool.send(mine)
        other.send(yours.job, yard.folder(yours))  # an absolute folder will do
        assert pool.end_of(yours).how == pool.end_of(mine).how == "result"
        beat = other.beat()
        assert beat is not None
        assert {mine.job, yours.job} <= {end.job for end in other.ended()}
    finally:
        other.close()


def test_through_the_spool_only(pool: Any, yard: Any) -> None:
    client = PoolClient(pool.folder, reach="spool")
    slow, waiting, good = yard.faulty("slow", frames=60), yard.task(), yard.task()
    for task in (slow, waiting, good):
        client.send(task.job, task.folder)
    client.cancel(waiting.job)
    assert pool.end_of(good).how == "result"
    assert pool.end_of(slow).how == "result"
    assert not yard.has(waiting)
    assert not list((pool.folder / "spool").iterdir())
    assert client.beat() is not None
    assert client.ended() == []


def test_hostile_files_in_the_spool(pool: Any, yard: Any) -> None:
    spool = pool.folder / "spool"
    (spool / "x.json").write_text("{}")
    (spool / f"{'a' * 16}-01.json").write_text("[" * 100_000)
    (spool / f"{'b' * 16}-01.json").write_text(json.dumps({"job": "b" * 16 + "-01", "folder": "../../etc"}))
    (spool / f"{'c' * 16}-01.json").symlink_to("/etc/passwd")
    os.mkfifo(spool / f"{'d' * 16}.fifo")
    for letter in "abc":
        name = f"{letter * 16}-01"
        assert pool.end_of(Task(job=name, folder="")).how == "refused"
    pool.send(good := yard.task())
    assert pool.end_of(good).how == "result"
    for path in spool.iterdir():
        path.unlink()


def test_there_is_no_pool(tmp_path: Path) -> None:
    with pytest.raises(PoolGone, match="there is no pool"):
        PoolClient(tmp_path)
