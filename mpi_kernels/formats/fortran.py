"""Arrays whose planes are detector pixels: the pixels of one frame lie scattered over the whole file."""

from __future__ import annotations

import os

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import Incomplete, MissingData
from mpi_kernels.formats.access import os_errors
from mpi_kernels.formats.plan import c_order, check_request
from mpi_kernels.protocols import Source

PIECE_BYTES = 8 << 20
"""Bytes read at a time, or one plane where that is more; bounds the memory of a source."""

WARNING = "stored in Fortran order: every block of frames reads from all over the file; write C order for speed"


DETECTOR_FIRST = (
    "stored with the detector before the scan: every block of frames reads from all over the file; "
    "swap the axes in the program that wrote it for speed"
)


class FortranSource:
    """Frames of an array whose first axis varies fastest, or whose detector axes come before those of the scan.

    The file holds one plane for each detector pixel: all scan positions, y fastest, or x if ``detector_first``.  A
    block of frames needs its span out of every plane, so memory stays at `PIECE_BYTES` but the time grows with planes
    times blocks.

    Parameters
    ----------
    header : Header
        What the format found.
    path : str
        The file.
    start : int
        Byte at which the array begins.
    dtype : numpy.dtype
        Pixel type in the file.
    detector_first : bool
        C order of ``(det_y, det_x, scan_y, scan_x)``, as Gatan and Velox write it, instead of Fortran order.
    """

    align = 1
    layout = None

    def __init__(self, header: Header, path: str, start: int, dtype: np.dtype, *, detector_first: bool = False) -> None:
        self.header = header
        self._path = path
        self._start = start
        self._dtype = dtype
        self._detector_first = detector_first
        with os_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` if the file is too short."""
        check_request(self.header, start, stop, out)
        if start == stop:
            return
        at = self._positions(start, stop)
        low, high = int(at.min()), int(at.max()) + 1
        size_y, size_x = self.header.det_shape
        plane, pixels = self.header.frames, size_y * size_x
        # neighbouring planes in one read only where most of what lies between is wanted
        group = PIECE_BYTES // (plane * self._dtype.itemsize) if 2 * (high - low) >= plane else 1
        for pixel in range(0, pixels, max(1, group)):
            count = min(max(1, group), pixels - pixel)
            values = self._values(pixel * plane + low, (count - 1) * plane + high - low, start)
            for k in range(count):
                if self._detector_first:
                    y, x = divmod(pixel + k, size_x)
                else:
                    x, y = divmod(pixel + k, size_y)  # planes: det_y fastest
                out[:, y, x] = values[k * plane + at - low]

    def _positions(self, start: int, stop: int) -> np.ndarray:
        """Index of each frame inside a plane: (stop - start,) int64."""
        index = np.arange(start, stop)
        if len(self.header.scan_shape) < 2 or self._detector_first:
            return index
        rows, columns = self.header.scan_shape
        y, x = np.divmod(index, columns)
        return np.asarray(y + rows * x)

    def _values(self, first: int, count: int, frame: int) -> np.ndarray:
        """``count`` pixels from the ``first`` of the array, in file order."""
        values = np.empty(count, self._dtype)
        buffer = values.view(np.uint8).data
        offset = self._start + first * self._dtype.itemsize
        while buffer:
            try:
                n = os.preadv(self._fd, [buffer], offset)
            except OSError as error:
                raise self._missing(f"can't be read: {error.strerror}", frame) from error
            if n == 0:
                raise self._missing("the file ends early", frame)
            buffer, offset = buffer[n:], offset + n
        return values

    def _missing(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._path, frame=frame, next_step="copy the file again from the microscope")

    def complete(self) -> None:
        """Raise `MissingData` if the file is shorter than the array; every frame lacks pixels then."""
        with os_errors(self._path):
            size = os.fstat(self._fd).st_size
        pixels = self.header.frames * self.header.det_shape[0] * self.header.det_shape[1]
        wanted = self._start + pixels * self._dtype.itemsize
        if size < wanted:
            raise self._missing(f"the file has {size} of {wanted} bytes", 0)

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def array_source(header: Header, path: str, start: int, dtype: np.dtype, *, fortran: bool) -> Source:
    """The source of a plain array that begins at byte ``start``, in either order."""
    return FortranSource(header, path, start, dtype) if fortran else c_order(header, path, start, dtype)


def refuse_growing(path: str, *, fortran: bool) -> None:
    """Raise `Incomplete` for an array in Fortran order that is still being written."""
    if fortran:
        raise Incomplete("in Fortran order no frame is whole before the last byte", path=path, next_step="wait")
