"""Run one benchmark: ``python -m benchmarks NAME [--out FILE] [options]``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks
from benchmarks import machine

NOT_BENCHMARKS = frozenset({"__main__", "cluster", "machine"})


def names() -> tuple[str, ...]:
    """Modules of this package that have ``add_arguments(parser)`` and ``main(args) -> dict``; none is imported."""
    found = (m.name for m in pkgutil.iter_modules(benchmarks.__path__))
    return tuple(sorted(n for n in found if n not in NOT_BENCHMARKS and not n.startswith("_")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Import the one that is asked for, run it, and print its figures."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    first = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__)
    first.add_argument("name", choices=names())
    name = first.parse_args(given[:1]).name
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=module.__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    parser.add_argument("--work", type=Path, default=Path(), help="folder whose disk is used (default: here)")
    module.add_arguments(parser)
    args = parser.parse_args(given[1:])
    if not args.work.is_dir():
        parser.error(f"--work {args.work} is not a folder")
    before = machine.facts(args.work)
    start = time.monotonic()
    figures = module.main(args)
    took_s = time.monotonic() - start
    report = {"benchmark": name, "machine": before, "took_s": round(took_s, 3), "figures": figures}
    text = json.dumps(report, indent=2, sort_keys=False) + "\n"
    sys.stdout.write(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
