"""Choose where hints come from: inotify where this host owns the files, nothing where another host writes them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path
from typing import Literal

from emflow.errors import ConfigError
from emflow.watch.inotify import InotifyHints
from emflow.watch.waiting import RESCAN, Hints, NoHints, Rescan
from mpi_kernels.errors import printable

LOCAL = frozenset(
    {"bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfsplus", "jfs", "msdos", "ntfs3", "overlay"}
    | {"ramfs", "reiserfs", "tmpfs", "vfat", "xfs", "zfs"}
)
NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse", "fuseblk", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs"}
    | {"nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"}
)
"""inotify sees what passes through this kernel only.  Source: inotify(7), "Limitations and caveats"."""

NETWORK_MAGIC = {
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x6969: "nfs",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x65735546: "fuse",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x5346414F: "afs",
}
"""f_type of statfs(2).  Source: Linux include/uapi/linux/magic.h; Lustre's and GPFS's own headers."""


def choose(root: str | os.PathLike[str], setting: Literal["auto", "inotify", "none"] = "auto") -> Hints:
    """The hint source for a folder; not armed yet.

    Raises
    ------
    ConfigError
        inotify was demanded on a file system where it stays silent.
    """
    if setting == "none":
        return NoHints()
    kind = file_system(root)
    where = printable(os.fspath(root))
    silent = (
        f"{where} is on {kind}, where inotify never tells what another host (the microscope's PC) writes: "
        "files are found by scans only"
    )
    if setting == "inotify" and is_network(kind):
        raise ConfigError(silent, next_step='Set hints = "auto" in [scan]')
    if setting == "auto" and kind not in LOCAL:
        return NoHints(silent if is_network(kind) else f"{where} is on {kind}, which is not known to be a local disk")
    try:
        return InotifyHints(root)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOSYS, errno.ENOMEM):
            raise
        return NoHints(
            f"inotify refuses another instance ({error.strerror}): raise fs.inotify.max_user_instances; "
            "files are found by scans only"
        )


def is_network(kind: str) -> bool:
    """Whether files of this kind of file system can change without this kernel's knowledge."""
    return kind in NETWORK or kind.startswith("fuse.")


def file_system(path: str | os.PathLike[str]) -> str:
    """Name of the file system below a path, such as ``"ext4"`` or ``"cifs"``; ``"unknown"`` if nobody says."""
    named = mounted_as(os.path.realpath(path), _mounts())
    by_magic = NETWORK_MAGIC.get(_magic(path), "")
    # statfs asks the file system itself; the table of mounts may belong to another namespace
    return by_magic if by_magic and not is_network(named) else named or "unknown"


def mounted_as(path: str, mountinfo: str) -> str:
    """Type of the mount that holds an absolute path, from the text of ``/proc/self/mountinfo``.

    Notes
    -----
    Fields: id parent major:minor root mount-point options [optional...] - type source options; the last of equal
    mount points is on top.  Source: proc_pid_mountinfo(5).
    """
    longest, kind = -1, ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, after = left.split(" "), right.split(" ")
        if len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:
            longest, kind = len(point), after[0]
    return kind


def _mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _magic(path: str | os.PathLike[str]) -> int:
    """``f_type``, the first word of struct statfs on every 64-bit Linux but s390x; 0 if there is no answer."""
    buffer = ctypes.create_string_buffer(512)
    try:
        failed = ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer)
    except AttributeError:  # a libc without statfs
        return 0
    return 0 if failed else ctypes.c_uint32.from_buffer(buffer).value


__all__ = ["RESCAN", "Hints", "NoHints", "Rescan", "choose", "file_system", "is_network"]
