"""Rows: rounds of contestants in turn, what was asked of their ratios, and what was found."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

OURS = "kernels"
DISTURBED = 1.3
"""Where the slowest round of the limit takes so many times the fastest, others were busy: as many rounds again."""

SETTLE_S = 0.2
"""Between two contestants: threads of BLAS, OpenMP and numba spin for a while after their work."""

Run = Callable[[], tuple[float, float | None]]
"""Wall and, where it is known, CPU seconds of one run; raises on a result that is not the right one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A bound: on this program's rate over that of another contestant of the same rounds, or on a figure itself."""

    of: str
    bound: float
    kind: Literal["at least", "at most"] = "at least"

    def judged(self, found: float | None) -> dict[str, Any]:
        """The bound with what was measured; ``met`` is None where nothing was."""
        met = None if found is None else (found >= self.bound if self.kind == "at least" else found <= self.bound)
        shown = None if found is None else float(f"{found:.4g}")
        return {"of": self.of, self.kind: self.bound, "found": shown, "met": met}


@dataclass(slots=True)
class Times:
    """Seconds of each contestant, round by round."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Of wall seconds."""
        return statistics.median(self.wall[name])

    def ratio(self, other: str, ours: str = OURS) -> float | None:
        """How many times as fast as another one: the median over paired rounds; None where either did not run."""
        if other not in self.wall or ours not in self.wall:
            return None
        pairs = zip(self.wall[other], self.wall[ours], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    def cpu_ratio(self, other: str, ours: str = OURS) -> float | None:
        """The same of CPU seconds, which others on the machine disturb less."""
        if not (self.cpu.get(other) and self.cpu.get(ours)):
            return None
        pairs = zip(self.cpu[other], self.cpu[ours], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


def duel(
    contestants: Mapping[str, Run], rounds: int, *, prepare: Callable[[], object], watch: str = "", seed: int = 1
) -> Times:
    """Run each contestant once a round, in an order that is drawn anew, after ``prepare``.

    Parameters
    ----------
    watch : str
        The contestant whose spread tells whether the machine was busy with something else; then there are twice as
        many rounds.
    """
    times, rng = Times(), random.Random(seed)  # noqa: S311  an order, no secret
    most = 2 * rounds if watch else rounds
    while rounds:
        for _ in range(rounds):
            prepare()
            for name in rng.sample(sorted(contestants), len(contestants)):
                time.sleep(SETTLE_S)
                wall, cpu = contestants[name]()
                times.wall.setdefault(name, []).append(wall)
                if cpu is not None:
                    times.cpu.setdefault(name, []).append(cpu)
        done = len(next(iter(times.wall.values())))
        rounds = rounds if done < most and watch in times.wall and spread(times.wall[watch]) > DISTURBED else 0
    return times


def spread(seconds: Sequence[float]) -> float:
    """Slowest over fastest."""
    return max(seconds) / min(seconds)


def rates(name: str, size: int, times: Times, asked: Sequence[Asked], **facts: Any) -> dict[str, Any]:
    """A row of rates: GB/s (1e9) of uncompressed frames, ratios of paired rounds, and each bound with its verdict."""
    found: dict[str, Any] = {
        "row": name,
        "gigabytes_per_second": {n: rounded(size / times.median(n) / 1e9) for n in sorted(times.wall)},
        "times_as_fast_as": {n: rounded(times.ratio(n)) for n in sorted(times.wall) if n != OURS},
        "cpu_s_per_gigabyte": {n: rounded(statistics.median(v) / size * 1e9) for n, v in sorted(times.cpu.items())},
        "asked": [a.judged(times.ratio(a.of)) for a in asked],
        "rounds": len(next(iter(times.wall.values()))),
        "spread": {n: rounded(spread(v)) for n, v in sorted(times.wall.items())},
        "load_1min": round(os.getloadavg()[0], 2),
        **facts,
    }
    by_cpu = {n: rounded(times.cpu_ratio(n)) for n in sorted(times.cpu) if n != OURS}
    if by_cpu:
        found["times_as_fast_by_cpu"] = by_cpu
    tell(found)
    return found


def figure(name: str, figures: Mapping[str, float | None], asked: Sequence[Asked], **facts: Any) -> dict[str, Any]:
    """A row of figures of any kind; a bound is ``of`` one of them."""
    found = {
        "row": name,
        "figures": {n: rounded(v) for n, v in figures.items()},
        "asked": [a.judged(figures.get(a.of)) for a in asked],
        "load_1min": round(os.getloadavg()[0], 2),
        **facts,
    }
    tell(found)
    return found


def rounded(value: float | None) -> float | None:
    """Four digits."""
    return None if value is None else float(f"{value:.4g}")


def tell(row: Mapping[str, Any]) -> None:
    """One row of the table, as it is found."""
    values = row.get("gigabytes_per_second", row.get("figures", {}))
    shown = ", ".join(f"{n} {v:g}" for n, v in values.items() if v is not None)
    unit = " GB/s" if "gigabytes_per_second" in row else ""
    print(f"{row['row']:34s} {shown}{unit}", file=sys.stderr)
    for asked in row["asked"]:
        kind = "at least" if "at least" in asked else "at most"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[asked["met"]]
        print(f"{'':34s}   {asked['of']}: {asked['found']} ({kind} {asked[kind]}): {verdict}", file=sys.stderr)
    sys.stderr.flush()
