"""A verified copy: every byte is read once, digested and written in the same pass, synced, and renamed into place."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from emflow.blocks import Stopped, blocks, fingerprint, fingerprint_of, opened, sync, sync_folder, target_errors, writer
from emflow.copying import Copy, Progress, Told, check_same, created, digest_blocks, remove, remove_stale
from emflow.errors import NoSpace, Unavailable
from emflow.records import MemberCopy, Transfer
from mpi_kernels.errors import printable

MemberFiles = Sequence[tuple[str | bytes | os.PathLike[str], bytes, str]]
"""Per file of an acquisition: path, path inside the share, and suffix of the copy; the main file first."""


def stage(
    members: MemberFiles,
    target: str | os.PathLike[str],
    acquisition: str,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Transfer:
    """Copy all files of an acquisition into a folder, as ``<acquisition><suffix>``.

    A copy that was interrupted goes on where it was, as long as the source is the same and the machine has not been
    started anew since (unsynced bytes may be zeros after that).

    Raises
    ------
    SourceChanged
        A file was written, cut or replaced meanwhile.
    NoSpace
        The disk is full; a copy that does not fit is not begun, and one that fills the disk is removed.
    NotAllowed, Unavailable
        The operating system says no; the share or the disk does not answer.
    Stopped
        ``stop`` was set; the next call continues.
    EmflowError
        Bytes can't be read, with the offset.
    """
    started = time.monotonic()
    folder = os.fsencode(target)
    with target_errors(folder):
        Path(os.fsdecode(folder)).mkdir(parents=True, exist_ok=True)
    copies = [Copy.plan(os.fsencode(path), rel, folder, acquisition + suffix, suffix) for path, rel, suffix in members]
    with target_errors(folder):
        remove_stale(folder, acquisition, keep={c.temporary(0) for c in copies})
    _check_room(folder, sum(c.missing() for c in copies))
    told = Told(progress, sum(c.before.size for c in copies))
    done = tuple(MemberCopy(relpath=c.relpath, suffix=c.suffix, fingerprint=c.before, xxh3_128=c.make(told, stop))
                 for c in copies)  # fmt: skip
    for copy in copies:  # the first may have changed while the last was copied
        copy.check_source()
    sync_folder(folder)
    return _transfer(done, copies[0].final, started)


def digest_of(
    members: MemberFiles, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> Transfer:
    """Digest all files of an acquisition where they are; raises what `stage` raises of the source."""
    started = time.monotonic()
    paths = [os.fsencode(path) for path, _, _ in members]
    before = [fingerprint_of(path) for path in paths]
    told = Told(progress, sum(b.size for b in before))
    done = []
    for path, (_, relpath, suffix), was in zip(paths, members, before, strict=True):
        with opened(path, relpath) as fd:
            digest = digest_blocks(blocks(fd, path, 0, was.size, stop), told)
            check_same(fingerprint(os.fstat(fd)), was, path)
        done.append(MemberCopy(relpath=relpath, suffix=suffix, fingerprint=was, xxh3_128=digest))
    for path, was in zip(paths, before, strict=True):
        check_same(fingerprint_of(path), was, path)
    return _transfer(tuple(done), paths[0], started)


def publish_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Copy a result file so that a reader sees all of it or none, and hold the copy against the original.

    Returns
    -------
    str
        XXH3-128 of the bytes, 32 hex digits.

    Raises
    ------
    NoSpace
        The disk is full; nothing is left behind.
    EmflowError
        As `stage`, or the copy reads back differently.
    """
    original, final = os.fsencode(source), os.fsencode(target)
    folder, name = os.path.split(final)
    short = hashlib.blake2b(name, digest_size=8).hexdigest()  # a name of 255 bytes leaves no room for more
    temporary = os.path.join(folder, f".emflow-{short}.part".encode())  # noqa: PTH118
    try:
        digest = _copy_anew(original, temporary)
        with opened(temporary) as fd:
            back = digest_blocks(blocks(fd, temporary, 0, os.fstat(fd).st_size), Told(None, 0))
        if back != digest:
            raise Unavailable(f"{printable(os.fsdecode(final))}: the copy reads back differently from what was written")
        with target_errors(final):
            os.replace(temporary, final)  # noqa: PTH105
    except BaseException:
        remove(temporary)
        raise
    sync_folder(folder or b".")
    return digest


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that this account may still write on the disk of a folder, which need not exist yet."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    with target_errors(os.fsencode(path)):
        facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def joint_digest(digests: Iterable[str]) -> str:
    """The digest of an acquisition from those of its files, in order; see `emflow.records.Transfer`."""
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode("ascii"))


def _copy_anew(source: bytes, temporary: bytes) -> str:
    before = fingerprint_of(source)
    with opened(source) as fd, created(temporary, -1) as out:
        digest, write = xxhash.xxh3_128(), writer(out, temporary, 0)
        for block in blocks(fd, source, 0, before.size):
            digest.update(block)
            write(block)
        sync(out, temporary)
        check_same(fingerprint(os.fstat(fd)), before, source)
    return digest.hexdigest()


def _check_room(folder: bytes, needed: int) -> None:
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if facts.f_blocks and needed > free:
        raise NoSpace(
            f"{printable(os.fsdecode(folder))}: {needed} bytes to copy, {free} free",
            next_step="Make room; emflow goes on by itself",
        )


def _transfer(done: tuple[MemberCopy, ...], path: bytes, started: float) -> Transfer:
    return Transfer(
        members=done,
        path=os.fsdecode(path),
        digest=joint_digest(m.xxh3_128 for m in done),
        bytes=sum(m.fingerprint.size for m in done),
        seconds=time.monotonic() - started,
    )


__all__ = ["Progress", "Stopped", "digest_of", "free_bytes", "joint_digest", "publish_copy", "stage"]
