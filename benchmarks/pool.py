"""Ranks that are kept warm, on a real Slurm of two virtual nodes: how soon a task runs, and whether a hand-over shows.

Dispatch is from the call to the moment in which every rank has the job and rank 0 is about to claim the folder
(``wall_ns`` of its claim), by this host's clock, which the virtual nodes share: once from the client's call, and once
from the scheduler's, which writes down its intent first.  Cold starts of the same job stand beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import _jobs, cluster
from benchmarks.machine import summary
from benchmarks.submit import compare
from emflow.config import Config
from emflow.records import Resources
from emflow.registry import load
from emflow.runs import RunFolders
from emflow.schedulers.protocol import Scheduler
from mpi_kernels.contract import RESULT_FILE
from mpi_kernels.pool.client import PoolClient

TINY = (4, 4, 8, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", type=int, default=500, help="tiny ones, for the dispatch (default %(default)s)")
    parser.add_argument("--acquisitions", type=int, default=30, help="of 33 MB, by the service (default %(default)s)")
    parser.add_argument("--walltime", type=int, default=120, help="of a pool in the hand-over (default %(default)s)")
    parser.add_argument("--relays", type=float, default=2.5, help="walltimes to hand over in (default %(default)s)")
    parser.add_argument("--nap", type=float, default=0.5, help="of an idle rank, ms (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of each cold way (default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """Dispatch, the idle ranks' CPU, acquisitions through the service, the hand-over, and cold starts beside them."""
    if (why := cluster.missing()) is not None:
        return {"skipped": why}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.work.resolve(), prefix="emflow-pool-")))
        where = stack.enter_context(cluster.running(root / "tuned", cpus=16))
        plain = stack.enter_context(cluster.running(root / "plain", cpus=8, scheduling=""))
        with _jobs.on(where):
            figures: dict[str, object] = {"nap_ms": args.nap}
            more = f"[pool]\nwalltime_s = 3000\nnap_ms = {args.nap}\n[slurm]\nnodes = 2\n"
            config = _jobs.configure(root / "warm", "pool", poll_s=0.02, more=more)
            with warm(config) as scheduler:
                figures["idle_cpu_percent_of_a_core_per_rank"] = idle_cpu(where)
                figures["dispatch"] = dispatch(root / "warm", config, scheduler, args.tasks)
                figures["acquisition"] = through_the_service(config, args.acquisitions)
            short = f"[pool]\nwalltime_s = {args.walltime}\nrelay_s = 60.0\nnap_ms = {args.nap}\n[slurm]\nnodes = 2\n"
            config = _jobs.configure(root / "relay", "pool", poll_s=0.02, more=short)
            figures["hand_over"] = hand_over(root / "relay", config, args.relays * args.walltime)
        return figures | {"cold": compare(root, where, plain, args.rounds)}


@contextlib.contextmanager
def warm(config: Config) -> Iterator[Scheduler]:
    """A pool that has answered; it is drained at the end."""
    scheduler: Scheduler = load("schedulers", "pool").from_config(config)
    try:
        ready(scheduler, config)
        yield scheduler
    finally:
        stop(config)
        scheduler.close()


def ready(scheduler: Scheduler, config: Config) -> None:
    """Tend until a pool takes tasks."""

    def up() -> bool:
        scheduler.tend()
        return any(config.pool.folder.glob("*/endpoint.json"))

    _jobs.until(up, "a pool that takes tasks", nap_s=0.05)


def stop(config: Config) -> None:
    """End all pools of a configuration."""
    command = [sys.executable, "-P", "-m", "emflow", "-c", str(config.folder / "emflow.toml"), "pool", "stop"]
    subprocess.run(command, check=False, capture_output=True, timeout=120)


def idle_cpu(where: cluster.Cluster, seconds: float = 5.0) -> float:
    """CPU of one idle rank, in percent of a core."""
    ranks = [path for path in Path("/proc").glob("[0-9]*") if b"mpi_kernels.pool\0" in _read(path / "cmdline")]
    ranks = [
        path
        for path in ranks
        if b"PMI_RANK=" in (environment := _read(path / "environ")) and str(where.conf).encode() in environment
    ]
    before = [_cpu_s(rank) for rank in ranks]
    time.sleep(seconds)
    used = [_cpu_s(rank) - first for rank, first in zip(ranks, before, strict=True)]
    return round(100.0 * statistics.mean(used) / seconds, 2)


