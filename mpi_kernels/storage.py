"""What holds a file's bytes: the file system, and how much of them is in the page cache; from these, how to read them.

Measured on a local disk (2 threads, GB/s): cached bytes by a map 25, by ``pread`` 13; bytes that are not cached by
O_DIRECT 2.5, through the cache 1.0.  A map of a file on a network share is never made: there, a file that another
host cuts off or that the server loses is a fault in the middle of arithmetic instead of an error of a call.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

import numpy as np

from mpi_kernels.contract import Reading
from mpi_kernels.extension import native
from mpi_kernels.layout import Layout

SHARES = {
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
    0x65735546: "fuse",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x19830326: "beegfs",
    0x5346414F: "afs",
}
"""File systems of other hosts, by ``f_type``.  Source: statfs(2), Linux include/uapi/linux/magic.h, BeeGFS."""

PARALLEL = {0x0BD00BD0: "lustre", 0x47504653: "gpfs"}
"""Those of clusters, which are fast with large requests past the cache.  Source: Lustre and IBM Storage Scale."""

FILES, PAGES = 8, 64
"""Files, and pages of all of them, that are asked about: some 100 µs."""

CACHED_SHARE = 0.9
"""From here on the cache is the faster way: what is missing is read through it at 1 GB/s instead of 2.5."""


RUN_BYTES = 1 << 20
"""Bytes that must lie together on average for O_DIRECT to pay: it waits for each piece, some 0.1 ms."""

RECORDS = 4096
"""Records of a layout whose places are looked at."""


def choose(layout: Layout) -> tuple[Reading, str]:
    """The way to read a layout's files, and why: what is cached, on which file system, and how it lies there.

    Files that can't be opened are left out: reading them tells.
    """
    files = layout.files
    spread = sorted({i * (len(files) - 1) // max(1, FILES - 1) for i in range(FILES)})
    found = [f for f in (_facts(files[i], PAGES // len(spread)) for i in spread) if f is not None]
    if not found:
        return "read", "no file of it can be opened"
    resident, asked = sum(f[1] for f in found), sum(f[2] for f in found)
    share = resident / asked if asked else 1.0
    kind = found[0][0]
    name = SHARES.get(kind) or PARALLEL.get(kind) or "local disk"
    why = f"{100 * share:.0f} % cached, {name}"
    if share < CACHED_SHARE:
        apart = _run_bytes(layout) < RUN_BYTES
        return ("read" if kind in SHARES or apart else "direct"), why + (", in small pieces" if apart else "")
    # a decoder gets its bytes by read: they must not change while it checks them
    return ("read" if layout.codec or kind in SHARES or kind in PARALLEL else "mmap"), why


def _run_bytes(layout: Layout) -> float:
    """Bytes that lie together in a file, on average."""
    if layout.offsets is None:
        return np.inf
    at = layout.offsets[:RECORDS]
    sizes = np.full(len(at), layout.record) if layout.sizes is None else layout.sizes[: len(at)]
    step = np.diff(at) - sizes[:-1]
    apart = (step < 0) | (step > 1 << 16)
    if layout.file_of is not None:
        apart |= np.diff(layout.file_of[: len(at)]) != 0
    return float(sizes.sum()) / (1 + np.count_nonzero(apart)) if apart.any() else np.inf


def _facts(path: str, pages: int) -> tuple[int, int, int] | None:
    """File system, resident pages and pages that were asked about."""
    if native is None:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        size = os.fstat(fd).st_size
        kind = native.file_system(fd)
        resident, asked = native.pages_in_cache(fd, 0, size, pages) if kind not in SHARES else (0, 0)
        # mincore takes every page for resident where the file is another user's (Linux 5.2 and later)
        if asked and resident == asked:
            step = max(1, (size - 1) // max(1, asked - 1))
            resident, asked = _ready(fd, range(0, size, step))
    except OSError:
        return None
    finally:
        os.close(fd)
    return kind, resident, asked


def _ready(fd: int, places: Iterable[int]) -> tuple[int, int]:
    """How many of these bytes can be read without waiting for a disk, and how many were asked about."""
    ready = asked = 0
    byte = [bytearray(1)]
    for at in places:
        asked += 1
        try:
            ready += os.preadv(fd, byte, at, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # the file system can't tell: believe mincore
                ready += 1
    return ready, asked
