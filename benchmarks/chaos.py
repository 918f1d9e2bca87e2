"""A real Slurm, a real service, and something that kills: nothing may be lost, nothing done twice, no number changed.

While acquisitions arrive, one part after the other is killed with SIGKILL at random times and started again: the
service, slurmctld, a node's slurmd, a slurmstepd, a rank of a job, a rank of the pool.  Afterwards every acquisition
must be done with one result, and each result must hold the numbers of a run in which nothing was killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from benchmarks import _jobs, cluster
from emflow.config import Config
from emflow.demo.processes import Part, running
from emflow.errors import JournalError
from emflow.journal import Journal
from emflow.records import AcquisitionState
from emflow.runs import RunFolders

SHAPE = (16, 16, 32, 32)
MORE = """\
[pool]
walltime_s = 600
relay_s = 60.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--acquisitions", type=int, default=300, help="how many (default %(default)s)")
    parser.add_argument("--every", type=float, default=2.0, help="mean seconds between two kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the kills (default %(default)s)")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds for all of it (default %(default)s)")
    parser.add_argument("--use", default="slurm pool", help="schedulers, one after the other (default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """For each scheduler: what was killed, and what became of the acquisitions."""
    if (why := cluster.missing()) is not None:
        return {"skipped": why}
    return {use: trial(use, args) for use in args.use.split()}


def trial(use: str, args: argparse.Namespace) -> dict[str, object]:
    """One scheduler."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.work.resolve(), prefix="emflow-chaos-")))
        quiet = _jobs.configure(root / "quiet", "null", ranks=1)
        names = [f"{number:04d}.npy" for number in range(args.acquisitions)]
        for number, name in enumerate(names):
            _jobs.write_scan(quiet.watch[0].root / name, SHAPE, number)
        with _jobs.service(quiet) as part:
            _jobs.until_done(quiet, len(names), part, args.patience)
        where = stack.enter_context(cluster.running(root / "cluster", cpus=8, extra="SlurmctldTimeout=10"))
        stack.enter_context(_jobs.on(where))
        config = _jobs.configure(root / use, use, max_active=4, more=MORE)
        begin = time.monotonic()
        dice = random.Random(args.seed)  # noqa: S311  no secret: the same seed kills in the same order
        killed = Chaos(where, config, dice).run(quiet.watch[0].root, names, args)
        return {
            "acquisitions": len(names),
            "seconds": round(time.monotonic() - begin, 1),
            "killed": dict(sorted(killed.items())),
            **outcome(config, quiet, names),
        }


@dataclass
class Chaos:
    """The service, what it stands on, and what is killed of it."""

    where: cluster.Cluster
    config: Config
    dice: random.Random
    killed: collections.Counter[str] = field(default_factory=collections.Counter)

    def run(self, source: Path, names: list[str], args: argparse.Namespace) -> collections.Counter[str]:
        """Let acquisitions arrive while parts are killed; then wait in peace until all are done."""
        share, end = self.config.watch[0].root, time.monotonic() + args.patience
        arriving = iter(names)
        stack = contextlib.ExitStack()
        try:
            part = stack.enter_context(self._service())
            due = time.monotonic()
            while (name := next(arriving, None)) is not None:
                os.link(source / name, share / name)
                time.sleep(self.dice.uniform(0.0, 0.5))
                if part.ended:
                    part = stack.enter_context(self._service())
                if time.monotonic() >= due:
                    self._kill(part.process.pid)
                    due = time.monotonic() + self.dice.expovariate(1.0 / args.every)
            while self._done() < len(names):
                if time.monotonic() > end:
                    break  # what is missing is counted
                if part.ended:
                    part = stack.enter_context(self._service())
                self._mend()
                time.sleep(0.2)
        finally:
            stack.close()
        return self.killed

    @contextlib.contextmanager
    def _service(self) -> Iterator[Part]:
        name = f"service-{self.killed['service']}"
        with running(name, ["-c", str(self.config.folder / "emflow.toml"), "run"], self.config.folder) as part:
            yield part

    def _done(self) -> int:
        try:
            with Journal(self.config.service.state / "journal.sqlite", read_only=True) as journal:
                return journal.counts()[0].get(AcquisitionState.DONE, 0)
        except JournalError:
            return 0

    def _kill(self, service: int) -> None:
        """Kill one part, chosen at random among those that are there; a daemon is started again at once."""
        steps, ranks = self._of_jobs(b"slurmstepd"), self._of_jobs(b"mpi_kernels")
        choices: dict[str, Callable[[], None]] = {"service": lambda: os.kill(service, signal.SIGKILL)}
        for name in ("slurmctld", *self.where.nodes):
            choices[name] = lambda name=name: self._restart(name)  # type: ignore[misc]
        if steps:
            choices["slurmstepd"] = lambda: os.kill(self.dice.choice(steps), signal.SIGKILL)
        if ranks:
            choices["rank"] = lambda: os.kill(self.dice.choice(ranks), signal.SIGKILL)
        name = self.dice.choice(sorted(choices))
        with contextlib.suppress(ProcessLookupError):
            choices[name]()
            self.killed[name] += 1

    def _restart(self, name: str) -> None:
        self.where.signal(name, signal.SIGKILL)
        time.sleep(self.dice.uniform(0.0, 1.0))
        self.where.start_daemon(name)

    def _mend(self) -> None:
        """Wake nodes that Slurm has set aside: an administrator's work, not the service's."""
        with contextlib.suppress(RuntimeError, OSError):
            if {"down", "drained", "down*"} & set(self.where.run("sinfo", "-h", "-N", "-o", "%t").split()):
                self.where.run("scontrol", "update", f"NodeName={','.join(self.where.nodes)}", "State=RESUME")

    def _of_jobs(self, what: bytes) -> list[int]:
        """Processes of this cluster's jobs whose command line holds a word."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                ours = str(self.where.root).encode() in environment + command
                if what in command and ours and (what != b"mpi_kernels" or b"SLURM_PROCID=" in environment):
                    found.append(int(entry.name))
        return sorted(found)


# --- what became of it


def outcome(config: Config, quiet: Config, names: list[str]) -> dict[str, object]:
    """Lost, done twice, and changed acquisitions; and how many attempts it took."""
    with contextlib.ExitStack() as stack:
        journals = [
            stack.enter_context(Journal(c.service.state / "journal.sqlite", read_only=True)) for c in (config, quiet)
        ]
        mine, theirs = ({a.name: a for a in j.known("share")} for j in journals)
        attempts = {name: journals[0].jobs(mine[name].id) for name in names if name in mine}
    runs = RunFolders(config.service.runs)
    lost, twice, changed = [], [], []
    for name in names:
        done = mine.get(name)
        if done is None or done.state is not AcquisitionState.DONE:
            lost.append(f"{name}: {'never seen' if done is None else f'{done.state} {done.reason}'}")
            continue
        folders = list(runs.job_folders(runs.acquisition_folder(done.day, done.id)))
        results = [folder for folder in folders if (folder / "result.json").exists()]
        if len(results) != 1:
            twice.append(f"{name}: {len(results)} results")
        final = config.service.results / f"{done.id}_emflow.h5"
        if numbers(final) != numbers(quiet.service.results / f"{theirs[name].id}_emflow.h5"):
            changed.append(name)
    counts = collections.Counter(len(jobs) for jobs in attempts.values())
    return {
        "lost": len(lost),
        "twice": len(twice),
        "changed": len(changed),
        "first_of_them": (lost + twice + changed)[:5],
        "acquisitions_by_attempts": dict(sorted(counts.items())),
    }


def numbers(path: Path) -> str:
    """Digest of every number that a result file holds besides how it came about."""
    digest = hashlib.sha256()
    with h5py.File(path, "r") as file:

        def add(name: str, found: object) -> None:
            if isinstance(found, h5py.Dataset) and found.dtype.kind in "biufc" and not name.startswith("process/"):
                digest.update(name.encode())
                digest.update(np.asarray(found[()]).tobytes())

        file["entry"].visititems(add)
    return digest.hexdigest()
