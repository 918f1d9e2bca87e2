"""Staging against ``cp`` and fsync: the same file, source warm, in turn, in shuffled order.

Both are timed until the data are on the disk; ours also digests, checks the source again and syncs the folder.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from emflow.errors import EmflowError
from emflow.transfer import digest_of, stage

ACQUISITION = "0123456789abcdef"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, default=1024, help="size of the file (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; each runs both (default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """Medians and the ratio of speeds."""
    size = args.mib << 20
    with tempfile.TemporaryDirectory(prefix="emflow-transfer-", dir=args.work) as name:
        source, target = Path(name) / "scan.mib", Path(name) / "copy"
        with source.open("wb") as file:
            for _ in range(args.mib):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        wanted = digest_of([(source, b"scan.mib", ".mib")]).digest
        contestants: dict[str, Callable[[], None]] = {
            "cp": lambda: _cp(source, target),
            "stage": lambda: _stage(source, target, wanted),
        }
        seconds = _duel(contestants, source, target, args.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bytes": size,
        "seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "median_GB_per_s": {name: round(size / value / 1e9, 3) for name, value in medians.items()},
        "stage_over_cp": round(medians["cp"] / medians["stage"], 3),
        "stage_over_cp_by_round": round(
            statistics.median(a / b for a, b in zip(seconds["cp"], seconds["stage"], strict=True)), 3
        ),
    }


def _duel(
    contestants: dict[str, Callable[[], None]], source: Path, target: Path, rounds: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in random.sample(list(contestants), len(contestants)):
            target.mkdir()
            os.sync()
            _warm(source)
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
    return seconds


def _cp(source: Path, target: Path) -> None:
    copy = target / "copy"
    subprocess.run(["cp", "--", str(source), str(copy)], check=True)
    fd = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stage(source: Path, target: Path, wanted: str) -> None:
    if stage([(source, b"scan.mib", ".mib")], target, ACQUISITION).digest != wanted:
        raise EmflowError("the copy has another digest than its source")


def _warm(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
