"""stempy's counted data: for each frame the pixels in which an electron was found."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, MissingData, NotThisFormat
from mpi_kernels.formats.access import check_caps, member
from mpi_kernels.formats.hdf5_checks import activate_filters, checked_layout, offset_of
from mpi_kernels.formats.hdf5_open import attribute, library_errors, opened
from mpi_kernels.formats.pixels import kind_of
from mpi_kernels.formats.plan import check_request
from mpi_kernels.protocols import Source
from mpi_kernels.sparse import Events, densify

FRAMES, POSITIONS = "electron_events/frames", "electron_events/scan_positions"
ROWS_AT_ONCE = 4096
MAX_ROWS = 1 << 28
VLEN = np.dtype("V16")
"""What a list takes in the array itself: its length, and where it lies in a heap (File Format Specification 3.0,
section IV.A.2.d, with addresses of 8 bytes)."""

_WAIT = "wait for the writer, or count the scan again"


class Stempy:
    """Electron events as stempy writes them (its versions 1 to 3).

    Layout: ``electron_events/frames`` is an array of lists of uint32, (rows,) or (rows, frames per position): a pixel
    is ``y * Nx + x``, and one that is named twice counted twice.  ``electron_events/scan_positions`` (rows,) says
    where in the scan each row belongs; rows of one position add up.  ``Nx`` and ``Ny`` are width and height, of the
    frame and of the scan.  Source: stempy, docs/StempyH5Format.md.

    Delivered as frames of uint32, and as events, from which all terms are computed without making frames.

    Complete when every scan position has a row.  HDF5 files do not know their own end: stability.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".h5", ".hdf5")

    def probe(self, path: str) -> Header:
        """Read the shapes and which scan positions are there."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return StempySource(*_probe(path), path)


def _probe(path: str) -> tuple[Header, np.ndarray]:
    """The header, and the scan position of every row."""
    with opened(path) as file:
        frames, positions = _datasets(file, path)
        det_shape, scan_shape = _shape(frames, "frames", path), _shape(positions, "scan_positions", path)
        check_caps(path, scan_shape[0] * scan_shape[1], 4 * det_shape[0] * det_shape[1])
        _there(positions, positions.dtype, np.zeros(len(positions), np.int64), path)
        rows = positions[...]
        _there(frames, VLEN, rows, path)
    total = scan_shape[0] * scan_shape[1]
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < total:
        raise FormatError(
            f"its scan positions reach from {int(rows.min())} to {int(rows.max())}, the scan has {total}",
            path=path,
            next_step="count the scan again",
        )
    found = np.zeros(total, np.bool_)
    found[rows] = True
    if not found.all():
        frame = int(np.argmin(found))
        raise Incomplete(
            f"{np.count_nonzero(found)} of {total} scan positions were counted", path=path, frame=frame, next_step=_WAIT
        )
    suffix = next((s for s in Stempy.suffixes if path.lower().endswith(s)), ".h5")
    header = Header(
        format="stempy",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype="uint32",
        members=(member(path, suffix),),
        rule="stability",
        unit="electrons",
        metadata={"layout": "stempy", "dataset": f"/{FRAMES}", "rows": len(rows)},
        warnings=("the frames are not square: Nx is taken for their width",) if det_shape[0] != det_shape[1] else (),
    )
    return header, rows.astype(np.int64)


def _there(dataset: Any, stored: np.dtype, frame_of: np.ndarray, path: str) -> None:
    """Refuse an array of which a part was never written: HDF5 would give empty lists."""
    try:
        offset_of(dataset, [0], dataset.shape[:1], stored, path)
    except Incomplete as error:
        frame = int(frame_of[error.frame or 0])
        raise Incomplete(f"{dataset.name}: {error.message}", path=path, frame=frame, next_step=_WAIT) from error


def _datasets(file: Any, path: str) -> tuple[Any, Any]:
    import h5py

    group = file.get("electron_events", getlink=True)
    if not isinstance(group, h5py.HardLink) or not isinstance(file["electron_events"], h5py.Group):
        raise NotThisFormat("it holds no counted data: no group electron_events", path=path)
    found = []
    for name in ("frames", "scan_positions"):
        link = file["electron_events"].get(name, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file["electron_events"][name], h5py.Dataset):
            raise FormatError(f"electron_events/{name} is no dataset", path=path, next_step="count the scan again")
        found.append(file["electron_events"][name])
    frames, positions = found
    for dataset in found:
        checked_layout(dataset, dataset.name, path)
    kind = h5py.check_vlen_dtype(frames.dtype)
    if kind is None or np.dtype(kind).kind != "u" or frames.ndim not in (1, 2):
        raise FormatError(
            f"electron_events/frames is no array of lists of numbers ({frames.dtype})",
            path=path,
            next_step="count the scan again",
        )
    if positions.dtype.kind not in "iu" or positions.shape != frames.shape[:1] or len(positions) > MAX_ROWS:
        raise FormatError(
            f"electron_events/scan_positions has shape {positions.shape}, the frames have {frames.shape}",
            path=path,
            next_step="count the scan again",
        )
    return frames, positions


def _shape(dataset: Any, what: str, path: str) -> tuple[int, int]:
    """Height and width from the attributes ``Ny`` and ``Nx``."""
    sides = [
        np.asarray(attribute(dataset, name) if attribute(dataset, name) is not None else 0) for name in ("Ny", "Nx")
    ]
    if any(s.size != 1 or s.dtype.kind not in "iu" or not 0 < int(s.reshape(-1)[0]) < 1 << 20 for s in sides):
        raise FormatError(f"{what} has no usable Nx and Ny", path=path, next_step="count the scan again")
    return int(sides[0].reshape(-1)[0]), int(sides[1].reshape(-1)[0])


class StempySource:
    """Events and frames of one file.

    Parameters
    ----------
    header : Header
        What the format found.
    positions : (rows,) ndarray of int64
        Scan position of every row.
    path : str
        The file.
    """

    align = 1
    layout = None

    def __init__(self, header: Header, positions: np.ndarray, path: str) -> None:
        import h5py

        activate_filters()
        self.header = header
        self._path = path
        self._order = np.argsort(positions, kind="stable")
        self._bounds = np.searchsorted(positions[self._order], np.arange(header.frames + 1))
        self._pixels = header.det_shape[0] * header.det_shape[1]
        with library_errors(path):
            self._file = h5py.File(os.fsencode(path), "r", locking="best-effort")
            self._size = self._file.id.get_filesize()
            self._frames = self._file[FRAMES]

    def events(self, start: int, stop: int) -> Events:
        """Events of frames ``start:stop``, every count 1; `MissingData` names the frame that is not there."""
        if not 0 <= start <= stop <= self.header.frames:
            raise ValueError(f"frames {start}:{stop} are not within 0:{self.header.frames}")
        rows = self._order[self._bounds[start] : self._bounds[stop]]
        lists: list[np.ndarray] = []
        try:
            for a, b in _runs(rows):
                lists += [np.asarray(x) for x in self._frames[int(rows[a]) : int(rows[b - 1]) + 1].reshape(-1)]
        except (OSError, RuntimeError) as error:
            raise self._missing(f"HDF5 can't read it: {error!s:.200}", start) from error
        # HDF5 fills what lies behind the end of a file with zeros, so a file cut off meanwhile is seen by its size
        if os.fstat(self._file.id.get_vfd_handle()).st_size < self._size:
            raise self._missing(f"the file was cut off: it had {self._size} bytes", start)
        per_row = self._frames.shape[1] if self._frames.ndim == 2 else 1
        ends = np.concatenate(([0], np.cumsum([len(x) for x in lists], dtype=np.int64)))
        bounds = ends[(self._bounds[start : stop + 1] - self._bounds[start]) * per_row]
        indices = np.concatenate([np.empty(0, np.int64), *lists]).astype(np.int64, copy=False)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self._pixels:
            bad = int(np.argmax((indices < 0) | (indices >= self._pixels)))
            frame = start + int(np.searchsorted(bounds, bad, "right")) - 1
            raise self._missing(f"an event at pixel {int(indices[bad])} of {self._pixels}", frame)
        return Events(indices, None, bounds)

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        densify(self.events(start, stop), out)

    def _missing(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._path, frame=frame, next_step="copy the file again, or count the scan again")

    def complete(self) -> None:
        """Raise `MissingData` with the first frame that the file should hold and does not."""
        if os.fstat(self._file.id.get_vfd_handle()).st_size < self._size:
            raise self._missing(f"the file was cut off: it had {self._size} bytes", 0)

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        self._file.close()


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Split where rows are not consecutive, and into what is read at once."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for a, b in itertools.pairwise(cuts):
        for c in range(a, b, ROWS_AT_ONCE):
            yield c, min(c + ROWS_AT_ONCE, b)
