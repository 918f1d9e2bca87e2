"""What squeue, sacct and scontrol print of jobs, as rows.

No ``--json``: 22.05 ignores ``-j`` with it and 25.11 hides finished jobs.  ``-o`` with the one field of free text at
the end is the same from 20.11 to 26.05.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SQUEUE_FORMAT = "%i|%j|%T|%D|%M|%B|%r"
SACCT_FORMAT = "JobIDRaw,JobName,State,NNodes,ElapsedRaw,NodeList"


class Row(NamedTuple):
    """One job, as squeue or sacct lists it; ``reason`` is Slurm's own word."""

    id: str
    name: str
    state: str
    nodes: int
    elapsed_s: float
    node: str = ""
    reason: str = ""


def parse_squeue(text: str) -> Iterator[Row]:
    """Jobs in what ``squeue -o`` of `SQUEUE_FORMAT` printed; what is not one job (a task of an array) is left out."""
    for line in text.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7 and fields[0].isascii() and fields[0].isdigit():
            job, name, state, nodes, elapsed, node, reason = fields
            yield Row(job, name, state, _count(nodes), seconds(elapsed), node.replace("n/a", ""), reason.strip())


def parse_sacct(text: str) -> Iterator[Row]:
    """Jobs in what ``sacct -n -P -X`` of `SACCT_FORMAT` printed."""
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 6 and fields[0].isascii() and fields[0].isdigit():
            job, name, state, nodes, elapsed, node = fields
            yield Row(job, name, state, _count(nodes), float(_count(elapsed)), node.replace("None assigned", ""))


def parse_memory(record: str) -> int:
    """MiB of each node in what ``scontrol -o show job`` printed; a site may count memory by core."""
    cores = re.search(r"\bNumNodes=([0-9]+)\S* NumCPUs=([0-9]+)", record)
    found = re.search(r"\bMinMemory(Node|CPU)=([0-9.]+)([KMGT]?)", record)
    if cores is None or found is None:
        return 0
    of_a_node = math.ceil(int(cores[2]) / max(1, int(cores[1]))) if found[1] == "CPU" else 1
    return round(float(found[2]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}[found[3]] * of_a_node)


def seconds(text: str) -> float:
    """Seconds of ``days-hours:minutes:seconds``, as squeue shows it; 0 if it shows anything else (``INVALID``)."""
    found = re.fullmatch(r"(?:([0-9]+)-)?(?:([0-9]+):)?([0-9]+):([0-9]+)", text.strip())
    if found is None:
        return 0.0
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
