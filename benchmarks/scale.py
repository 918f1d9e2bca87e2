"""Many tiny acquisitions through the whole service with the null scheduler, and moves of the journal alone.

The cost of one acquisition must not grow with how many there are already: the figure is the time of each slice of the
run, and the ratio of the last slice to the first.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from emflow.config import load
from emflow.journal import Journal
from emflow.pipeline import open_pipeline
from emflow.records import Acquisition, AcquisitionState, Fingerprint, acquisition_id

CONFIGURATION = """\
[[watch]]
root = "share"
recipe = "quick"

[scan]
active_s = 0.05
settle_s = 0.05

[transfer]
min_free = "64 MiB"

[scheduler]
use = "null"
ranks = 1
"""
FOLDERS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--acquisitions", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--slices", type=int, default=10, help="parts of the run that are timed (default %(default)s)")
    parser.add_argument("--moves", type=int, default=2_000, help="moves of the journal alone (default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    """Per-acquisition cost by slice, and journal moves per second."""
    with tempfile.TemporaryDirectory(dir=args.work, prefix="emflow-scale-") as folder:
        moves = journal_moves(Path(folder) / "moves.sqlite", args.moves)
        return {"journal_moves_per_s": round(moves), **through_the_service(Path(folder), args)}


def journal_moves(path: Path, count: int) -> float:
    """Moves per second, each committed on its own with synchronous=FULL."""
    with Journal(path) as journal:
        with journal.transaction():
            for n in range(count):
                journal.add_acquisition(_acquisition(n))
        begin = time.perf_counter()
        for n in range(count):
            journal.move_acquisition(
                _acquisition(n).id, AcquisitionState.GROWING, AcquisitionState.READY, attrs={"format": "npy"}
            )
        return count / (time.perf_counter() - begin)


def _acquisition(n: int) -> Acquisition:
    relpath = f"{n}.npy".encode()
    return Acquisition(
        id=acquisition_id("bench", relpath, 0),
        share="bench",
        relpath=relpath,
        generation=0,
        state=AcquisitionState.GROWING,
        day="2026-01-01",
        trace="bench",
        seen_ns=0,
        changed_ns=0,
        fingerprint=Fingerprint(size=n, mtime_ns=0, ctime_ns=0),
    )


def through_the_service(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Write all files, then run the service until each has its result; time each slice of finished ones."""
    write_files(folder / "share", args.acquisitions)
    toml = folder / "emflow.toml"
    toml.write_text(CONFIGURATION, encoding="utf-8")
    bounds = [args.acquisitions * n // args.slices for n in range(1, args.slices + 1)]
    with open_pipeline(load(toml)) as pipeline:
        begin = time.perf_counter()
        marks = [begin]
        noticed_s = 0.0
        for bound in bounds:
            while (done := _done(pipeline.context.journal)) < bound:
                pipeline.turn()
                noticed_s = noticed_s or time.perf_counter() - begin
            marks.append(time.perf_counter())
        results = len(list((folder / "results").glob("*_emflow.h5")))
    if results != args.acquisitions or done != args.acquisitions:
        raise RuntimeError(f"{results} results of {args.acquisitions} acquisitions")
    sizes = np.diff([0, *bounds])
    per_ms = [1e3 * (b - a) / n for (a, b), n in zip(itertools.pairwise(marks), sizes, strict=True)]
    return {
        "acquisitions": args.acquisitions,
        "first_turn_s": round(noticed_s, 3),
        "total_s": round(marks[-1] - begin, 1),
        "per_acquisition_ms_by_slice": [round(value, 2) for value in per_ms],
        "last_to_second_slice": round(per_ms[-1] / per_ms[1], 3) if len(per_ms) > 1 else None,
        "memory_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _done(journal: Journal) -> int:
    return journal.counts()[0][AcquisitionState.DONE]


def write_files(share: Path, count: int) -> None:
    """Tiny 4D scans, 100 folders of them."""
    for n in range(FOLDERS):
        (share / f"{n:02d}").mkdir(parents=True)
    for n in range(count):
        np.save(share / f"{n % FOLDERS:02d}" / f"{n:05d}.npy", np.full((2, 3, 4, 5), n % 251, np.uint8))
