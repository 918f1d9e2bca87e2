"""Other programs, each in an environment that has it, as contestants of the same rounds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._reduce.checks import Check, differs
from benchmarks._reduce.pipes import ROOT, Broken, Worker, environment
from benchmarks._reduce.rows import Run

CLOSE = 1e-4
"""Peers sum in float32: relative bound on their digests."""

MODULES = {"libertem": "libertem", "h5py": "h5py", "py4dstem": "py4DSTEM", "stempy": "stempy"}
EXECUTORS = ("inline", "pipelined", "dask")
NAMES = {"libertem": "LiberTEM", "h5py": "h5py, reading alone", "py4dstem": "py4DSTEM", "stempy": "stempy, in memory"}


def pythons(given: Sequence[str] | None) -> list[str]:
    """Interpreters to look for peers in: those of the command line, of EMFLOW_PEERS_PYTHON, and this one."""
    named = list(given or []) + os.environ.get("EMFLOW_PEERS_PYTHON", "").split(os.pathsep)
    return [*dict.fromkeys(n for n in [*named, sys.executable] if n)]


def find(peer: str, interpreters: Sequence[str]) -> tuple[str, str] | str:
    """Interpreter that has a peer, and the version there; else why there is none."""
    module = MODULES[peer]
    code = f"import importlib.metadata, importlib.util as u; assert u.find_spec({module!r}); "
    code += f"print(importlib.metadata.version({module!r}))"
    for python in interpreters:
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        except OSError:
            continue
        if done.returncode == 0:
            return python, done.stdout.strip()
    return f"no {module} in {', '.join(Path(p).name for p in interpreters)}: name its Python by --peers-python"


class Peers:
    """All peers that are wanted; started when first needed, and kept.

    Attributes
    ----------
    facts : dict
        For the report: version of each peer, or why it is missing, and the executors that were tried.
    """

    def __init__(self, wanted: Sequence[str], interpreters: Sequence[str], work: Path) -> None:
        self._work = work
        self._python: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}
        self._det: tuple[int, int] | None = None
        self._executors: list[str] = list(EXECUTORS)
        self.facts: dict[str, Any] = {}
        for peer in wanted:
            found = find(peer, interpreters)
            if isinstance(found, str):
                self.facts[peer] = {"missing": found}
            else:
                self._python[peer] = found[0]
                self.facts[peer] = {"version": found[1]}

    def python(self, peer: str) -> str | None:
        """The interpreter that has it."""
        return self._python.get(peer)

    def prepare(self, det: tuple[int, int]) -> None:
        """Masks of this shape; workers that hold others are ended."""
        if det == self._det:
            return
        self.close()
        self._det = det

    def libertem(self, path: Path, recipe: str, truth: dict[str, Check]) -> dict[str, Run]:
        """LiberTEM's best executor for a recipe and a file, warm, as a contestant.

        All are tried on the first file, and from then on the two that were fastest there.
        """
        request = {"path": str(path), "kind": "npy" if path.suffix == ".npy" else "hdf5", "recipe": recipe}
        if self.python("libertem") is None:
            return {}
        tried = self._try(request, truth)
        self.facts["libertem"].setdefault("seconds_of_executors", {})[f"{path.name}, {recipe}"] = tried
        order = [n for _, n in sorted((s, n) for n, s in tried.items() if isinstance(s, float))]
        if not order:
            return {}
        self._executors = order[:2]
        return {NAMES["libertem"]: self._asking("libertem", order[0], request, truth)}

    def _try(self, request: dict[str, Any], truth: dict[str, Check]) -> dict[str, float | str]:
        """Seconds of each executor that is still in question, the better of two runs, or why it has none."""
        tried: dict[str, float | str] = {}
        for executor in self._executors:
            run = self._asking("libertem", executor, request, truth)
            try:
                tried[executor] = round(min(run()[0], run()[0]), 3)
            except Broken as error:
                tried[executor] = str(error)
        return tried

    def other(self, peer: str, path: Path, recipe: str, truth: dict[str, Check], **facts: Any) -> dict[str, Run]:
        """Another peer as a contestant; nothing where it is missing or can't."""
        if self.python(peer) is None:
            return {}
        run = self._asking(peer, "", {"path": str(path), "recipe": recipe, **facts}, truth)
        try:
            run()
        except Broken as error:
            self.facts[peer][f"{path.name}, {recipe}"] = str(error)
            return {}
        return {NAMES[peer]: run}

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _asking(self, peer: str, how: str, request: dict[str, Any], truth: dict[str, Check]) -> Run:
        def run() -> tuple[float, float | None]:
            worker = self._worker(peer, how)
            used = cpu_of(worker.pid)
            answer = worker.ask(**request)
            cpu = cpu_of(worker.pid) - used
            check(f"{NAMES[peer]} {how}", answer["checks"], truth, relative=CLOSE)
            # what it did beside the part that is timed is little: digests
            return answer["seconds"], cpu

        return run

    def _worker(self, peer: str, how: str) -> Worker:
        name = f"{peer} {how}"
        if name not in self._workers:
            module = "peer_libertem" if peer == "libertem" else "peer_arrays"
            arrays = [str(self._work / f"{n}.npy") for n in ("masks", "rings")]
            command = [self._python[peer], "-m", f"benchmarks._reduce.{module}", how or peer, *arrays]
            self._workers[name] = Worker(command, environment(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore"))
        return self._workers[name]


def check(who: str, found: dict[str, Check], truth: dict[str, Check], *, relative: float) -> None:
    """Raise `RuntimeError` where a digest is not that of the truth."""
    for name, one in found.items():
        wrong = differs(one, truth[name], relative=relative)
        if wrong is not None:
            raise RuntimeError(f"{who}: {name}: {wrong}")


def cpu_of(pid: int) -> float:
    """CPU seconds that a process and its living descendants have used so far."""
    tick, parents, used = os.sysconf("SC_CLK_TCK"), {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick
    family = {pid}
    grown = 0
    while grown != len(family):
        grown = len(family)
        family |= {p for p, parent in parents.items() if parent in family}
    return sum(used.get(p, 0.0) for p in family)


def timed(command: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, str]:
    """Wall seconds of a whole process and what it printed; `Broken` where it fails."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env or environment())
    seconds = time.perf_counter() - begin
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Broken(f"{' '.join(command[:4])} ended with {done.returncode}: {last}")
    return seconds, done.stdout
