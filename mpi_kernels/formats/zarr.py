"""Zarr folders, .zarr, and HyperSpy's .zspy: arrays in chunks, one file each."""

from __future__ import annotations

import collections
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header, Member
from mpi_kernels.errors import FormatError, Incomplete, MissingData, NotThisFormat
from mpi_kernels.formats import zarr_array
from mpi_kernels.formats.access import check_caps, json_object, os_errors, read_at
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of, split_shape
from mpi_kernels.formats.plan import check_request
from mpi_kernels.formats.zarr_array import Array
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

MAX_FOLDERS = 2000
CACHE_BYTES = 64 << 20
"""Decoded chunks that are kept, at least one: what two blocks share is undone once."""

_MISSING = "its chunk file is not there"
_NEXT = "copy the folder again; zarr leaves out chunks of zeros unless it writes with write_empty_chunks=True"


class Zarr:
    """Zarr version 2 and 3, a folder on a local disk.

    Layout: the array with the most axes, of those in the folder; HyperSpy's is ``Experiments/<title>/data`` and its
    axes calibrate it.  Chunks are whole files, compressed with blosc, zstd, lz4, gzip, zlib, bz2, lzma or not at all.
    Shards, filters, Fortran order and object types are refused; links are never followed.  Source: Zarr
    specifications 2 and 3.0; rosettasciio's ``zspy`` format.

    Complete when the file of every chunk is there.  Zarr itself reads a missing chunk as its fill value, and leaves
    out chunks of zeros by default: such an array is refused here, since nobody can tell it from a copy that was cut
    short.  Chunks are written in any order, so the rule is stability.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".zarr", ".zspy")
    folders: ClassVar[bool] = True

    def probe(self, path: str) -> Header:
        """Read the JSON files, and look whether each chunk has a file."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return ZarrSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Array]:
    if not os.path.isdir(path):  # noqa: PTH112
        raise NotThisFormat("a Zarr array is a folder", path=path)
    if not any(os.path.isfile(os.path.join(path, n)) for n in (zarr_array.V2, zarr_array.V3, ".zgroup")):  # noqa: PTH113, PTH118
        raise NotThisFormat("it has no description of a Zarr array or group", path=path)
    array, described = _find(path)
    _, scan_shape, det_shape = split_shape(array.shape, path)
    if len(scan_shape) + 2 != len(array.shape):
        raise FormatError(f"an array of shape {array.shape}", path=path, next_step="remove its axes of length 1")
    check_caps(path, math.prod(scan_shape), array.stored.itemsize * math.prod(det_shape))
    lost = _first_missing(array)
    if lost is not None:
        raise Incomplete(_MISSING, path=path, frame=lost, next_step=_NEXT)
    scan_axes, det_axes = _axes(described, scan_shape)
    header = Header(
        format="zarr",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(array.stored).name,
        members=(Member(path=path, suffix=".zarr", size=os.stat(path).st_size),),  # noqa: PTH116
        rule="stability",
        scan_axes=scan_axes,
        det_axes=det_axes,
        metadata={"dataset": os.path.relpath(array.path, path)},
    )
    return header, array


def _find(path: str) -> tuple[Array, Mapping[str, Any]]:
    """The array with the most axes, and the attributes of the axes that HyperSpy puts beside it."""
    found: list[Array] = []
    refused: FormatError | None = None
    for folder in _array_folders(path):
        try:
            found.append(zarr_array.read(folder))
        except FormatError as error:  # lookup tables and texts lie beside HyperSpy's data
            refused = refused or error
    if not found:
        raise refused or NotThisFormat("no Zarr array is in it", path=path)
    most = max(len(a.shape) for a in found)
    best = [a for a in found if len(a.shape) == most]
    if len(best) > 1:
        names = ", ".join(os.path.relpath(a.path, path) for a in best[:4])
        raise FormatError(f"several arrays could be meant: {names:.200}", path=path, next_step="name one of them")
    return best[0], _hyperspy(best[0])


def _array_folders(path: str) -> Iterator[str]:
    """Folders that are arrays, without going into them and without following links."""
    todo, seen = [path], 0
    while todo:
        folder, seen = todo.pop(), seen + 1
        if seen > MAX_FOLDERS:
            raise FormatError(f"it has more than {MAX_FOLDERS} folders", path=path, next_step="name the array inside")
        if os.path.isfile(os.path.join(folder, zarr_array.V2)) or _is_array_3(folder):  # noqa: PTH113, PTH118
            yield folder
            continue
        with os_errors(folder), os.scandir(folder) as entries:
            todo += sorted((e.path for e in entries if e.is_dir(follow_symlinks=False)), reverse=True)


def _is_array_3(folder: str) -> bool:
    said = os.path.join(folder, zarr_array.V3)  # noqa: PTH118
    return os.path.isfile(said) and json_object(said).get("node_type") == "array"  # noqa: PTH113


def _hyperspy(array: Array) -> Mapping[str, Any]:
    """``axis-<n>`` of the group that holds the array: attributes by name."""
    found: dict[str, Any] = {}
    folder = os.path.dirname(array.path)  # noqa: PTH120
    for n in range(len(array.shape)):
        for name, key in ((".zattrs", None), (zarr_array.V3, "attributes")):
            said = os.path.join(folder, f"axis-{n}", name)  # noqa: PTH118
            if os.path.isfile(said):  # noqa: PTH113
                value = json_object(said)
                found[str(n)] = value if key is None else value.get(key)
    return found


