"""What kind of file system a folder lies on: one of this machine alone, or one that other hosts may share."""

from __future__ import annotations

import os
from pathlib import Path

LOCAL = frozenset({"tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs"})
"""Kinds that no other host can see, unless this one serves them; what is written there is seen at once."""


def file_system(path: Path) -> str:
    """Kind of the file system that a path lies on, there or not; "unknown" if it can't be told.

    Source: proc(5), mountinfo.
    """
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines():
        fields, _, rest = line.partition(" - ")
        mount = fields.split()[4].replace("\\040", " ")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, rest.split()[0]
    return kind


def is_local(path: Path) -> bool:
    """Whether what this machine writes to a path, or reads from it, is never late."""
    return file_system(path) in LOCAL