def _cpu_s(process: Path) -> float:
    """User and system time; proc(5), fields 14 and 15 of stat."""
    user, system = _read(process / "stat").rpartition(b")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def dispatch(root: Path, config: Config, scheduler: Scheduler, tasks: int) -> dict[str, object]:
    """Tiny tasks one after the other: call to ranks that run, and to frames that are reduced."""
    source, numbers = _jobs.write_scan(root / "tiny.npy", TINY), itertools.count()
    (instance,) = (path.parent for path in config.pool.folder.glob("*/endpoint.json"))
    client = PoolClient(instance, reach="tcp")
    try:
        return {
            "tasks": tasks,
            "by the client": tiny_tasks(config, source, numbers, tasks, client.send),
            "by the scheduler": tiny_tasks(
                config,
                source,
                numbers,
                tasks,
                lambda name, folder: scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=600)),
            ),
        }
    finally:
        client.close()


def tiny_tasks(
    config: Config, source: Path, numbers: Iterator[int], tasks: int, send: Callable[[str, Path], object]
) -> dict[str, object]:
    """Latencies of tasks that are sent one way."""
    runs, running, whole, called = RunFolders(config.service.runs), [], [], []
    for _ in range(tasks):
        name, folder = _jobs.run_folder(config.service.runs, next(numbers), source, ranks=2)
        begin, begin_wall = time.monotonic_ns(), time.time_ns()
        send(name, folder)
        called.append((time.monotonic_ns() - begin) / 1e9)
        _jobs.until((folder / RESULT_FILE).exists, "a result", nap_s=0.0005)
        times = {event.name: event.mono_ns for event in runs.collect_events(folder)}
        claim = runs.read_claim(folder)
        assert claim is not None
        running.append((claim.wall_ns - begin_wall) / 1e9)
        whole.append((times["reduced"] - begin) / 1e9)
    return {"call_returns": summary(called), "ranks_running": summary(running), "reduced": summary(whole)}


def through_the_service(config: Config, count: int) -> dict[str, object]:
    """33 MB acquisitions one after the other through ``emflow run``: by step, from ready on the share to the result."""
    with _jobs.service(config) as part:
        for number in range(count):
            _jobs.write_scan(config.watch[0].root / f"{number:03d}.npy", seed=number)
            _jobs.until_done(config, number + 1, part, 60.0)
    times = [found for _, found in _jobs.jobs_of(config)]
    steps = ("ready", "staged", "management submitted", "data claimed", "data reduced", "data written")
    by_step = {
        f"{first} to {last}": round(statistics.median([(t[last] - t[first]) / 1e6 for t in times]), 2)
        for first, last in itertools.pairwise(steps)
    }
    return {
        "acquisitions": count,
        "ready_to_result": summary([(t["data written"] - t["ready"]) / 1e9 for t in times]),
        "steps_median_ms": by_step,
    }


def hand_over(root: Path, config: Config, seconds: float) -> dict[str, object]:
    """Tiny tasks without a pause while pools end and others take over: the slowest one tells."""
    source = _jobs.write_scan(root / "tiny.npy", TINY)
    with warm(config) as scheduler:
        whole: list[float] = []
        ids: list[str] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name, folder = _jobs.run_folder(config.service.runs, len(whole), source, ranks=2)
            begin = time.monotonic()
            ids.append(scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=600)))
            _jobs.until((folder / RESULT_FILE).exists, "a result", nap_s=0.001)
            whole.append(time.monotonic() - begin)
            scheduler.tend()
            time.sleep(0.05)
    return {
        "seconds": seconds,
        "tasks": len(whole),
        "pools": len({scheduler_id.partition("/")[0] for scheduler_id in ids}),
        "call_to_result": summary(whole),
        "slower_than_1_s": sum(value > 1.0 for value in whole),
    }
