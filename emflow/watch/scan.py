"""The truth about a share: at three paces, tell what is new or changed since the last time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

from emflow.errors import Unavailable
from emflow.records import Fingerprint
from emflow.watch.names import Names
from emflow.watch.waiting import Rescan
from emflow.watch.walk import Sighting, Walk, below, look, walk
from mpi_kernels.errors import printable

REST = 10.0
"""A scan rests at least this many times its own duration, so that watching costs a share 10 % at most."""

LIVE_HINTS = 4.0
"""The whole tree is read this much less often while hints work."""

RECENT_FOR_S = 3600.0
RECENT_FOLDERS = 64
"""A folder in which something appeared stays recent for this long; a microscope fills one folder for hours."""

_NOW = -float("inf")


class Scanner:
    """Finds what is new or changed on one share; right with all hints missing.

    Folders of unfinished acquisitions are read every ``active_s``, folders in which something appeared lately every
    ``recent_s``, the whole tree every ``whole_s``, and none of them under ten times as long as reading them takes.
    What vanishes is kept: nothing is ever told to be deleted.

    Parameters
    ----------
    root : path-like
        Folder of the share.
    match, ignore : sequence of str
        Patterns, see `Names`.
    clock : callable
        Monotonic seconds.

    Attributes
    ----------
    live_hints : bool
        To be set while hints work: the whole tree is then read four times less often.
    """

    def __init__(
        self,
        root: str | bytes | os.PathLike[str],
        *,
        match: Sequence[str] = (),
        ignore: Sequence[str] = (),
        active_s: float = 0.5,
        recent_s: float = 3.0,
        whole_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = os.fsencode(root)
        self.live_hints = False
        self._names = Names(match, ignore)
        self._active_s, self._recent_s, self._whole_s = active_s, recent_s, whole_s
        self._clock = clock
        self._known: dict[bytes, Fingerprint] = {}
        self._folders: set[bytes] = set()
        self._last: dict[bytes, tuple[float, float]] = {}
        """When each folder was read last, and how long that took."""
        self._active: dict[bytes, set[bytes]] = {}
        self._recent: dict[bytes, float] = {}
        self._dirty: set[bytes] = set()
        self._named: set[bytes] = set()
        self._whole_due = self._whole_at_best = self._not_before = _NOW
        self._device: tuple[int, bool] | None = None

    # --- what the caller tells ---

    def load(self, known: Iterable[tuple[bytes, Fingerprint]]) -> None:
        """Take over what the journal knows, so that a restart reports only what is new."""
        self._known.update(known)

    def forget(self, relpath: bytes) -> None:
        """Report a file again at the next scan of its folder even if it has not changed."""
        self._known.pop(relpath, None)
        self._dirty.add(_parent(relpath))

    def activate(self, relpath: bytes) -> None:
        """Read the folder of an unfinished acquisition at the quickest pace."""
        self._active.setdefault(_parent(relpath), set()).add(relpath)

    def rest(self, relpath: bytes) -> None:
        """End what `activate` began."""
        folder = _parent(relpath)
        waiting = self._active.get(folder, set())
        waiting.discard(relpath)
        if not waiting:
            self._active.pop(folder, None)

    def mark(self, dirty: Collection[bytes] | Rescan, names: Iterable[bytes] = ()) -> None:
        """Make a scan happen sooner: of folders, of the whole tree, or of single files, which costs one stat each."""
        if isinstance(dirty, Rescan):
            self._whole_due = min(self._whole_due, self._whole_at_best)
        else:
            self._dirty.update(dirty)
        self._named.update(n for n in names if self._names.wants_file(n))

    def mark_all(self) -> None:
        """Read the whole tree at the next scan, whenever that is."""
        self._whole_due = _NOW

    # --- what is due ---

    def next_due(self) -> float:
        """When `scan` has something to do, on the scanner's clock."""
        due = _NOW if self._named else min([self._whole_due, *self._due_folders().values()])
        return max(due, self._not_before)

    def _due_folders(self) -> dict[bytes, float]:
        due = {folder: self._due(folder, self._recent_s) for folder in (*self._recent, b"")}
        due.update((folder, self._due(folder, self._active_s)) for folder in self._active)
        due.update((folder, self._due(folder, 0.0)) for folder in self._dirty)
        return due

    def _due(self, folder: bytes, period_s: float) -> float:
        last, took = self._last.get(folder, (_NOW, 0.0))
        return last + max(period_s, REST * took)

    # --- scan ---

    def scan(self) -> list[Sighting]:
        """Read what is due; returns what is new or changed since the last time, by path.

        Raises
        ------
        Unavailable
            The share looks unmounted, or does not answer.  Nothing is lost: the next scan reports everything.
        """
        found: dict[bytes, Sighting] = {}
        try:
            self._guard()
            self._look(found)
            now = self._clock()
            if self._whole_due <= now:
                self._read_whole(found)
            else:
                for folder in [f for f, due in self._due_folders().items() if due <= now]:
                    self._read(folder, found)
        except Unavailable:
            self._not_before = self._clock() + self._recent_s
            self._whole_due = _NOW  # when it is back, everything may have changed meanwhile
            raise
        self._named.clear()
        self._refresh_recent(found)
        self._known.update((s.relpath, s.fingerprint) for s in found.values())
        return sorted(found.values(), key=lambda s: s.relpath)

    def _compare(self, sighting: Sighting, found: dict[bytes, Sighting]) -> None:
        if self._known.get(sighting.relpath) != sighting.fingerprint:
            found[sighting.relpath] = sighting

    def _look(self, found: dict[bytes, Sighting]) -> None:
        for relpath in self._named:
            sighting = look(self.root, relpath)
            if sighting is not None:
                self._compare(sighting, found)

    def _read_whole(self, found: dict[bytes, Sighting]) -> None:
        start = self._clock()
        walker = Walk(self.root, self._names, lambda _: True)
        for sighting in walker.run(b""):
            self._compare(sighting, found)
        end = self._clock()
        # a folder that is new, even an empty one, is where the next file is expected
        self._recent.update((folder, end) for folder in walker.read if folder not in self._folders)
        self._folders = set(walker.read)
        self._last = dict.fromkeys(walker.read, (end, (end - start) / len(walker.read)))
        self._dirty.clear()
        self._whole_at_best = end + REST * (end - start)
        period = self._whole_s * (LIVE_HINTS if self.live_hints else 1.0)
        self._whole_due = max(end + period, self._whole_at_best)

    def _read(self, folder: bytes, found: dict[bytes, Sighting]) -> None:
        """One folder, and all that is new below it: a folder that is known has a pace of its own."""
        start = self._clock()
        walker = Walk(self.root, self._names, lambda relpath: relpath not in self._folders)
        for sighting in walker.run(folder):
            self._compare(sighting, found)
        end = self._clock()
        new = [f for f in walker.read if f != folder]
        if folder not in walker.read:
            self._folders.discard(folder)  # gone; entered again should it come back
        self._folders.update(walker.read)
        self._last.update(dict.fromkeys(new, (end, 0.0)))
        self._last[folder] = (end, (end - start) / max(1, len(walker.read)))
        self._recent.update((parent, end) for f in new for parent in (f, _parent(f)))
        self._dirty.discard(folder)

    def _refresh_recent(self, found: Iterable[bytes]) -> None:
        now = self._clock()
        self._recent.update((_parent(relpath), now) for relpath in found)
        lately = sorted((t, f) for f, t in self._recent.items() if now - t < RECENT_FOR_S)
        self._recent = {f: t for t, f in lately[-RECENT_FOLDERS:]}

    # --- an empty mount is an alarm ---

    def _guard(self) -> None:
        try:
            here, above = os.stat(self.root), os.stat(below(self.root, b".."))  # noqa: PTH116 - pathlib has no bytes
            device = (here.st_dev, here.st_dev != above.st_dev)
            changed = device != self._device
            empty = (changed or self._whole_due <= self._clock()) and _is_empty(self.root)
        except OSError as error:
            raise self._unmounted((error.strerror or str(error)).lower()) from error
        if empty and self._known:
            raise self._unmounted(f"it is empty, and {len(self._known)} files were known")
        if changed and self._device is not None:
            if (self._device[1] and not device[1]) or not self._still_there():
                raise self._unmounted("another file system is there now")
            self._whole_due = _NOW  # mounted again, which may bring another device number
        self._device = device

    def _still_there(self) -> bool:
        """Whether any of the known files is found; true where none is known."""
        some = list(islice(self._known, 100))
        return not some or any(os.path.lexists(below(self.root, relpath)) for relpath in some)

    def _unmounted(self, reason: str) -> Unavailable:
        return Unavailable(
            f"share {printable(os.fsdecode(self.root))} looks unmounted: {reason}",
            next_step="Mount it again; nothing is forgotten, and watching goes on by itself",
        )


def _is_empty(folder: bytes) -> bool:
    with os.scandir(folder) as entries:
        return next(iter(entries), None) is None


def _parent(relpath: bytes) -> bytes:
    return relpath.rpartition(b"/")[0]


__all__ = ["Scanner", "Sighting", "walk"]
