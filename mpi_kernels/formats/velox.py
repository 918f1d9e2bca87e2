"""Thermo Fisher Velox, .emd: HDF5 whose image stacks are stored with the frames last."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header, Scalar
from mpi_kernels.errors import FormatError, Incomplete, MissingData, NotThisFormat
from mpi_kernels.formats.access import check_caps, member
from mpi_kernels.formats.hdf5_open import library_errors, opened, walk
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of, stored_dtype
from mpi_kernels.formats.plan import check_request
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

_IMAGE = re.compile(r"/Data/Image/[0-9a-f]{32}/Data")
METADATA_LIMIT = 1 << 22
PIECE_BYTES = 64 << 20
"""Bytes of a piece in file order; bounds the memory of a source, unless one chunk is more."""

MAX_CHUNK_BYTES = 1 << 30
_ENOUGH = 1 << 20
"""Chunks that are looked up one by one; more are believed to be there, and missed when they are read."""


class Velox:
    """Velox image stacks.

    Layout: ``/Data/Image/<32 hex digits>/Data`` is ``(y, x, frame)``, chunked; ``Metadata`` beside it is JSON, one
    column of bytes for each frame.  Of several images the largest is taken, with a warning.  Spectra are not read.
    Source: rosettasciio's ``emd`` reader (read, not copied) and real files.

    Complete when HDF5's own end of file is there, no writer has it open, and no chunk is missing; as for all of HDF5
    the rule is stability.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".emd",)

    def probe(self, path: str) -> Header:
        """Read metadata only; holds HDF5's lock for that moment."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return VeloxSource(*_probe(path), path)


def _probe(path: str) -> tuple[Header, str]:
    with opened(path) as file:
        found = walk(file, path).datasets
        images = sorted((n for n in found if _IMAGE.fullmatch(n)), key=lambda n: (-found[n].size, n))
        if not images:
            raise NotThisFormat("no image of Velox is in it", path=path)
        name, dataset = images[0], found[images[0]]
        stored = _checked(dataset, name, path)
        rows, columns, frames = (int(n) for n in (*dataset.shape, 1)[:3])
        check_caps(path, frames, stored.itemsize * rows * columns)
        lost = next(_missing(dataset, 0, frames), None)
        if lost is not None:
            raise Incomplete("its chunk was never written", path=path, frame=lost, next_step="wait for Velox")
        scan_shape = (frames,) if frames > 1 or dataset.ndim == 3 else ()
        det_axes, facts = _described(found.get(name.removesuffix("Data") + "Metadata"), scan_shape)
        header = Header(
            format="velox",
            kind=kind_of(scan_shape),
            scan_shape=scan_shape,
            det_shape=(rows, columns),
            dtype=delivered_dtype(stored).name,
            members=(member(path, ".emd"),),
            rule="stability",
            det_axes=det_axes,
            metadata={"dataset": name, **facts},
            warnings=(f"{len(images)} images are in it: the largest is taken",) if len(images) > 1 else (),
        )
        return header, name


def _checked(dataset: Any, name: str, path: str) -> np.dtype:
    """The stored pixel type, after everything that must not be read has been refused."""
    plist = dataset.id.get_create_plist()
    if dataset.is_virtual or plist.get_external_count() > 0:
        raise FormatError(f"{name} lies in other files", path=path, next_step="export it from Velox again")
    if dataset.ndim not in (2, 3) or 0 in dataset.shape:
        raise FormatError(f"{name} has shape {dataset.shape}", path=path, next_step="export it from Velox again")
    stored = stored_dtype(dataset.dtype.str, path)
    if dataset.chunks and math.prod(dataset.chunks) * stored.itemsize > MAX_CHUNK_BYTES:
        raise FormatError(f"its chunks are {dataset.chunks}", path=path, next_step="export it from Velox again")
    return stored


def _missing(dataset: Any, start: int, stop: int) -> Iterator[int]:
    """The frames at which a chunk begins that was never written (HDF5 would give zeros), or all of an array's."""
    if not dataset.chunks:
        if dataset.id.get_storage_size() < dataset.size * dataset.dtype.itemsize:
            yield start
        return
    shape, chunks = (*dataset.shape, 1)[:3], (*dataset.chunks, 1)[:3]
    steps = [range(0, n, c) for n, c in zip(shape, chunks, strict=True)]
    firsts = range(start // chunks[2] * chunks[2], stop, chunks[2])
    every = itertools.product(firsts, steps[0], steps[1])
    for frame, y, x in itertools.islice(every, _ENOUGH):
        info = dataset.id.get_chunk_info_by_coord((y, x, frame)[: dataset.ndim])
        if info.byte_offset is None or info.size == 0:
            yield max(frame, start)


def _described(dataset: Any, scan_shape: tuple[int, ...]) -> tuple[tuple[Axis, ...], dict[str, Scalar]]:
    """Calibration and facts from the first frame's JSON; nothing where it can't be read."""
    if dataset is None or dataset.ndim != 2 or dataset.dtype != np.uint8 or dataset.shape[0] > METADATA_LIMIT:
        return (), {}
    text = bytes(dataset[:, 0]).partition(b"\0")[0]
    try:
        value = json.loads(text)
        optics, result = value.get("Optics", {}), value.get("BinaryResult", {})
        pixel = [(float(result["PixelSize"][k]), str(result.get(f"PixelUnit{a}", ""))[:16]) for k, a in _SIDES]
        facts: dict[str, Scalar] = {
            "high_tension_v": float(optics.get("AccelerationVoltage", "nan")),
            "camera_length_m": float(optics.get("CameraLength", "nan")),
            "camera": str(result.get("Detector", ""))[:64],
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (), {}
    scan = [(1.0, 0.0, "px")] * len(scan_shape)
    _, det_axes = axes(scan_shape, [*scan, *((scale, 0.0, unit) for scale, unit in pixel)])
    return det_axes, {k: v for k, v in facts.items() if v and not (isinstance(v, float) and math.isnan(v))}


_SIDES = (("height", "Y"), ("width", "X"))


class VeloxSource:
    """Frames of a ``(y, x, frame)`` dataset, read through HDF5 in pieces and turned in memory.

    Parameters
    ----------
    header : Header
        What the format found.
    name : str
        Path of the dataset inside the file.
    path : str
        The file.
    """

    layout: Layout | None = None

    def __init__(self, header: Header, name: str, path: str) -> None:
        import h5py

        self.header = header
        self._path = path
        with library_errors(path):
            self._file = h5py.File(os.fsencode(path), "r", locking="best-effort", rdcc_nbytes=PIECE_BYTES)
            self._size = self._file.id.get_filesize()
            self._dataset = self._file[name]
            chunks = self._dataset.chunks
            self.align = int(min(chunks[2], self._dataset.shape[2])) if chunks and self._dataset.ndim == 3 else 1

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        frame_bytes = math.prod(self.header.det_shape) * self._dataset.dtype.itemsize
        step = max(self.align, PIECE_BYTES // frame_bytes // self.align * self.align, 1)
        while start < stop:
            end = min(stop, (start // step + 1) * step)
            part, out = out[: end - start], out[end - start :]
            self._read(start, end, part)
            start = end

    def _read(self, start: int, stop: int, out: np.ndarray) -> None:
        try:
            lost = next(_missing(self._dataset, start, stop), None)
            if lost is None:
                piece = self._dataset[..., start:stop] if self._dataset.ndim == 3 else self._dataset[..., None]
                out[...] = np.moveaxis(piece, -1, 0)
        except (OSError, RuntimeError) as error:
            raise self._gone(f"HDF5 can't read it: {error!s:.200}", start) from error
        if lost is not None:
            raise self._gone("its chunk was never written", lost)
        # HDF5 fills what lies behind the end of a file with zeros
        if os.fstat(self._file.id.get_vfd_handle()).st_size < self._size:
            raise self._gone(f"the file was cut off: it had {self._size} bytes", start)

    def _gone(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._path, frame=frame, next_step="copy the file again from the microscope")

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose chunk is not in the file."""
        with library_errors(self._path):
            lost = next(_missing(self._dataset, 0, self.header.frames), None)
        if lost is not None:
            raise self._gone("its chunk was never written", lost)

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        self._file.close()
