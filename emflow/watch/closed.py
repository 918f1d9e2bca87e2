"""Ask the kernel whether anybody still writes a local file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from pathlib import Path

CANNOT_TELL = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


def writer_is_gone(path: Path) -> bool | None:
    """Whether no process has a file open for writing or mapped writable; None where the system can't tell.

    A read lease is granted only on a file that nobody writes, memory maps included, which no notification tells.
    It is given back at once: a writer that came in between waits for microseconds.

    Returns
    -------
    bool or None
        None on file systems without leases (network shares, FUSE) and for files of another user without CAP_LEASE.

    Notes
    -----
    Source: fcntl(2), "Leases"; a broken lease sends SIGIO, whose default action ends the process.
    """
    if signal.getsignal(signal.SIGIO) in (signal.SIG_DFL, None):
        with contextlib.suppress(ValueError):  # not the main thread: the service has already ignored it
            signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            return False
        if error.errno in CANNOT_TELL:
            return None
        raise
    finally:
        os.close(fd)
    return True