def _axes(described: Mapping[str, Any], scan_shape: tuple[int, ...]) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    calibrations = []
    for n in range(len(scan_shape) + 2):
        one = described.get(str(n))
        if not isinstance(one, dict):
            return (), ()
        scale, offset, unit = one.get("scale"), one.get("offset"), one.get("units")
        if not isinstance(scale, (int, float)) or not isinstance(offset, (int, float)):
            return (), ()
        # "<undefined>" is HyperSpy's word for none
        named = unit[:64] if isinstance(unit, str) and not unit.startswith("<") else ""
        calibrations.append((float(scale), float(offset), named))
    return axes(scan_shape, calibrations)


def _first_missing(array: Array) -> int | None:
    """The first frame that lies in a chunk whose file is not there or empty."""
    there = set(_files(array.path, array.prefix + array.separator))
    grid = [range(-(-n // c)) for n, c in zip(array.shape, array.chunks, strict=True)]
    # in this order the first frames of chunks never go down, and at most one chunk more than there are files is asked
    for index in itertools.product(*grid):
        if array.name(index) not in there:
            return _first_frame(array, index[: len(array.shape) - 2])
    return None


def _first_frame(array: Array, index: tuple[int, ...]) -> int:
    frame = 0
    for i, c, n in zip(index, array.chunks, array.shape[: len(index)], strict=False):
        frame = frame * n + i * c
    return frame


def _files(folder: str, named: str) -> Iterator[str]:
    """Files that hold something, by their name inside the folder; sub-folders only where names have slashes."""
    todo = [""]
    while todo:
        inside = todo.pop()
        with os_errors(folder), os.scandir(os.path.join(folder, inside)) as entries:  # noqa: PTH118
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if "/" in named:
                        todo.append(f"{inside}{entry.name}/")
                elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size:
                    yield inside + entry.name


class ZarrSource:
    """Frames of a Zarr array; each chunk is undone once while it stays in the cache.

    Parameters
    ----------
    header : Header
        What the format found.
    array : Array
        Where the chunks are.
    """

    layout: Layout | None = None

    def __init__(self, header: Header, array: Array) -> None:
        self.header = header
        self._array = array
        self._scan = len(array.shape) - 2
        self._undo: Callable[[bytes, np.ndarray], int] = zarr_array.decoder(array)
        self._cache: collections.OrderedDict[tuple[int, ...], np.ndarray] = collections.OrderedDict()
        self.align = self._alignment()

    def _alignment(self) -> int:
        if self._scan == 0:
            return 1
        inner = min(self._array.chunks[self._scan - 1], self._array.shape[self._scan - 1])
        if self._scan == 1:
            return inner
        rows, width = min(self._array.chunks[0], self._array.shape[0]), self._array.shape[1]
        return inner if rows == 1 and width % inner == 0 else rows * width

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        scan_shape, chunks = self.header.scan_shape, self._array.chunks
        while start < stop:
            at = [int(i) for i in np.unravel_index(start, scan_shape)] if scan_shape else []
            end = start + 1
            if scan_shape:  # as many frames as follow one another within one chunk, along the fastest axis
                within = chunks[self._scan - 1] - at[-1] % chunks[self._scan - 1]
                end = start + min(within, scan_shape[-1] - at[-1], stop - start)
            self._fill(start, at, out[: end - start])
            out, start = out[end - start :], end

    def _fill(self, frame: int, at: list[int], out: np.ndarray) -> None:
        array, scan = self._array, self._scan
        lead = [i // c for i, c in zip(at, array.chunks, strict=False)]
        inner = [i % c for i, c in zip(at, array.chunks, strict=False)]
        height, width = array.chunks[scan:]
        for j, k in itertools.product(
            range(-(-array.shape[scan] // height)), range(-(-array.shape[scan + 1] // width))
        ):
            chunk = self._chunk((*lead, j, k), frame)
            rows = min(height, array.shape[scan] - j * height)
            columns = min(width, array.shape[scan + 1] - k * width)
            for i in inner[:-1]:
                chunk = chunk[i]
            chunk = chunk[inner[-1] : inner[-1] + len(out)] if inner else chunk[None]
            out[:, j * height : j * height + rows, k * width : k * width + columns] = chunk[:, :rows, :columns]

    def _chunk(self, index: tuple[int, ...], frame: int) -> np.ndarray:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        array = self._array
        path = os.path.join(os.path.realpath(array.path), array.name(index))  # noqa: PTH118
        if not os.path.isfile(path) or os.path.realpath(path) != path:  # noqa: PTH113 - a link may lead anywhere
            raise self._gone(_MISSING, frame)
        limit = 2 * array.chunk_bytes + (1 << 16)
        stored = read_at(path, 0, limit)
        out = np.empty(array.chunk_bytes, np.uint8)
        try:
            filled = self._undo(stored, out)
        except (ValueError, RuntimeError, TypeError) as error:
            raise self._gone(f"chunk {array.name(index)} can't be undone: {error!s:.120}", frame) from error
        if filled != out.nbytes:
            raise self._gone(f"chunk {array.name(index)} holds {filled} of {out.nbytes} bytes", frame)
        while self._cache and (len(self._cache) + 1) * out.nbytes > CACHE_BYTES:
            self._cache.popitem(last=False)
        self._cache[index] = out.view(array.stored).reshape(array.chunks)
        return self._cache[index]

    def _gone(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._array.path, frame=frame, next_step=_NEXT)

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose chunk has no file."""
        lost = _first_missing(self._array)
        if lost is not None:
            raise self._gone(_MISSING, lost)

    def close(self) -> None:
        """Forget what was undone; more than once does no harm."""
        self._cache.clear()
