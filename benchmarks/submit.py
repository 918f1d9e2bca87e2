"""Jobs under a real Slurm of two virtual nodes: what the service adds, what a poll costs, how soon a job starts.

The same job (64 x 64 frames of 64 x 64 pixels of uint16, two ranks) is started in turn by each way there is: sbatch on
a cluster with Slurm's own settings and on one that is tuned, a step in an allocation that is held, and submitit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import _jobs, cluster
from benchmarks.machine import summary
from emflow.records import Resources
from emflow.registry import load

Way = Callable[[str, Path], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--acquisitions", type=int, default=30, help="through the service (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1000, help="in flight while polling (default %(default)s)")
    parser.add_argument("--polls", type=int, default=20, help="of all of them (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of each way of starting a job (default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """Figures of the service, of polling, and of every way to start the same job."""
    if (why := cluster.missing()) is not None:
        return {"skipped": why}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.work.resolve(), prefix="emflow-submit-")))
        tuned = stack.enter_context(cluster.running(root / "tuned", cpus=8))
        plain = stack.enter_context(cluster.running(root / "plain", cpus=8, scheduling=""))
        with _jobs.on(tuned):
            figures: dict[str, object] = {
                "slurm": ".".join(map(str, cluster.version())),
                "service": through_the_service(root / "service", args.acquisitions),
                "poll": polling(root / "poll", args.jobs, args.polls),
            }
        return figures | {"ways": compare(root, tuned, plain, args.rounds)}


# --- the service


def through_the_service(folder: Path, count: int) -> dict[str, object]:
    """Small acquisitions one after the other: ready to accepted by sbatch, and result to journal."""
    poll_s = 0.05
    config = _jobs.configure(folder, "slurm", poll_s=poll_s)
    with _jobs.service(config) as part:
        for number in range(count):
            _jobs.write_scan(folder / "share" / f"{number:03d}.npy", (8, 8, 16, 16), number)
            _jobs.until_done(config, number + 1, part, 60.0)
    times = [found for _, found in _jobs.jobs_of(config)]
    between = {
        "ready_to_accepted": ("ready", "management submitted"),
        "staged_to_accepted": ("staged", "management submitted"),
        "result_to_journal": ("data written", "management reduced"),
        "accepted_to_claimed": ("management submitted", "data claimed"),
    }
    return {"acquisitions": len(times), "poll_s": poll_s, "sbatch_alone": alone(folder, count)} | {
        name: summary([(t[last] - t[first]) / 1e9 for t in times]) for name, (first, last) in between.items()
    }


def alone(folder: Path, count: int) -> dict[str, float]:
    """What sbatch itself takes for a job that does nothing: the part that is not ours."""
    script = folder / "nothing.sh"
    script.write_text("#!/bin/bash\n")
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        command = ["sbatch", "--parsable", "--output=/dev/null", str(script)]
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    return summary(seconds)


# --- polling


def polling(folder: Path, jobs: int, polls: int) -> dict[str, object]:
    """CPU of one poll over many jobs that are held, ours and squeue's."""
    config = _jobs.configure(folder, "slurm")
    script = folder / "held.sh"
    script.write_text("#!/bin/bash\n")
    ids = {}
    for number in range(jobs):
        name = f"{number:016x}-01"
        command = ["sbatch", "--parsable", "--hold", f"--job-name={name}", "--output=/dev/null", str(script)]
        ids[name] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    scheduler = load("schedulers", "slurm").from_config(config)
    try:
        own, children, wall = [], [], []
        for _ in range(polls):
            before = _cpu_s()
            begin = time.perf_counter()
            said = scheduler.poll(ids)
            wall.append(time.perf_counter() - begin)
            after = _cpu_s()
            own.append(after[0] - before[0])
            children.append(after[1] - before[1])
            if {status.phase for status in said.values()} != {"PENDING"} or len(said) != jobs:
                raise RuntimeError("a poll has not found every job")
    finally:
        subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"], check=False)
        scheduler.close()
    ms = {"own_cpu_ms": own, "squeue_cpu_ms": children, "wall_ms": wall}
    return {"jobs": jobs, **{name: round(1e3 * statistics.median(values), 2) for name, values in ms.items()}}


def _cpu_s() -> tuple[float, float]:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


# --- every way to start the same job


def compare(root: Path, tuned: cluster.Cluster, plain: cluster.Cluster, rounds: int) -> dict[str, object]:
    """Seconds from the call to result.json, each way in turn."""
    source = _jobs.write_scan(root / "scan.npy")
    with contextlib.ExitStack() as stack:
        ways: dict[str, tuple[cluster.Cluster, Way]] = {
            "sbatch, Slurm's own settings": (plain, by_sbatch(root / "by-sbatch-plain")),
            "sbatch, tuned": (tuned, by_sbatch(root / "by-sbatch-tuned")),
            "step in a held allocation": (tuned, stack.enter_context(by_step(tuned))),
        }
        skipped = {}
        if importlib.util.find_spec("submitit") is None:
            skipped["submitit"] = "submitit is not installed: pip install emflow[bench]"
        else:
            ways["submitit, tuned"] = (tuned, by_submitit(root / "submitit"))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        numbers = itertools.count()
        for _ in range(rounds):
            for name, (where, start) in ways.items():
                job, folder = _jobs.run_folder(root / "runs", next(numbers), source, ranks=2)
                with _jobs.on(where):
                    begin = time.perf_counter()
                    start(job, folder)
                    seconds[name].append(_jobs.until_result(folder) - begin)
    figures: dict[str, object] = {name: summary(values) for name, values in seconds.items()}
    return {"megabytes": source.stat().st_size // 10**6, **figures, "skipped": skipped}


def by_sbatch(folder: Path) -> Way:
    """What the service does."""
    config = _jobs.configure(folder, "slurm")
    scheduler = load("schedulers", "slurm").from_config(config)

    def start(job: str, run: Path) -> None:
        scheduler.submit(job, run, Resources(ranks=2, time_limit_s=600))

    return start


@contextlib.contextmanager
def by_step(on: cluster.Cluster) -> Iterator[Way]:
    """``srun`` into an allocation that sleeps."""
    on.run("sbatch", "--job-name=held", "--ntasks=2", "--nodes=2", "--output=/dev/null", "--wrap=sleep 3000")
    on.until(lambda: on.run("squeue", "-h", "-n", "held", "-o", "%T").strip() == "RUNNING", "no allocation")
    held = on.run("squeue", "-h", "-n", "held", "-o", "%i").strip()
    steps = []

    def start(job: str, run: Path) -> None:  # noqa: ARG001
        command = ["srun", f"--jobid={held}", "--overlap", "--ntasks=2", "--mpi=pmi2", "--kill-on-bad-exit=1"]
        command += [sys.executable, "-m", "mpi4py", "-m", "mpi_kernels", str(run)]
        steps.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        yield start
    finally:
        for step in steps:
            step.wait(30)
        on.run("scancel", held)


def by_submitit(folder: Path) -> Way:
    """What a Python programmer would take: a function, sent by submitit (which pickles it; a peer, not a part)."""
    import submitit

    executor = submitit.SlurmExecutor(folder=str(folder), python=sys.executable)
    executor.update_parameters(time=10, nodes=2, ntasks_per_node=1, cpus_per_task=1, job_name="submitit")

    def start(job: str, run: Path) -> None:  # noqa: ARG001
        executor.submit(_reduce, str(run))

    return start


def _reduce(folder: str) -> Any:
    """The job, as the function that submitit calls in each of its tasks."""
    from mpi_kernels.__main__ import main as kernels

    return kernels([folder])
