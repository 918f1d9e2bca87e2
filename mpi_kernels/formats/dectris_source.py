"""Frames of a Dectris acquisition: one stack after another, flags as zeros."""

from __future__ import annotations

import bisect
import dataclasses
import functools

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import MissingData
from mpi_kernels.formats.hdf5_source import ChunkedSource
from mpi_kernels.formats.plan import check_request
from mpi_kernels.layout import Layout


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A data file: its dataset, its number in the acquisition, and which frames it holds."""

    path: str
    dataset: str
    number: int
    first: int
    frames: int


class DectrisSource:
    """Reads the parts in turn, with one of them open at a time.

    Parameters
    ----------
    header : Header
        Of the acquisition.
    parts : tuple of Part
        In scan order, without a gap.
    """

    def __init__(self, header: Header, parts: tuple[Part, ...]) -> None:
        self.header = header
        self.threads = 1
        self._parts = parts
        self._firsts = [p.first for p in parts]
        self._open: tuple[int, ChunkedSource] | None = None
        dtype = np.dtype(header.dtype)
        self._flag = int(np.iinfo(dtype).max) if dtype.kind == "u" else None
        self.align = self._source(0).align

    @functools.cached_property
    def layout(self) -> Layout | None:
        """Where the frames lie in all files, if all are stored in one way that can be read without HDF5."""
        found = []
        for number, part in enumerate(self._parts):
            layout = self._source(number).layout
            last = number == len(self._parts) - 1
            if layout is None or (part.frames % layout.record_frames and not last):
                return None
            found.append(layout)
        if len({(f.codec, f.element, f.payload, f.record_frames, f.dtype) for f in found}) > 1:
            return None
        offsets = [_offsets(f, p.frames) for f, p in zip(found, self._parts, strict=True)]
        sizes = [f.sizes for f in found if f.sizes is not None]
        return dataclasses.replace(
            found[0],
            files=tuple(p.path for p in self._parts),
            first=0,
            offsets=np.concatenate(offsets),
            file_of=np.repeat(np.arange(len(found), dtype=np.int32), [len(o) for o in offsets]),
            sizes=np.concatenate(sizes) if sizes else None,
            flag=self._flag,
        )

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        at = start
        while at < stop:
            number = bisect.bisect_right(self._firsts, at) - 1
            part = self._parts[number]
            end = min(stop, part.first + part.frames)
            target = out[at - start : end - start]
            try:
                source = self._source(number)
                source.threads = self.threads
                source.frames(at - part.first, end - part.first, target)
            except MissingData as error:
                raise self._missing(error, part) from error
            if self._flag is not None:
                np.putmask(target, target == self._flag, 0)
            at = end

    def _missing(self, error: MissingData, part: Part) -> MissingData:
        frame = part.first + (error.frame or 0)
        return MissingData(error.message, path=error.path, frame=frame, next_step=error.next_step)

    def _source(self, number: int) -> ChunkedSource:
        if self._open is None or self._open[0] != number:
            self.close()
            part = self._parts[number]
            header = dataclasses.replace(self.header, kind="stack", scan_shape=(part.frames,), scan_axes=())
            self._open = number, ChunkedSource(header, part.path, part.dataset)
        return self._open[1]

    def complete(self) -> None:
        """Raise `MissingData` with the first frame that is not in its file."""
        for number, part in enumerate(self._parts):
            try:
                self._source(number).complete()
            except MissingData as error:
                raise self._missing(error, part) from error

    def close(self) -> None:
        """Give the files back; more than once does no harm."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _offsets(layout: Layout, frames: int) -> np.ndarray:
    if layout.offsets is not None:
        return layout.offsets
    return layout.first + layout.record * np.arange(frames, dtype=np.int64)
