"""Known frames as a file holds them: plain, compressed with few means, or as lists of events.

The compressors find runs of one byte only, which is enough to have literals and overlapping matches in what the
decoders are given.  Sources: LZ4 Block Format, https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md; bitshuffle
(bshuf_h5filter.h and bitshuffle_core.c); HDF5 filters 32004 and 32008.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.exact import ExactScan
from mpi_kernels.formats.hdf5_filters import GZIP, Filter, undo
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Codec, Layout
from mpi_kernels.sparse_lists import Events

SHORTEST_RUN = 8
"""Equal bytes that become a match."""

LAST_LITERALS, LAST_MATCH = 5, 12
"""The last bytes of a block are literals, and no match begins in its last 12 (LZ4 Block Format, end of block)."""

HEAD_BYTES = 128
"""Before the first record, as most files have something there: no record starts where O_DIRECT would like it."""

LZ4_BLOCK = 512
"""Bytes of a block of filter 32004: several to a record."""


def header_of(scan: ExactScan) -> Header:
    """What a format would say of a file of these frames."""
    kind = {0: "image", 1: "stack", 2: "4d"}[len(scan.scan_shape)]
    return Header(
        format="exact",
        kind=kind,  # type: ignore[arg-type]
        scan_shape=scan.scan_shape,
        det_shape=scan.det_shape,
        dtype=scan.dtype.name,
        members=(),
        rule="exact",
    )


def records(scan: ExactScan, stored: str, codec: Codec = "") -> list[bytes]:
    """Each frame as it lies in a file, pixels as ``stored`` says (such as ``">u2"``)."""
    frames = scan.frames(0, scan.count).astype(stored)
    element = frames.itemsize
    if codec == "bitshuffle-lz4":
        return [bitshuffle_lz4(frame.tobytes(), element) for frame in frames]
    return [lz4(frame.tobytes()) if codec == "lz4" else frame.tobytes() for frame in frames]


def layout_of(made: Sequence[bytes], path: str, scan: ExactScan, stored: str, codec: Codec = "") -> Layout:
    """Where records lie in a file that holds one after the other, behind `HEAD_BYTES`."""
    payload = math.prod(scan.det_shape) * np.dtype(stored).itemsize
    if not codec:
        return Layout(files=(path,), dtype=stored, payload=payload, first=HEAD_BYTES)
    sizes = np.array([len(record) for record in made], np.int64)
    offsets = HEAD_BYTES + np.cumsum(sizes) - sizes
    element = np.dtype(stored).itemsize if codec == "bitshuffle-lz4" else 1
    return Layout(
        files=(path,), dtype=stored, payload=payload, offsets=offsets, sizes=sizes, codec=codec, element=element
    )


class EventFrames(LayoutSource):
    """A source that knows the events of its frames, as counted data have them."""

    def __init__(self, scan: ExactScan, layout: Layout) -> None:
        super().__init__(header_of(scan), layout)
        self._scan = scan

    def events(self, start: int, stop: int) -> Events:
        """Pixels that counted anything, in C order, and what they counted."""
        frames = self._scan.frames(start, stop).reshape(stop - start, -1)
        frame, pixel = np.nonzero(frames)
        bounds = np.searchsorted(frame, np.arange(stop - start + 1))
        return Events(pixel.astype(np.int64), frames[frame, pixel].astype(np.uint32), bounds.astype(np.int64))


class DeflatedFrames:
    """A source of frames that are stored as HDF5 filter 1 (gzip) writes them, undone as those of HDF5 files are."""

    align, layout = 1, None

    def __init__(self, scan: ExactScan, stored: str) -> None:
        self.header, self._stored = header_of(scan), np.dtype(stored)
        self._records = [zlib.compress(record) for record in records(scan, stored)]

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``."""
        for record, frame in zip(self._records[start:stop], out, strict=True):
            plain = undo(record, (Filter(GZIP, (6,)),), 0, frame.size * self._stored.itemsize)
            frame[...] = np.frombuffer(plain, self._stored).reshape(frame.shape)

    def complete(self) -> None:
        """All frames are in memory."""

    def close(self) -> None:
        """There is nothing to give back."""


def bitshuffle_lz4(data: bytes, element: int) -> bytes:
    """What HDF5 filter 32008 with LZ4 stores of numbers of ``element`` bytes."""
    block = max(128, 8192 // element // 8 * 8)
    count = len(data) // element
    parts = [len(data).to_bytes(8, "big"), (block * element).to_bytes(4, "big")]
    whole = count // 8 * 8
    for start in range(0, whole, block):
        packed = lz4_block(_transposed(data[start * element : min(start + block, whole) * element], element))
        parts += [len(packed).to_bytes(4, "big"), packed]
    return b"".join((*parts, data[whole * element :]))


def _transposed(data: bytes, element: int) -> bytes:
    bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, element), axis=1, bitorder="little")
    return np.packbits(bits.T, axis=1, bitorder="little").tobytes()


def lz4(data: bytes) -> bytes:
    """What HDF5 filter 32004 stores: blocks of which those that did not shrink are kept as they are."""
    parts = [len(data).to_bytes(8, "big"), LZ4_BLOCK.to_bytes(4, "big")]
    for start in range(0, len(data), LZ4_BLOCK):
        block = data[start : start + LZ4_BLOCK]
        packed = lz4_block(block)
        packed = block if len(packed) >= len(block) else packed
        parts += [len(packed).to_bytes(4, "big"), packed]
    return b"".join(parts)


def lz4_block(data: bytes) -> bytes:
    """One LZ4 block, with a match for each long run of one byte."""
    flat = np.frombuffer(data, np.uint8)
    edges = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [len(flat)]))
    lengths = np.diff(edges)
    parts, at = [], 0
    for start, length in zip(edges[:-1][lengths >= SHORTEST_RUN], lengths[lengths >= SHORTEST_RUN], strict=True):
        first, stop = int(start) + 1, min(int(start + length), len(flat) - LAST_LITERALS)
        if first > len(flat) - LAST_MATCH or stop - first < 4:
            continue
        parts.append(_sequence(data[at:first], stop - first))
        at = stop
    return b"".join((*parts, _sequence(data[at:], 0)))


def _sequence(literals: bytes, match: int) -> bytes:
    """Literals, and then ``match`` bytes like the last of them; 0: the end of the block."""
    token = min(15, len(literals)) << 4 | (min(15, match - 4) if match else 0)
    found = bytes([token]) + _more(len(literals)) + literals
    return found + b"\x01\x00" + _more(match - 4) if match else found


def _more(length: int) -> bytes:
    """What of a length does not fit the four bits of the token."""
    return b"" if length < 15 else b"\xff" * ((length - 15) // 255) + bytes([(length - 15) % 255])
