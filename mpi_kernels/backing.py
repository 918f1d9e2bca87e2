"""A file for HDF5 whose errors wait until HDF5 is done.

HDF5 does not survive a full disk: closing a file whose last writes failed ends the process with a segmentation fault
(seen with HDF5 1.14 and 2.0 under h5py 3.16), and the service itself may run kernels in process.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

HELD_BYTES = 8 << 20
"""Files up to here are held in memory and written at once: HDF5 writes its hundreds of small pieces one by one."""


class Backing:
    """What h5py's file-object driver needs; ``finish`` raises the first error that was kept.

    Parameters
    ----------
    path : Path
        Created by ``finish``, or when it has outgrown the memory; must not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.BytesIO | io.FileIO = io.BytesIO()
        self._kept: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Where it is."""
        return self._file.tell()

    def write(self, data: memoryview) -> int:
        """Write all of it, or keep the error and say so anyway."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            if self._kept is None:  # else the file of half the bytes is there
                self._make_room(self.tell() + size)
            while left and self._kept is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._kept = error
        return size

    def readinto(self, buffer: memoryview) -> int:
        """Read; zeros beyond what could be written."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and (n := self._file.readinto(view[done:])):
            done += n
        view[done:] = bytes(len(view) - done)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Read bytes; h5py knows a file object by this method, and then uses ``readinto``."""
        return self._file.read(size) or b""

    def truncate(self, size: int) -> int:
        """Cut or extend."""
        try:
            self._make_room(size)
            if self.seek(0, os.SEEK_END) < size and isinstance(self._file, io.BytesIO):  # which only cuts
                self._file.write(bytes(size - self.tell()))
            return self._file.truncate(size)
        except OSError as error:
            self._kept = self._kept or error
            return size

    def flush(self) -> None:
        """Half a file is of no use: the disk gets it when it is whole, or too large for here."""

    def _make_room(self, size: int) -> None:
        """Go over to the file before memory holds more than it may."""
        if size > HELD_BYTES and isinstance(self._file, io.BytesIO):
            at, held = self.tell(), self._file.getvalue()
            self._file = _written(self._path, held)
            self._file.seek(at)

    def finish(self) -> str:
        """Raise what was kept, else make the bytes last, and tell their SHA-256."""
        if self._kept is not None:
            raise self._kept
        if isinstance(self._file, io.BytesIO):
            held = self._file.getvalue()  # no copy; a view of it could not be closed while an error holds it
            digest = hashlib.sha256(held)
            self._file = _written(self._path, held)
        else:
            self._file.seek(0)
            digest = hashlib.file_digest(self._file, "sha256")
        os.fsync(self._file.fileno())
        return digest.hexdigest()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


def _written(path: Path, data: bytes) -> io.FileIO:
    """A new file of these bytes, which the caller closes."""
    file, left = path.open("x+b", buffering=0), memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except BaseException:
        file.close()
        raise
    return file
