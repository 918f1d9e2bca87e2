"""Files that are not in the page cache, against dd past it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._reduce.bench import Bench, File
from benchmarks._reduce.duels import fought
from benchmarks._reduce.rows import OURS, Asked, Run

DD = "dd, O_DIRECT"
CACHED_AT_MOST = 0.01


def cold(bench: Bench) -> Iterator[dict[str, Any]]:
    """The fused recipe, one process at a time."""
    with bench.file("A") as file:
        yield _row(bench, file, "cold raw uint16, fused")
    with bench.file("A", "hdf5", chunk=1, codec="bitshuffle-lz4") as file:
        yield _row(bench, file, "cold bitshuffle-LZ4, fused", [])


def _row(bench: Bench, file: File, name: str, asked: list[Asked] | None = None) -> dict[str, Any]:
    contestants: dict[str, Run] = {
        OURS: _from_disk(bench, file, bench.ours(file, "fused", name)),
        DD: _from_disk(bench, file, lambda: (dd(file.path), None)),
        **{n: _from_disk(bench, file, r) for n, r in bench.peers.libertem(file.path, "fused", file.truth).items()},
    }
    return fought(bench, file, name, contestants, [Asked(DD, 0.85)] if asked is None else asked, warm=False)


def _from_disk(bench: Bench, file: File, run: Run) -> Run:
    def cold_run() -> tuple[float, float | None]:
        drop(file.path)
        cached = bench.limit_.resident(file.path)
        if cached > CACHED_AT_MOST:
            raise RuntimeError(f"{100 * cached:.0f} % of {file.path.name} stay in the page cache")
        return run()

    return cold_run


def drop(path: Path) -> None:
    """Take a file's pages out of the cache; what is not yet on the disk is written first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(path: Path) -> float:
    """Seconds as dd itself tells them: starting it takes none."""
    program = shutil.which("dd")
    if program is None:
        raise RuntimeError("no dd")
    line = [program, f"if={path}", "of=/dev/null", "bs=8M", "iflag=direct"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env={"LC_ALL": "C"})
    told = re.search(r"copied, ([0-9.e+-]+) s", done.stderr)
    if told is None:
        raise RuntimeError(f"dd says {done.stderr!r}")
    return float(told[1])
