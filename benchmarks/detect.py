"""Notice latency: from the writer's close in another process to the sighting, and to the row in the journal.

A component benchmark: the service's own scanner, hints and journal in a loop, nothing else.  Both processes read
CLOCK_MONOTONIC, which is one clock for the whole host.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.machine import summary
from emflow.journal import Journal
from emflow.records import Acquisition, AcquisitionState, acquisition_id
from emflow.watch.hints import choose
from emflow.watch.scan import Scanner, Sighting

WRITER = """
import json, pathlib, random, sys, time
folder, count, mean_s, size = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
folder.mkdir(exist_ok=True)
random.seed(1)
closed = {}
for number in range(count):
    time.sleep(random.uniform(0, 2 * mean_s))
    with (folder / f"{number}.mib").open("wb") as file:
        file.write(b"x" * size)
    closed[f"{folder.name}/{number}.mib"] = time.monotonic_ns()
print(json.dumps(closed))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=int, default=300, help="files per mode (default %(default)s)")
    parser.add_argument("--bytes", type=int, default=4096, help="bytes per file (default %(default)s)")
    parser.add_argument("--interval", type=float, default=0.02, help="mean seconds between files (default %(default)s)")
    parser.add_argument("--known", type=int, default=0, help="files that lie there before (default %(default)s)")
    parser.add_argument(
        "--recent", type=float, default=0.5, help="pace in seconds with scans only (default %(default)s)"
    )


def main(args: argparse.Namespace) -> dict[str, object]:
    """Latencies with inotify and with scans only."""
    return {
        "inotify": _mode(args, "inotify", recent_s=3.0),
        "scans only": _mode(args, "none", recent_s=args.recent),
        "files": args.files,
        "known_files": args.known,
        "scan_period_s": args.recent,
    }


@dataclass(slots=True)
class _Seen:
    journal: Journal
    sighted: dict[str, int] = field(default_factory=dict)
    journalled: dict[str, int] = field(default_factory=dict)

    def add(self, sightings: list[Sighting]) -> None:
        """Note when a file was seen with its bytes, and journal what is new, as the service does."""
        now = time.monotonic_ns()
        for sighting in sightings:
            if sighting.fingerprint.size:
                self.sighted[sighting.relpath.decode()] = now
        new = [s for s in sightings if self.journal.latest("share", s.relpath) is None]
        with self.journal.transaction():
            for sighting in new:
                self.journal.add_acquisition(_acquisition(sighting), attrs={})
        now = time.monotonic_ns()
        self.journalled.update((s.relpath.decode(), now) for s in sightings if s.fingerprint.size)


def _mode(args: argparse.Namespace, setting: Literal["inotify", "none"], recent_s: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="emflow-detect-", dir=args.work) as name:
        share = Path(name) / "share"
        (share / "day").mkdir(parents=True)
        for number in range(args.known):
            (share / "day" / f"known{number}.mib").write_bytes(b"x")
        with Journal(Path(name) / "journal.sqlite") as journal:
            seen = _Seen(journal)
            closed = _watch(args, share, setting, recent_s, seen)
    sighting = [(seen.sighted[path] - at) / 1e9 for path, at in closed.items() if path in seen.sighted]
    row = [(seen.journalled[path] - at) / 1e9 for path, at in closed.items() if path in seen.journalled]
    return {"sighting": summary(sighting), "journal_row": summary(row), "lost": len(closed) - len(sighting)}


def _watch(
    args: argparse.Namespace, share: Path, setting: Literal["inotify", "none"], recent_s: float, seen: _Seen
) -> dict[str, int]:
    """Run the loop until the writer is done and a last scan of everything found nothing more."""
    scanner = Scanner(share, match=["*.mib"], recent_s=recent_s)
    hints = choose(share, setting)
    hints.arm()
    scanner.live_hints = hints.live
    scanner.scan()
    scanner.mark(hints.wait(0))
    arguments = [str(share / "day"), str(args.files), str(args.interval), str(args.bytes)]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE)
    after_end = None
    while after_end is None or time.monotonic() < after_end:
        wait_s = max(0.0, min(0.25, scanner.next_due() - time.monotonic()))
        scanner.mark(hints.wait(wait_s), hints.closed())
        if scanner.next_due() <= time.monotonic():
            seen.add(scanner.scan())
        if after_end is None and writer.poll() is not None:
            after_end = time.monotonic() + recent_s + 0.5
    hints.close()
    assert writer.stdout is not None
    with writer.stdout as pipe:
        closed: dict[str, int] = json.load(pipe)
    return closed


def _acquisition(sighting: Sighting) -> Acquisition:
    key = acquisition_id("share", sighting.relpath, 0)
    now = time.time_ns()
    return Acquisition(
        id=key,
        share="share",
        relpath=sighting.relpath,
        generation=0,
        state=AcquisitionState.GROWING,
        day="1970-01-01",
        trace=key,
        seen_ns=now,
        changed_ns=now,
        fingerprint=sighting.fingerprint,
    )
