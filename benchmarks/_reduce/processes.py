"""Figures of whole processes: from the command to the result on the disk, ranks, memory, start."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._reduce.bench import NPY, Bench, File
from benchmarks._reduce.duels import LIBERTEM
from benchmarks._reduce.peers import EXECUTORS, timed
from benchmarks._reduce.pipes import ROOT, Broken, environment
from benchmarks._reduce.recipes import RECIPES
from benchmarks._reduce.rows import OURS, Asked, Run, duel, figure
from benchmarks._reduce.sets import sparse
from mpi_kernels import jsonfile
from mpi_kernels.contract import JobSpec, Method, Recipe, ReductionSpec, SourceSpec

JOB = "0123456789abcdef-01"
START = """
import sys, time
begin = time.perf_counter()
from mpi_kernels.contract import Recipe, ReductionSpec
from mpi_kernels import plan
from mpi_kernels.engine import Visit
from mpi_kernels.plugins import make_format
from mpi_kernels.ranks import Ranks
source = make_format(sys.argv[1]).open(sys.argv[2])
use = "mpi_kernels.reductions.pattern:Pattern"
recipe = Recipe(name="first", reductions=(ReductionSpec(use=use, name="pattern", parameters={"variance": False}),))
visit = Visit(plan.make(recipe, source.header), source, Ranks())
visit.add(0, min(32, source.header.frames))
print(time.perf_counter() - begin, "h5py" in sys.modules)
"""
"""What a rank does until its first block of 32 frames is reduced."""


def job(folder: Path, source: Path, form: str, reductions: tuple[ReductionSpec, ...], **facts: Any) -> Path:
    """A run folder with its job."""
    folder.mkdir(parents=True)
    spec = JobSpec(
        job=JOB,
        acquisition=JOB.partition("-")[0],
        trace="benchmark",
        recipe=Recipe(name="fused", reductions=reductions),
        source=SourceSpec(path=str(source), format=form),
        **facts,
    )
    jsonfile.publish(folder / "job.json", jsonfile.encode(spec))
    return folder


def command(folder: Path, ranks: int = 1) -> list[str]:
    """The kernels as a scheduler starts them."""
    own = [sys.executable, "-m", "mpi_kernels", str(folder)]
    if ranks == 1:
        return own
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise Broken("no mpiexec: pip install mpich")
    return [mpiexec, "-n", str(ranks), *own]


class Jobs:
    """Whole jobs on a file, each in a folder of its own."""

    def __init__(self, bench: Bench, file: File) -> None:
        self._bench, self._file, self._made = bench, file, 0
        self.seconds: dict[str, list[dict[str, float]]] = {}

    def contestant(self, name: str, ranks: int, threads: int, *, kernel_only: bool = False) -> Run:
        """A job; its wall time, or only what its manifest says about reading, reducing and merging."""

        def run() -> tuple[float, float | None]:
            self._made += 1
            folder = self._bench.work / f"job-{self._made}" / "01"
            method = Method(threads=threads)
            job(folder, self._file.path, self._file.format, RECIPES["fused"], ranks=ranks, method=method)
            try:
                wall, _ = timed(command(folder, ranks))
                manifest = json.loads((folder / "result.json").read_text())
                self._check(manifest)
            finally:
                shutil.rmtree(folder.parent)
            steps = manifest["seconds"]
            self.seconds.setdefault(name, []).append(steps)
            return (sum(steps[k] for k in ("read", "reduce", "merge")) if kernel_only else wall), None

        return run

    def _check(self, manifest: dict[str, Any]) -> None:
        found, scan = manifest["scalars"]["pattern"]["total"], self._file.scan
        times = [int((scan.order == g).sum()) for g in range(len(scan.groups))]
        wanted = sum(t * int(g.sum(dtype="u8")) for t, g in zip(times, scan.groups, strict=True))
        if found != wanted or manifest["frames"] != scan.shape[0] * scan.shape[1]:
            raise RuntimeError(f"the job sums to {found}, not {wanted}")

    def steps(self, name: str) -> dict[str, float]:
        """Median of each step in the manifests."""
        given = self.seconds[name]
        return {k: round(statistics.median(one[k] for one in given), 4) for k in given[0]}


def whole(bench: Bench) -> Iterator[dict[str, Any]]:
    """Processes on the file of full size: whole time, and ranks against threads."""
    with bench.file("A") as file:
        jobs = Jobs(bench, file)
        contestants: dict[str, Run] = {OURS: jobs.contestant("whole", 1, bench.threads), **_libertem(bench, file)}
        times = duel(contestants, min(3, bench.rounds), prepare=lambda: bench.warm(file))
        peers = [n for n in times.wall if n != OURS]
        best = min(peers, key=times.median) if peers else ""
        figures: dict[str, float | None] = {f"{n}, s": times.median(n) for n in times.wall}
        figures[f"{OURS}, fastest, s"] = min(times.wall[OURS])
        figures[f"times as fast as {LIBERTEM}"] = times.ratio(best)
        asked = [Asked(f"{OURS}, s", 0.35, "at most"), Asked(f"times as fast as {LIBERTEM}", 10)]
        yield figure("whole process, results written", figures, asked, steps_s=jobs.steps("whole"))
        yield ranks(bench, file, jobs)


def _libertem(bench: Bench, file: File) -> dict[str, Run]:
    """LiberTEM's whole process with each executor that starts fast."""
    python = bench.peers.python("libertem")
    found: dict[str, Run] = {}
    for executor in EXECUTORS[:2] if python else ():
        arguments = [executor, *(str(bench.work / f"{n}.npy") for n in ("masks", "rings"))]
        line = [str(python), "-m", "benchmarks._reduce.peer_libertem", *arguments, str(file.path)]
        line.append(str(bench.work / "libertem.npz"))
        env = environment(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
        found[f"{LIBERTEM} {executor}"] = partial(_whole, line, env)
    return found


def _whole(line: list[str], env: dict[str, str]) -> tuple[float, float | None]:
    return timed(line, env)[0], None


def ranks(bench: Bench, file: File, jobs: Jobs) -> dict[str, Any]:
    """Two ranks of one thread against one rank of two threads: reading, reducing and merging of cold processes."""
    name = "2 ranks of 1 thread"
    contestants = {
        name: jobs.contestant(name, 2, 1, kernel_only=True),
        "1 rank of 2 threads": jobs.contestant("1 rank of 2 threads", 1, 2, kernel_only=True),
    }
    try:
        times = duel(contestants, bench.rounds, prepare=lambda: bench.warm(file), watch="1 rank of 2 threads")
    except Broken as error:
        return figure("2 ranks", {"ratio": None}, [Asked("ratio", 0.9)], why=str(error))
    size = file.scan.nbytes
    figures = {f"{n}, GB/s": size / times.median(n) / 1e9 for n in contestants}
    ratio = times.ratio("1 rank of 2 threads", name)
    steps = {n: jobs.steps(n) for n in contestants}
    return figure("2 ranks", figures | {"ratio": ratio}, [Asked("ratio", 0.9)], steps_s=steps)


def start(bench: Bench) -> Iterator[dict[str, Any]]:
    """A rank's start as a new process and in one that is warm, and what importing takes."""
    small = bench.gigabytes if bench.quick else 0.002
    with bench.file("A", share=small / bench.gigabytes) as file:
        line = [sys.executable, "-c", START, NPY, str(file.path)]
        for _ in range(3):
            bench.ours(file, "fused", "start")()
        cold, inside, warm = [], [], []
        for _ in range(3 * bench.rounds):
            wall, told = timed(line)
            cold.append(wall)
            inside.append(float(told.split()[0]))
            if told.split()[1] != "False":
                raise RuntimeError("h5py is loaded for a file that is no HDF5")
            warm.append(bench.ours(file, "fused", "start")()[0])
        figures = {
            "new process, s": statistics.median(cold),
            "new process, imports to first block, s": statistics.median(inside),
            "warm process, whole small job, ms": 1e3 * statistics.median(warm),
        }
        asked = [Asked("new process, s", 0.35, "at most"), Asked("warm process, whole small job, ms", 5, "at most")]
        facts = {"frames": file.scan.shape[0] * file.scan.shape[1], "slowest_imports_ms": imports(line)}
        yield figure("start of a rank", figures, asked, steps_s=bench.methods["start"]["steps_s"], **facts)


def imports(line: list[str], most: int = 8) -> dict[str, float]:
    """What `-X importtime` says the slowest modules take themselves, in ms."""
    done = subprocess.run(
        [line[0], "-X", "importtime", *line[1:]],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        cwd=ROOT,
    )
    found: dict[str, float] = {}
    for told in done.stderr.splitlines():
        parts = told.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdecimal():
            found[parts[2].strip()] = int(parts[0]) / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1])[:most])


