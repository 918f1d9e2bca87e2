"""Frames of a layout, read and decoded by compiled threads without Python's global lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from mpi_kernels.contract import Header, Reading
from mpi_kernels.errors import RecipeError, printable
from mpi_kernels.extension import MISSING, native
from mpi_kernels.formats.plan import check_request
from mpi_kernels.layout import Layout
from mpi_kernels.storage import choose
from mpi_kernels.whole import NEVER_WRITTEN, check, refuse

READINGS = ("mmap", "read", "direct")
"""In the order of ``enum feed_reading`` of native/feed.h."""

CODECS = {"": 0, "bitshuffle-lz4": 1, "lz4": 2, "bitshuffle": 3}
"""As ``enum nat_codec`` of native/native.h counts them."""

KINDS = {"uint8": 0, "uint16": 1, "uint32": 2, "int16": 3, "float32": 4}
"""As ``enum nat_pixel`` of native/native.h counts them; other pixels fit no pass."""

SHORT, IO, BAD_DATA, BAD_MARK, BAD_NUMBER, OVERFLOW = -3, -4, -2, -5, -6, -7
"""``enum nat_status`` of native/native.h."""

MAX_RECORD_BYTES = 64 << 20
"""A compressed record is decoded as a whole by one thread; larger ones would not stay in any cache."""

MAX_MAGIC = 64


class Feed:
    """Threads that fetch the frames of a layout, decode them in cache and hand them to compiled kernels.

    Bounded memory: 256 KiB (or a record) for each thread, with ``direct`` at most 32 MiB in all.  Threads live as long
    as one call.  A feed does one call at a time.

    Parameters
    ----------
    header : Header
        What the format found.
    layout : Layout
        Where the frames are.
    reading : {"auto", "mmap", "read", "direct"}
        How the bytes are fetched; ``auto`` looks at what is cached and on which file system it lies.
    threads : int
        Threads that decode and compute; ``direct`` has one more that reads.

    Attributes
    ----------
    reading : str
        What was chosen.
    why : str
        Why, in a few words.
    align : int
        Frames of a record: bounds on multiples of it read nothing twice.

    Raises
    ------
    ValueError
        `can` names a reason why this layout can't be read.
    """

    def __init__(self, header: Header, layout: Layout, *, reading: Reading = "auto", threads: int = 1) -> None:
        hindrance = self.can(header, layout)
        if hindrance is not None or native is None:
            raise ValueError(hindrance)
        self.header = header
        self.layout = layout
        self.align = layout.record_frames
        self.threads = threads
        chosen, self._why = choose(layout) if reading == "auto" else (reading, "as asked")
        self.reading = chosen
        stored = np.dtype(layout.dtype)
        self._reader: Any = native.Reader(
            files=tuple(os.fsencode(f) for f in layout.files),
            frames=header.frames,
            frame_bytes=frame_bytes(header),
            record_frames=layout.record_frames,
            payload=layout.payload,
            first=layout.first,
            lead=layout.lead,
            tail=layout.tail,
            offsets=_array(layout.offsets, np.int64),
            file_of=_array(layout.file_of, np.int32),
            sizes=_array(layout.sizes, np.int64),
            codec=CODECS[layout.codec],
            element=layout.element or stored.itemsize,
            pixel=stored.itemsize,
            swap=not stored.isnative,
            kind=KINDS.get(np.dtype(header.dtype).name, -1),
            unsigned=stored.kind == "u" and stored.itemsize <= 4,
            flag=layout.flag,
            magic=layout.magic,
            number=layout.numbered,
            reading=READINGS.index(chosen),
            threads=threads,
        )

    @staticmethod
    def can(header: Header, layout: Layout) -> str | None:
        """Why the compiled readers can't read this; None if they can."""
        if native is None:
            return MISSING
        if layout.decode is not None:
            return f"pixels are decoded by {layout.decode}"
        stored = np.dtype(layout.dtype)
        if stored.newbyteorder("=") != np.dtype(header.dtype):
            return f"{stored.name} is delivered as {header.dtype}"
        if stored.itemsize not in {1, 2, 4, 8} or (layout.flag is not None and stored.kind not in "iu"):
            return f"pixels are {stored.name}"
        if layout.payload != layout.record_frames * frame_bytes(header):
            return f"a record of {layout.payload} bytes does not hold {layout.record_frames} frames"
        if layout.codec not in CODECS:
            return f"its codec is {layout.codec}"
        if layout.numbered is not None and layout.offsets is not None:
            return "some of the numbered records are left out"
        if layout.codec and layout.payload > MAX_RECORD_BYTES:
            return f"a record has {layout.payload} bytes; at most {MAX_RECORD_BYTES} are decoded in cache"
        if len(layout.magic) > MAX_MAGIC:
            return f"its mark has {len(layout.magic)} bytes"
        return None

    @property
    def why(self) -> str:
        """Why it reads as it does, and how many files refused that."""
        refused = self._reader.refused
        return self._why + (f"; {refused} files refuse O_DIRECT and are read through the cache" if refused else "")

    def add(
        self,
        native_pass: Any,
        start: int,
        stop: int,
        row: int,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Add frames ``start:stop`` to a compiled pass.

        Parameters
        ----------
        native_pass : _native.Pass
            Frames of the same size and type.
        start, stop : int
            Frames of the scan.
        row : int
            Row of the first one in this rank's share.
        progress : callable, optional
            Called by this thread every 0.1 s with the number of frames that are done; what it raises ends the call.

        Raises
        ------
        MissingData
            The first frame in scan order that is not there.
        RecipeError
            A sum would leave 64 bits.
        """
        self._judge(self._reader.add(native_pass, start, stop, row, progress))

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        whole = out if out.flags.c_contiguous else np.empty_like(out, order="C")
        if out.size:
            self._judge(self._reader.frames(start, stop, whole.view(np.uint8).data))
        if whole is not out:
            out[...] = whole

    def complete(self) -> None:
        """Raise `MissingData` with the first frame whose bytes are not in its file."""
        check(self.layout, self.header.frames, self.header.frames)

    def _judge(self, failure: tuple[int, int, int, int, bytes] | None) -> None:
        if failure is None:
            return
        status, frame, code, detail, told = failure
        match status:
            case _ if status == SHORT and detail < 0:
                refuse(self.layout, frame, NEVER_WRITTEN)
            case _ if status == SHORT:
                refuse(self.layout, frame, f"the file ends {detail} bytes early")
            case _ if status == IO:
                refuse(self.layout, frame, f"can't be read: {os.strerror(code)}")
            case _ if status == BAD_MARK:
                refuse(
                    self.layout,
                    frame,
                    f"its record does not start with {self.layout.magic!r}: the frame was not written",
                )
            case _ if status == BAD_NUMBER:
                number = printable(told.decode("ascii", "replace")) or "missing"
                refuse(
                    self.layout,
                    frame,
                    f"its record has number {number} instead of {detail}: a frame is missing or doubled",
                )
            case _ if status == BAD_DATA:
                refuse(self.layout, frame, "its chunk can't be decoded: the file is damaged")
            case _ if status == OVERFLOW:
                raise RecipeError(
                    "a sum over frames leaves 64 bits", next_step="leave the sum out of the recipe for these data"
                )
            case _:
                raise RuntimeError(f"frame {frame}: the kernels answer {status}")

    def close(self) -> None:
        """Give the files back; more than once does no harm."""
        self._reader.close()


def frame_bytes(header: Header) -> int:
    """Bytes of a frame as it is delivered."""
    return header.det_shape[0] * header.det_shape[1] * np.dtype(header.dtype).itemsize


def _array(values: np.ndarray | None, dtype: type[np.integer[Any]]) -> np.ndarray | None:
    return None if values is None else np.ascontiguousarray(values, dtype)
