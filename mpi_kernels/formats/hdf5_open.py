"""Opening an HDF5 file from outside: its first bytes, whether a writer holds it, and a safe walk through it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mpi_kernels.errors import FormatError, Incomplete, KernelError, NotThisFormat
from mpi_kernels.formats.access import read_at, size_of

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 20_000
MAX_DEPTH = 32
MAX_RANK = 32
"""Axes of an HDF5 dataspace (H5S_MAX_RANK)."""

_WAIT = "wait for the writer, or copy the file again"


def check_superblock(path: str) -> None:
    """Judge the first bytes without the HDF5 library.

    The superblock stands at byte 0, 512, 1024, 2048, ...  It states where the file ends, which a truncated file does
    not reach, and from version 2 whether a writer has the file open.
    Source: HDF5 File Format Specification 3.0, section II.A.

    Raises
    ------
    NotThisFormat
        No superblock.
    Incomplete
        Shorter than it says, or open for writing.
    """
    size = size_of(path)
    base = next((b for b in _bases(size) if read_at(path, b, 8) == MAGIC), None)
    if base is None:
        if MAGIC.startswith(read_at(path, 0, 8)):
            raise Incomplete(f"only {size} bytes of an HDF5 file are there", path=path, next_step=_WAIT)
        raise NotThisFormat("not an HDF5 file: no superblock", path=path)
    block = read_at(path, base, 64).ljust(64, b"\0")
    version = block[8]
    if version > 3:
        raise FormatError(f"HDF5 superblock version {version} is not known", path=path, next_step="update HDF5")
    width, end_at = (block[13], 24) if version < 2 else (block[9], 12)
    if version >= 2 and block[11] & 1:
        raise Incomplete("a writer has it open", path=path, next_step="wait; if it crashed, run h5clear -s on a copy")
    if width not in (2, 4, 8):
        raise FormatError(f"its addresses have {width} bytes", path=path, next_step="copy the file again")
    end_at += 4 if version == 1 else 0  # version 1 inserts the indexed storage's k and two reserved bytes
    end = int.from_bytes(block[end_at + 2 * width : end_at + 3 * width], "little")
    if size < base + 48 or size < end:
        raise Incomplete(f"it is cut off: {size} of {end} bytes are there", path=path, next_step=_WAIT)


def _bases(size: int) -> Iterator[int]:
    yield 0
    base = 512
    while base < min(size, 1 << 24):
        yield base
        base *= 2


@contextmanager
def library_errors(path: str) -> Iterator[None]:
    """Turn what h5py raises on damaged files into `FormatError`, and a lock into `Incomplete`."""
    try:
        yield
    except KernelError:
        raise
    except OSError as error:
        text = str(error)
        if (error.errno in (errno.EAGAIN, errno.EACCES) and "lock" in text) or "already open" in text:
            raise Incomplete("a writer holds its lock", path=path, next_step=_WAIT) from error
        if "truncated file" in text:
            raise Incomplete(f"it is cut off: {text:.200}", path=path, next_step=_WAIT) from error
        raise _damaged(path, text) from error
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: str, text: str) -> FormatError:
    return FormatError(
        f"HDF5 can't read it: {text:.300}", path=path, next_step="copy the file again; h5debug says more"
    )


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """An h5py.File for reading, with HDF5's own lock held only meanwhile; damage is one of our errors."""
    import h5py

    check_superblock(path)
    with library_errors(path):
        # best-effort: a lock of a writer is respected, a file system without locks is not an error
        file = h5py.File(os.fsencode(path), "r", locking="best-effort")
    with file, library_errors(path):
        yield file


@dataclass(slots=True)
class Contents:
    """What a file holds: paths of groups and datasets reached through hard links, and links that were not followed."""

    groups: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, Any] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)


def walk(file: Any, path: str) -> Contents:
    """Everything that the file itself holds.

    Soft and external links are noted and never followed: an external one makes the reader open any file it names.
    """
    import h5py

    found = Contents(groups={"/": file["/"]})
    seen = {_address(file["/"])}
    todo = [("", file["/"], 0)]
    while todo:
        prefix, group, depth = todo.pop(0)
        for name in group:
            if len(found.groups) + len(found.datasets) + len(found.links) > MAX_OBJECTS:
                raise FormatError(
                    f"it holds more than {MAX_OBJECTS} objects", path=path, next_step="export one dataset per file"
                )
            here = f"{prefix}/{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                found.links.append(here)
                continue
            item = group[name]
            if isinstance(item, h5py.Dataset):
                found.datasets[here] = item
            elif isinstance(item, h5py.Group) and _address(item) not in seen:
                seen.add(_address(item))
                found.groups[here] = item
                if depth < MAX_DEPTH:
                    todo.append((here, item, depth + 1))
    return found


def _address(item: Any) -> int:
    import h5py

    return int(h5py.h5o.get_info(item.id).addr)


def text_of(value: Any) -> str:
    """An attribute or a scalar as text; empty if it is none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    if getattr(value, "size", 0) == 1 and hasattr(value, "item"):
        item = value.item()
        return text_of(item) if isinstance(item, (str, bytes)) else str(item)
    return ""


def attribute(item: Any, name: str) -> Any:
    """An attribute, or None where it is absent or can't be read (a type that h5py does not know)."""
    try:
        return item.attrs.get(name)
    except (OSError, TypeError, RuntimeError, KeyError, ValueError):
        return None
