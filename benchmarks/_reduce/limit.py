"""The limit: bytes of the page cache mapped and added up by a C program, with as many threads as the kernels have."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks._reduce.pipes import Broken, Worker

SOURCE = Path(__file__).with_name("limit.c")
FLAGS = ("-O3", "-march=native", "-pthread")

NUMPY = """
import sys, time, numpy
for line in sys.stdin:
    path = line.rstrip("\\n").split(" ", 2)[2]
    begin, used = time.perf_counter(), time.process_time()
    data = numpy.memmap(path, numpy.uint8, "r")
    words, total = data[: len(data) // 8 * 8].view(numpy.uint64), 0
    for at in range(0, len(words), 1 << 18):
        total += int(words[at : at + (1 << 18)].sum())
    print(time.perf_counter() - begin, time.process_time() - used, total % 2**64, flush=True)
"""
"""Where there is no compiler: one thread, whatever is asked for, and slower."""


class Limit:
    """The program, compiled for this machine and kept running.

    Attributes
    ----------
    how : str
        What the limit is here.
    compiled : bool
    """

    def __init__(self, work: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        program = work / "limit"
        self.compiled = compiler is not None
        if compiler is None:
            self.how = "numpy sum over a map, 1 thread (no C compiler was found)"
            self._worker = Worker([sys.executable, "-c", NUMPY])
            return
        subprocess.run([compiler, *FLAGS, "-o", program, SOURCE], check=True, capture_output=True)
        self.how = f"{SOURCE.name}, {' '.join(FLAGS)}: map and sum of 64-bit words"
        self._worker = Worker([str(program)])

    def seconds(self, path: Path, threads: int, wanted: int) -> tuple[float, float]:
        """Wall and CPU seconds for a file; `RuntimeError` where its words sum to anything else than ``wanted``."""
        wall, cpu, total = self._ask(f"sum {threads} {path}")
        if int(total) != wanted:
            raise RuntimeError(f"the limit sums {path.name} to {total}, not {wanted}")
        return float(wall), float(cpu)

    def resident(self, path: Path) -> float:
        """Share of a file that is in the page cache; NaN where that can't be told."""
        if not self.compiled:
            return float("nan")
        found, pages = self._ask(f"resident {path}")
        return int(found) / int(pages)

    def close(self) -> None:
        """End the program."""
        self._worker.close()

    def _ask(self, request: str) -> list[str]:
        answer = self._worker.line(request).split()
        if answer[0] == "error":
            raise Broken(f"the limit: {' '.join(answer[1:])}")
        return answer


def words(path: Path) -> int:
    """Sum of a file's whole 64-bit words modulo 2**64, by numpy."""
    data = np.memmap(path, np.uint8, "r")
    whole = data[: len(data) // 8 * 8].view(np.uint64)
    return sum(int(whole[at : at + (1 << 22)].sum()) for at in range(0, len(whole), 1 << 22)) % 2**64


def read_all(path: Path) -> float:
    """Read a file, so that it is in the page cache; seconds."""
    begin, buffer = time.perf_counter(), bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin
