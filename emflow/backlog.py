"""``runs/backlog.json``: how many acquisitions wait for the service, for an agent that would add more."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from mpi_kernels import jsonfile

BACKLOG_FILE = "backlog.json"
REFRESH_S = 5.0
"""While there is too much, the file is written anew so often, with another ``wall_ns``: somebody stands behind it."""


class Backlog(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file says; ``limit`` is 0 where there is none."""

    waiting: int
    limit: int
    wall_ns: int
    v: Literal[1] = 1

    @property
    def over(self) -> bool:
        """Whether more wait than should."""
        return 0 < self.limit < self.waiting


def write(runs: Path, backlog: Backlog) -> None:
    """Replace the file; not synced with its folder: a power cut ends what it tells of as well."""
    jsonfile.replace(runs / BACKLOG_FILE, msgspec.json.encode(backlog))


def read(runs: Path) -> Backlog | None:
    """What the file says; None if there is none, or none of ours."""
    try:
        return msgspec.json.decode((runs / BACKLOG_FILE).read_bytes(), type=Backlog, strict=True)
    except (OSError, ValueError):
        return None
