"""Files as detector software writes them: whole after a rename, or growing row by row.

Apart from `emflow.synthetic`, since this runs wherever a microscope's software runs, keeps real calibrations, and is
given its frames one row after the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

MERLIN_LEAD = 384
"""Bytes of the header before each frame of a Merlin detector of one chip."""

SUFFIXES = {"npy": ".npy", "merlin": ".mib", "hdf5": ".h5"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What is written.

    Attributes
    ----------
    shape : tuple of int
        ``(det_y, det_x)``, ``(frames, det_y, det_x)`` or ``(scan_y, scan_x, det_y, det_x)``.
    dtype : numpy.dtype
        Native byte order.
    piece : int
        Frames, or rows of an image, that are appended at a time; pieces don't cross scan rows.
    properties : dict
        Nion Swift's description, which calibrates every axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    piece: int
    properties: dict[str, Any]


class File(Protocol):
    """A file that takes frames (rows, for an image) in their order."""

    def append(self, block: NDArray[Any]) -> None:
        """Add the next (n, ...) of them, and hand them to the operating system."""

    def close(self) -> None:
        """End it, whole or not."""


class Npy:
    """NumPy's array file."""

    def __init__(self, path: Path, data: Dataset) -> None:
        self._file = path.open("xb")
        described = {"descr": data.dtype.str, "fortran_order": False, "shape": data.shape}
        np.lib.format.write_array_header_1_0(self._file, described)
        self._file.flush()

    def append(self, block: NDArray[Any]) -> None:
        """Add frames or rows."""
        self._file.write(np.ascontiguousarray(block).data)
        self._file.flush()

    def close(self) -> None:
        """End it."""
        self._file.close()


class Merlin:
    """Quantum Detectors' .mib of one chip; see `mpi_kernels.formats.merlin` for the layout."""

    def __init__(self, path: Path, data: Dataset) -> None:
        self._file = path.open("xb")
        rows, columns = data.shape[-2:]
        bits = 8 * data.dtype.itemsize
        exposure_s = data.properties["metadata"]["hardware_source"]["exposure"]
        self._before = (
            f",{MERLIN_LEAD:05d},01,{columns:04d},{rows:04d},U{bits:02d},   1x1,01,2024-01-01 12:00:00.000000"
        )
        self._after = f",{exposure_s:.6f},0,0,0,MQ1A,2024-01-01T12:00:00.000000000Z,{round(exposure_s * 1e9)}ns,{bits},"
        self._stored = data.dtype.newbyteorder(">")
        self._written = 0

    def append(self, block: NDArray[Any]) -> None:
        """Add frames, each behind its header."""
        for frame in block.astype(self._stored):
            self._written += 1
            text = f"MQ1,{self._written:06d}{self._before}{self._after}"
            self._file.write(text.encode("ascii").ljust(MERLIN_LEAD, b"\0") + frame.tobytes())
        self._file.flush()

    def close(self) -> None:
        """End it."""
        self._file.close()


class Hdf5:
    """Nion Swift's .h5: ``/data`` with JSON ``properties``.

    One that grows under its final name has a chunk per piece, so that a reader can tell what a killed writer left out;
    one that is renamed when it is whole is contiguous, as Swift writes up to 58 MB.
    """

    def __init__(self, path: Path, data: Dataset, *, grows: bool) -> None:
        import h5py

        self._file = h5py.File(path, "x")
        frames = len(data.shape) > 2
        unit = data.shape[-2:] if frames else data.shape[-1:]
        chunk = (*(1 for _ in data.shape[1 : len(data.shape) - len(unit)]), data.piece, *unit)
        self._data = self._file.create_dataset("data", data.shape, data.dtype, chunks=chunk if grows else None)
        self._data.attrs["properties"] = json.dumps(data.properties)
        self._file.flush()
        self._columns = data.shape[1] if len(data.shape) == 4 else 0
        self._written = 0

    def append(self, block: NDArray[Any]) -> None:
        """Add frames or rows, where they belong in the array."""
        if self._columns:
            row, column = divmod(self._written, self._columns)
            self._data[row, column : column + len(block)] = block
        else:
            self._data[self._written : self._written + len(block)] = block
        self._written += len(block)
        self._file.flush()

    def close(self) -> None:
        """End it; h5py's file is closed with all its objects."""
        self._file.close()


Format = Literal["npy", "merlin", "hdf5"]


@contextmanager
def writing(path: Path, form: Format, data: Dataset, *, grows: bool) -> Iterator[File]:
    """A file to append to; at the end of the block it lies whole, and on the disk, under ``path``.

    A ``.json`` (npy) or ``.hdr`` (Merlin) that describes it is there before the name of the file itself.  If the block
    raises, nothing is left, except that a file which ``grows`` stays as far as it got.

    Raises
    ------
    FileExistsError
        There is something of that name: a scan is never written over.
    """
    beside = _described(path, form, data)
    if path.exists():
        raise FileExistsError("a file of that name is there already")
    target = path if grows else path.with_name(f".{path.name}.part")
    if not grows:
        target.unlink(missing_ok=True)  # of a process that was killed: its name says that it was never published
    try:
        if grows:
            _describe(beside)
        file = _opened(target, form, data, grows=grows)
        try:
            yield file
        finally:
            file.close()
        _sync(target)
        if not grows:
            _describe(beside)
            target.rename(path)
    except BaseException:
        if not grows:
            for left in (target, *beside):
                left.unlink(missing_ok=True)
        raise


def _opened(path: Path, form: Format, data: Dataset, *, grows: bool) -> File:
    if form == "hdf5":
        return Hdf5(path, data, grows=grows)
    return Merlin(path, data) if form == "merlin" else Npy(path, data)


def _described(path: Path, form: Format, data: Dataset) -> dict[Path, bytes]:
    """Files that lie beside a file of this format, and what they say."""
    if form == "npy":
        return {path.with_suffix(".json"): json.dumps(data.properties).encode()}
    return {path.with_suffix(".hdr"): _hdr(data).encode("ascii")} if form == "merlin" else {}


def _describe(beside: dict[Path, bytes]) -> None:
    for path, text in beside.items():
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(text)
        _sync(temporary)
        temporary.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _hdr(data: Dataset) -> str:
    """Merlin's description of the acquisition; its scan shape is that of software 1.5."""
    scan = data.shape[:-2]
    lines = {
        "Time and Date Stamp (day, mnth, yr, hr, min, s)": "01/01/2024 12:00:00",
        "Counter Depth (number)": {1: 6, 2: 12, 4: 24}[data.dtype.itemsize],
        "Frames in Acquisition (Number)": math.prod(scan),
        "Frames per Trigger (Number)": scan[1] if len(scan) == 2 else 1,
        "Software Version": "1.5.0.197",
    }
    if len(scan) == 2:
        lines |= {"ScanX": scan[1], "ScanY": scan[0]}
    return "HDR,\t\r\n" + "".join(f"{name}:\t{value}\r\n" for name, value in lines.items()) + "End\t" + " " * 100
