"""A file for HDF5 whose errors wait until HDF5 is done.

HDF5 does not survive a full disk: closing a file whose last writes failed ends the process with a segmentation fault
(seen with HDF5 1.14 and 2.0 under h5py 3.16), and the service itself may run kernels in process.
"""

from __future__ import annotations

import os
from pathlib import Path


class Backing:
    """What h5py's file-object driver needs; ``check`` raises the first error that was kept.

    Parameters
    ----------
    path : Path
        Created; must not be there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("x+b", buffering=0)
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

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._kept = self._kept or error
            return size or 0

    def flush(self) -> None:
        """Nothing is buffered here."""

    def check(self) -> None:
        """Raise what was kept, else make the bytes last."""
        if self._kept is not None:
            raise self._kept
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
