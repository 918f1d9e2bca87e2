"""What all rows share: the folder, the limit, the kernels kept warm, the peers, and how they become contestants."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._reduce import recipes, sets
from benchmarks._reduce.checks import Check
from benchmarks._reduce.limit import Limit, read_all, words
from benchmarks._reduce.peers import Peers, check
from benchmarks._reduce.pipes import Worker, environment
from benchmarks._reduce.rows import Run

NPY = "mpi_kernels.formats.npy:Npy"
HDF5 = "mpi_kernels.formats.hdf5:Hdf5"
FLOATS = 1e-6
"""Relative bound on this program's digests where values are floats; integers must be equal to the bit."""


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """A file of a set, with what its contents sum to.

    Attributes
    ----------
    words : int
        Sum of the file's 64-bit words, for the limit.
    """

    path: Path
    scan: sets.Scan
    truth: dict[str, Check]
    words: int

    @property
    def format(self) -> str:
        """The format's plug-in."""
        return NPY if self.path.suffix == ".npy" else HDF5

    @property
    def plain(self) -> bool:
        """Whether its bytes are those of the frames."""
        return self.path.stat().st_size >= self.scan.nbytes


@dataclass(slots=True, eq=False)
class Bench:
    """One run of the benchmark.

    Attributes
    ----------
    work : Path
        An empty folder on the disk that is measured.
    gigabytes : float
        Size (1e9 bytes, uncompressed) of the sets.
    rounds : int
    threads : int
        Of the kernels and of the limit, where a row says nothing else.
    methods, passes : dict
        By row: how the kernels did it, and the seconds of each run without opening and finishing.
    """

    work: Path
    peers: Peers
    gigabytes: float
    rounds: int
    quick: bool = False
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    limit_: Limit = field(init=False)
    worker: Worker = field(init=False)
    methods: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, list[float]] = field(default_factory=dict)
    _kept: Path | None = None
    _sets: dict[tuple[str, float], tuple[sets.Scan, dict[str, Check]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limit_ = Limit(self.work)
        self.worker = Worker([sys.executable, "-m", "benchmarks._reduce.ours"], environment())

    def close(self) -> None:
        """End all processes."""
        self.worker.close()
        self.limit_.close()
        self.peers.close()

    @contextmanager
    def file(self, name: str, container: str = "npy", *, share: float = 1.0, **how: Any) -> Iterator[File]:
        """A set in a file that is there as long as the context; how it is chunked and compressed for HDF5.

        Set A as .npy is kept for those who want it later.
        """
        size = self.gigabytes * share
        if (name, size) not in self._sets:
            self._sets.clear()
            scan = sets.make(name, size)
            self._sets[name, size] = scan, sets.truth(scan)
        scan, truth = self._sets[name, size]
        title = "-".join([name, f"{scan.nbytes >> 20}MiB", *map(str, how.values())])
        path = self.work / f"{title}.{'npy' if container == 'npy' else 'h5'}"
        if path != self._kept:
            if container == "npy":
                sets.npy(scan, path)
            else:
                sets.hdf5(scan, path, **how)
        det = scan.shape[2], scan.shape[3]
        np.save(self.work / "masks.npy", recipes.masks(det))
        np.save(self.work / "rings.npy", recipes.rings(det))
        self.peers.prepare(det)
        try:
            yield File(path, scan, truth, words(path))
        finally:
            if (name, container, share) == ("A", "npy", 1.0):
                self._kept = path
            else:
                path.unlink()

    def warm(self, file: File) -> None:
        """Read a file unless all of it is in the page cache."""
        if not self.limit_.resident(file.path) >= 1:
            read_all(file.path)

    def ours(self, file: File, recipe: str, note: str = "", **method: Any) -> Run:
        """The kernels, kept warm, as a contestant."""
        how = {"threads": self.threads, **method}
        request = {"path": str(file.path), "format": file.format, "recipe": recipe, "method": how}

        def run() -> tuple[float, float | None]:
            answer = self.worker.ask(**request)
            check(f"the kernels on {file.path.name}", answer["checks"], file.truth, relative=self._bound(file))
            steps = answer["steps"]
            self.methods[note] = {"method": answer["method"], "steps_s": {k: round(v, 5) for k, v in steps.items()}}
            self.passes.setdefault(note, []).append(steps["read"] + steps["reduce"] + steps["merge"])
            return answer["seconds"], answer["cpu_s"]

        return run

    def limit(self, file: File, threads: int | None = None) -> Run:
        """The limit as a contestant."""
        return lambda: self.limit_.seconds(file.path, threads or self.threads, file.words)

    @staticmethod
    def _bound(file: File) -> float:
        return FLOATS if file.scan.groups.dtype.kind == "f" else 0.0


def chosen(groups: dict[str, Any], wanted: Sequence[str] | None) -> list[str]:
    """Names of groups of rows, in order; all if none is named."""
    return [name for name in groups if not wanted or name in wanted]