def memory(bench: Bench) -> Iterator[dict[str, Any]]:
    """Anonymous memory of a rank, its largest over a job, by the size of the file; one is not cached."""
    figures: dict[str, float | None] = {}
    above: list[float] = []

    def add(name: str, path: Path) -> None:
        folder = job(bench.work / "memory" / "01", path, NPY, RECIPES["fused"])
        found = peak(command(folder)) / 2**20
        figures[f"{name}, MiB"] = found
        above.append(found - (folder / "result.h5").stat().st_size / 2**20)
        shutil.rmtree(folder.parent)

    for share in (1 / 16, 1):
        with bench.file("A", share=share) as file:
            add(f"{file.path.stat().st_size >> 20} MiB", file.path)
    gib = 0.05 if bench.quick else 16
    path = sparse(bench.work / "zeros.npy", gib)
    add(f"{gib} GiB, not cached", path)
    path.unlink()
    figures["above the outputs, MiB"] = max(above)
    yield figure("anonymous memory of a rank", figures, [Asked("above the outputs, MiB", 64, "at most")])


def peak(line: list[str]) -> float:
    """Largest anonymous memory of a process in bytes, looked at every millisecond."""
    process = subprocess.Popen(line, env=environment(), cwd=ROOT)
    status, most = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        for told in status.read_text().splitlines():
            if told.startswith("RssAnon:"):
                most = max(most, int(told.split()[1]) * 1024)
        time.sleep(0.001)
    if process.returncode:
        raise Broken(f"{' '.join(line)} ended with {process.returncode}")
    return most
