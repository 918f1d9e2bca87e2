"""Throughput, start, memory and growth of the kernels, against the machine's limits and other programs.

All that a row compares runs in the same rounds, in an order drawn anew for each; figures are medians over the rounds,
and ratios those of paired rounds.  A result that is not the right one ends the run.  A table goes to stderr as it is
found.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._reduce import cold, duels, growing, growth, processes
from benchmarks._reduce.bench import Bench, chosen
from benchmarks._reduce.peers import MODULES, Peers, pythons

GROUPS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "raw": duels.raw,
    "hdf5": duels.hdf5,
    "compressed": duels.compressed,
    "slow": duels.slow_peers,
    "cold": cold.cold,
    "whole": processes.whole,
    "memory": processes.memory,
    "start": processes.start,
    "growing": growing.growing,
}
QUICK_GIGABYTES = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    every = [*GROUPS, "growth"]
    parser.add_argument("--gigabytes", type=float, default=2.147, help="size of a set (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a row (default %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=every, metavar="GROUP", help=f"only some of {', '.join(every)}")
    parser.add_argument("--peers", default="", help=f"other programs, with commas: {', '.join(MODULES)}, or all")
    parser.add_argument(
        "--peers-python", nargs="+", metavar="PYTHON", help="where they are installed (default: EMFLOW_PEERS_PYTHON)"
    )
    parser.add_argument("--plot", type=Path, help="draw the growth into this .png file")
    parser.add_argument("--quick", action="store_true", help="small sets, 2 rounds, nothing cold: whether it works")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="gpu: the figures of `gpu` instead")


def main(args: argparse.Namespace) -> dict[str, object]:
    """All rows, what was missed, and how it was measured."""
    if args.device == "gpu":
        from benchmarks import gpu

        return gpu.figures(rounds=args.rounds)
    wanted = list(MODULES) if args.peers == "all" else [p for p in args.peers.split(",") if p]
    unknown = sorted(set(wanted) - set(MODULES))
    if unknown:
        raise SystemExit(f"--peers {','.join(unknown)}: known are {', '.join(MODULES)}")
    groups = GROUPS | {"growth": partial(growth.growth, plot=args.plot)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes are not left behind
    names = [n for n in chosen(groups, args.rows) if not (args.quick and n == "cold")]
    with tempfile.TemporaryDirectory(prefix="emflow-reduce-", dir=args.work) as name:
        work = Path(name).absolute()
        peers = Peers(wanted, pythons(args.peers_python), work)
        gigabytes = min(args.gigabytes, QUICK_GIGABYTES) if args.quick else args.gigabytes
        bench = Bench(work, peers, gigabytes, 2 if args.quick else args.rounds, quick=args.quick)
        rows: list[dict[str, Any]] = []
        try:
            for group in names:
                rows += groups[group](bench)
        finally:
            bench.close()
    return report(bench, rows)


def report(bench: Bench, rows: list[dict[str, Any]]) -> dict[str, object]:
    """Rows with the facts that they share."""
    bounds = (
        [] if bench.quick else [(row["row"], asked) for row in rows for asked in row["asked"]]
    )  # too small to judge
    verdicts = {True: "met", False: "missed", None: "not_measured"}
    found: dict[str, list[str]] = {word: [] for word in verdicts.values()}
    for row, asked in bounds:
        found[verdicts[asked["met"]]].append(f"{row}: {asked['of']}")
    print(f"met {len(found['met'])} of {len(bounds)}; missed: {'; '.join(found['missed']) or 'none'}", file=sys.stderr)
    return {
        "limit": bench.limit_.how,
        "threads": bench.threads,
        "gigabytes": bench.gigabytes,
        "rounds": bench.rounds,
        "load_1min_at_the_end": round(os.getloadavg()[0], 2),
        "peers": bench.peers.facts,
        "bounds": found,
        "rows": rows,
    }
