"""inotify as a hint: what local writers, and SMB clients of a server on this host, do below a folder."""

from __future__ import annotations

import errno
import os
import select
import time

from inotify_simple import INotify, flags, parse_events

from emflow.watch.names import is_note, is_temporary
from emflow.watch.waiting import RESCAN, Rescan, Waker

# Not MODIFY: a growing file would wake the loop at every write, and its folder is scanned at the quick pace anyway.
_MASK = (
    flags.CREATE
    | flags.CLOSE_WRITE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
    | flags.EXCL_UNLINK
)
_LOST = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT
_NO_MORE = frozenset({errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_READ_BYTES = 1 << 18

ROOT_CHECK_S = 1.0
"""How long at most a root that was moved away or mounted over goes unnoticed by `InotifyHints.wait`."""


class InotifyHints:
    """Watches every folder below a root; see `Hints`.

    A folder is watched first and listed then, so that nothing can appear in between (without this order 323 of 600
    files of a quick writer were seen, with it 600).  After an overflow of the kernel's queue, or when the root comes
    back after it was deleted, moved or mounted over, everything is watched anew and `wait` returns ``RESCAN``.

    Raises
    ------
    OSError
        EMFILE: the user's limit of instances (fs.inotify.max_user_instances) or of open files is reached.
    """

    def __init__(self, root: str | bytes | os.PathLike[str]) -> None:
        self.degraded = ""
        self._root = os.fsencode(root)
        self._armed = False
        self._identity: tuple[int, int] | None = None
        self._folders: dict[int, bytes] = {}
        self._watches: dict[bytes, int] = {}
        self._dirty: set[bytes] = set()
        self._closed: set[bytes] = set()
        self._rescan = False
        self._inotify: INotify | None = INotify(nonblocking=True)
        self._waker = Waker()
        self._epoll = select.epoll()
        self._epoll.register(self._waker.fileno(), select.EPOLLIN)
        self._epoll.register(self._inotify.fileno(), select.EPOLLIN)

    @property
    def live(self) -> bool:
        """Whether changes are being reported right now."""
        return self._inotify is not None and self._identity is not None

    def arm(self) -> None:
        """Watch the tree; the next `wait` says ``RESCAN``, for what came before."""
        self._armed = self._rescan = True
        self._watch_root()

    def wait(self, timeout_s: float) -> frozenset[bytes] | Rescan:
        """Folders in which something happened; empty after the time-out or a `wake`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_root()
            left = 0.0 if self._dirty or self._rescan else max(0.0, deadline - time.monotonic())
            ready = {fd for fd, _ in self._epoll.poll(min(left, ROOT_CHECK_S))}
            woken = self._waker.fileno() in ready and self._waker.clear()
            self._drain()
            if self._dirty or self._rescan or woken or time.monotonic() >= deadline:
                return self._take()

    def closed(self) -> frozenset[bytes]:
        """Files and notes of commanded scans that were closed after writing or renamed into place since last asked."""
        closed, self._closed = frozenset(self._closed), set()
        return closed

    def wake(self) -> None:
        """Make `wait` return now."""
        self._waker.set()

    def fileno(self) -> int:
        """Descriptor that is readable when `wait` would return something."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Give watches and descriptors back."""
        self._drop_inotify()
        self._epoll.close()
        self._waker.close()

    # --- events ---

    def _take(self) -> frozenset[bytes] | Rescan:
        rescan, dirty = self._rescan, frozenset(self._dirty)
        self._rescan, self._dirty = False, set()
        return RESCAN if rescan else dirty

    def _drain(self) -> None:
        while self._inotify is not None:
            try:
                data = os.read(self._inotify.fileno(), _READ_BYTES)
            except BlockingIOError:
                return
            for event in parse_events(data):
                if event.mask & flags.Q_OVERFLOW:
                    self._start_anew()
                    break
                self._event(event.wd, event.mask, os.fsencode(event.name))

    def _event(self, wd: int, mask: int, name: bytes) -> None:
        folder = self._folders.get(wd)
        if folder is None:  # left over from a watch that is gone
            return
        if not name:
            self._gone(folder, mask)
            return
        relpath = folder + b"/" + name if folder else name
        if mask & flags.ISDIR:
            self._dirty.add(folder)
            if mask & flags.MOVED_FROM:
                self._unwatch(relpath)
            elif mask & (flags.CREATE | flags.MOVED_TO) and not _hidden(name):
                self._watch(relpath)
        elif not mask & flags.MOVED_FROM and (not _hidden(name) or is_note(os.fsdecode(name))):
            self._dirty.add(folder)
            if mask & (flags.CLOSE_WRITE | flags.MOVED_TO):
                self._closed.add(relpath)

    def _gone(self, folder: bytes, mask: int) -> None:
        if not folder and mask & _LOST:
            self._identity = None  # _check_root watches it again when it is there again
            self._rescan = True
        elif mask & flags.IGNORED:
            self._folders.pop(self._watches.pop(folder, -1), None)

    # --- watches ---

    def _watch(self, folder: bytes) -> None:
        """Add a watch to a folder, then to those below it, and call each of them dirty."""
        waiting = [folder]
        while waiting and self._inotify is not None:
            here = waiting.pop()
            path = self._root + b"/" + here if here else self._root
            try:
                wd = self._inotify.add_watch(path, _MASK | (flags.DONT_FOLLOW if here else 0))
            except OSError as error:
                if error.errno in _NO_MORE:
                    self._degrade(error)
                continue  # gone again, or not ours to read, which the scan tells
            before = self._folders.get(wd, here)
            if before != here and self._watches.get(before) == wd:
                del self._watches[before]
            self._folders[wd], self._watches[here] = here, wd
            self._dirty.add(here)
            waiting += _folders_in(path, here)

    def _unwatch(self, folder: bytes) -> None:
        """A folder was moved: its watches would go on reporting under a path that is no longer theirs."""
        for relpath in [r for r in self._watches if r == folder or r.startswith(folder + b"/")]:
            wd = self._watches.pop(relpath)
            self._folders.pop(wd, None)
            try:
                if self._inotify is not None:
                    self._inotify.rm_watch(wd)
            except OSError:
                continue  # deleted meanwhile

    def _start_anew(self) -> None:
        """Events were lost, so the table of watches is too: open another instance and watch everything."""
        self._drop_inotify()
        self._rescan = True
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            self._degrade(error)
            return
        self._epoll.register(self._inotify.fileno(), select.EPOLLIN)
        self._watch_root()

    def _watch_root(self) -> None:
        self._identity = self._root_identity()
        if self._identity is not None:
            self._watch(b"")

    def _check_root(self) -> None:
        """Find a root that came back, or that another one was put in the place of."""
        if not self._armed or self._inotify is None:
            return
        found = self._root_identity()
        if found is not None and found != self._identity:
            self._start_anew()
        self._identity = self._identity and found

    def _root_identity(self) -> tuple[int, int] | None:
        try:
            facts = os.stat(self._root)  # noqa: PTH116 - pathlib has no bytes
        except OSError:
            return None
        return facts.st_dev, facts.st_ino

    def _degrade(self, error: OSError) -> None:
        self._drop_inotify()
        self._rescan = True
        limit = "max_user_watches" if error.errno == errno.ENOSPC else "max_user_instances, or the limit of open files"
        self.degraded = (
            f"inotify gave up ({(error.strerror or '').lower()}): raise fs.inotify.{limit}; "
            "files are found by scans only"
        )

    def _drop_inotify(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None
        self._identity = None
        self._folders.clear()
        self._watches.clear()
        self._closed.clear()


def _folders_in(path: bytes, relpath: bytes) -> list[bytes]:
    try:
        with os.scandir(path) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and not _hidden(e.name)]
    except OSError:
        return []  # gone again, or not ours to list, which the scan tells
    return [relpath + b"/" + name if relpath else name for name in names]


def _hidden(name: bytes) -> bool:
    return is_temporary(os.fsdecode(name))
