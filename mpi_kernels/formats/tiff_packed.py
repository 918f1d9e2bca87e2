"""TIFF pages that are compressed, in tiles or in scattered strips, undone by tifffile."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData
from mpi_kernels.formats.access import check_caps
from mpi_kernels.formats.pixels import stored_dtype
from mpi_kernels.formats.plan import check_request
from mpi_kernels.layout import Layout

_AGAIN = "copy the file again, or save it uncompressed"


@contextmanager
def _library(path: str) -> Iterator[Any]:
    """An opened ``tifffile.TiffFile``; whatever goes wrong in it is one of our errors."""
    try:
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of damage it tells stderr as well as its caller
    except ImportError as error:
        raise FormatError(
            "its pixels are compressed, and tifffile is not installed",
            path=path,
            next_step="pip install 'emflow[formats]', or save it uncompressed",
        ) from error
    try:
        with tifffile.TiffFile(os.fspath(path)) as file:
            yield file
    except KernelError:
        raise
    except Exception as error:
        raise FormatError(f"tifffile can't read it: {error!s:.200}", path=path, next_step=_AGAIN) from error


def described(path: str, size: int) -> tuple[int, tuple[int, int], np.dtype, str]:
    """Pages, their shape and type as stored, and the first one's description.

    Raises
    ------
    Incomplete
        The pixels of a page are not in the file; names it.
    FormatError
        Colours, unequal pages, damage, or tifffile is not installed.
    """
    with _library(path) as file:
        pages = [p for p in file.pages if not getattr(p, "subfiletype", 0) & 1]
        if not pages:
            raise Incomplete("no page is in it yet", path=path, frame=0, next_step="wait for the writer")
        first = pages[0]
        for i, page in enumerate(pages):
            if page.shape != first.shape or page.dtype != first.dtype:
                raise FormatError(f"page {i} is unlike the first", path=path, frame=i, next_step="save equal images")
            ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
            if not ends or max(ends) > size or 0 in page.databytecounts:
                raise Incomplete(f"{i} of {len(pages)} frames are there", path=path, frame=i, next_step="wait")
        if len(first.shape) != 2 or first.dtype is None:
            raise FormatError(f"pages of shape {first.shape}: colours", path=path, next_step="save grey images")
        stored = stored_dtype(np.dtype(first.dtype).str, path)
        shape = (int(first.shape[0]), int(first.shape[1]))
        check_caps(path, len(pages), shape[0] * shape[1] * stored.itemsize)
        return len(pages), shape, stored, str(first.description)[: 1 << 16]


class PackedSource:
    """Frames of compressed pages, one after the other through tifffile.

    Parameters
    ----------
    header : Header
        What the format found.
    path : str
        The file.
    """

    align = 1
    layout: Layout | None = None

    def __init__(self, header: Header, path: str) -> None:
        self.header = header
        self._path = path

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        if start == stop:
            return
        frame = start
        try:
            with _library(self._path) as file:
                pages = [p for p in file.pages if not getattr(p, "subfiletype", 0) & 1]
                for frame in range(start, stop):
                    size, page = os.stat(self._path).st_size, pages[frame]  # noqa: PTH116
                    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
                    if max(ends) > size or 0 in page.databytecounts:  # tifffile would give zeros
                        raise self._gone("its pixels are not in the file", frame)
                    out[frame - start] = page.asarray()
        except FormatError as error:
            raise self._gone(error.message, frame) from error

    def _gone(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._path, frame=frame, next_step=_AGAIN)

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose pixels are not in the file."""
        try:
            count, *_ = described(self._path, os.stat(self._path).st_size)  # noqa: PTH116
        except (Incomplete, FormatError) as error:
            raise self._gone(error.message, error.frame or 0) from error
        if count < self.header.frames:
            raise self._gone(f"{count} of {self.header.frames} pages are in the file", count)

    def close(self) -> None:
        """Nothing stays open between two reads."""
