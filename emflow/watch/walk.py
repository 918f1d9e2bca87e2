"""What lies below a folder of a share: every file that may be an acquisition, with what a stat says of it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from emflow.errors import Unavailable
from emflow.records import Fingerprint
from emflow.watch.names import Names, main_of
from mpi_kernels.errors import printable

FOLDER = Fingerprint(size=0, mtime_ns=0, ctime_ns=0)
"""Stands for a folder that is a problem: its times change with its contents while the problem stays the same."""

GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
_REFUSED = frozenset({errno.EACCES, errno.EPERM})


class Sighting(msgspec.Struct, frozen=True):
    """A file on the share, as a scan found it.

    Attributes
    ----------
    relpath : bytes
        Path inside the share; names need not be valid UTF-8.
    fingerprint : Fingerprint
        Of the file; all zeros for a folder.
    problem : str
        Why it can't be an acquisition, or empty.
    """

    relpath: bytes
    fingerprint: Fingerprint
    problem: str = ""


def walk(
    root: str | bytes | os.PathLike[str],
    folder: bytes = b"",
    *,
    recursive: bool = True,
    match: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Iterator[Sighting]:
    """Every file below ``root/folder`` that a pattern matches; a link is never followed, an age never judged.

    Raises
    ------
    Unavailable
        A folder can't be listed for another reason than permission: the share is in trouble.
    """
    yield from Walk(os.fsencode(root), Names(match, ignore), lambda _: recursive).run(folder)


def look(root: bytes, relpath: bytes) -> Sighting | None:
    """Stat one file; None if it is gone, a folder, or the sidecar of another.

    Raises
    ------
    Unavailable
        The share does not answer.
    """
    path = below(root, relpath)
    main = main_of(path)
    if main is not None and os.path.lexists(main):
        return None
    try:
        facts = os.lstat(path)
    except OSError as error:
        if error.errno in GONE:
            return None
        if error.errno in _REFUSED:
            return Sighting(relpath, FOLDER, _refusal(error))
        raise _away(path, error) from error
    return None if stat.S_ISDIR(facts.st_mode) else _sighting(path, relpath, facts)


def below(root: bytes, relpath: bytes) -> bytes:
    """Join the share's folder and a path inside it, which may be empty."""
    return root + b"/" + relpath if relpath else root


@dataclass(slots=True)
class Walk:
    """One pass over a folder and those below it that ``enter`` (by relative path) lets in."""

    root: bytes
    names: Names
    enter: Callable[[bytes], bool]
    read: list[bytes] = field(default_factory=list)
    """Folders that were listed."""

    def run(self, folder: bytes) -> Iterator[Sighting]:
        """Sightings in the order of the file system."""
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            try:
                with os.scandir(below(self.root, here)) as listing:
                    self.read.append(here)
                    entries = {entry.name: entry for entry in listing}
                for name, entry in entries.items():
                    if main_of(name) not in entries:  # else it is a sidecar of that file
                        yield from self._entry(entry, below(here, name) if here else name, waiting)
            except OSError as error:
                if here and error.errno in GONE:
                    continue
                if here and (error.errno in _REFUSED or error.errno == errno.ENAMETOOLONG):
                    yield Sighting(here, FOLDER, f"{_refusal(error)} (a folder)")
                    continue
                raise _away(below(self.root, here), error) from error

    def _entry(self, entry: os.DirEntry[bytes], relpath: bytes, waiting: list[bytes]) -> Iterator[Sighting]:
        if entry.is_dir(follow_symlinks=False):
            if self.names.wants_folder(relpath):
                if self.names.expects_file(relpath):
                    yield Sighting(relpath, FOLDER, "is a folder, but its name is that of a data file")
                if self.enter(relpath):
                    waiting.append(relpath)
        elif self.names.wants_file(relpath):
            try:
                facts = entry.stat(follow_symlinks=False)
            except OSError as error:
                if error.errno not in GONE:
                    raise
            else:
                yield _sighting(entry.path, relpath, facts)


def _sighting(path: bytes, relpath: bytes, facts: os.stat_result) -> Sighting:
    fingerprint = Fingerprint(size=facts.st_size, mtime_ns=facts.st_mtime_ns, ctime_ns=facts.st_ctime_ns)
    if stat.S_ISLNK(facts.st_mode):
        return Sighting(relpath, fingerprint, "is a symbolic link; emflow does not follow links on a share")
    if not stat.S_ISREG(facts.st_mode):
        return Sighting(relpath, fingerprint, "is neither a file nor a folder; emflow reads files only")
    # mode bits that let everybody read spare a system call per file
    if facts.st_mode & 0o444 != 0o444 and not os.access(path, os.R_OK, effective_ids=True):
        return Sighting(relpath, fingerprint, _refusal(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    return Sighting(relpath, fingerprint)


def _refusal(error: OSError) -> str:
    reason = (error.strerror or "refused").lower()
    if error.errno in _REFUSED:
        return f"{reason}: give the account that runs emflow (uid {os.geteuid()}) the right to read it"
    return f"can't be listed: {reason}"


def _away(path: bytes, error: OSError) -> Unavailable:
    return Unavailable(
        f"share: {printable(os.fsdecode(path))} can't be read: {error.strerror}",
        next_step="Check the mount; emflow goes on when the share answers",
    )
