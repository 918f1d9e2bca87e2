"""The filters of HDF5 chunks that are undone here, without the HDF5 library and its lock.

Stored bytes come from outside: what a decompressor may give is bounded by the size that the chunk has.
Sources: HDF5 File Format Specification 3.0, section IV.A.2.l; HDF5 Registered Filters,
https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md; H5checksum.c, H5Zshuffle.c.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_kernels.layout import Codec

Bytes = bytes | memoryview | np.ndarray
Undo = Callable[[Bytes, int], Bytes]
"""Stored bytes, and how many they must become."""

GZIP, SHUFFLE, FLETCHER32 = 1, 2, 3
LZ4, BITSHUFFLE, BLOSC, ZSTD = 32004, 32008, 32001, 32015
BITSHUFFLE_LZ4 = 2
"""The fifth number of filter 32008 for LZ4 behind the shuffle (bitshuffle, bshuf_h5filter.h)."""

CHECKSUM_BYTES = 4
SUM_WORDS = 1 << 18
"""Words of a checksum at a time: 2**16 * 2**18 * 2**18 / 2 is below 2**53, so that float64 sums are exact."""


class BadChunk(ValueError):
    """Bytes that are not what the filter wrote."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One stage of a pipeline, in the order in which a writer applies them."""

    code: int
    values: tuple[int, ...]


def filters_of(dataset: Any) -> tuple[Filter, ...]:
    """The pipeline of a dataset."""
    plist = dataset.id.get_create_plist()
    found = (plist.get_filter(i) for i in range(plist.get_nfilters()))
    return tuple(Filter(int(code), tuple(int(v) for v in values)) for code, _, values, _ in found)


def undoable(filters: Sequence[Filter]) -> bool:
    """Whether the pipeline can be undone here: at most one compressor, after which only a checksum may come."""
    compressed = False
    for stage in filters:
        if stage.code == FLETCHER32:
            continue
        if compressed or not _known(stage):
            return False
        compressed = stage.code != SHUFFLE
    return True


def _known(stage: Filter) -> bool:
    if stage.code in (BLOSC, ZSTD):
        return importlib.util.find_spec("numcodecs") is not None
    if stage.code in (LZ4, BITSHUFFLE):
        return native_codec(stage) is not None and native_decode() is not None
    return stage.code in (SHUFFLE, GZIP)


def native_codec(stage: Filter) -> tuple[Codec, int] | None:
    """How a filter is called in a `Layout`, and the bytes of the numbers that it shuffles; None if it is another."""
    if stage.code == LZ4:
        return "lz4", 1
    values = stage.values
    if stage.code == BITSHUFFLE and len(values) >= 5 and values[4] == BITSHUFFLE_LZ4 and values[2] in (1, 2, 4, 8):
        return "bitshuffle-lz4", values[2]
    return None


def native_decode() -> Callable[..., None] | None:
    """The compiled decoder of these two, which reads and writes nothing outside of its buffers whatever the input is.

    That can't be said of the plug-ins of the HDF5 library, so it comes first; None where nothing was compiled.
    """
    try:
        found: Callable[..., None] = importlib.import_module("mpi_kernels._native").decode
    except (ImportError, AttributeError):
        return None
    return found


def undo(stored: Bytes, filters: Sequence[Filter], mask: int, wanted: int) -> Bytes:
    """Turn a stored chunk into its ``wanted`` bytes; bit i of ``mask`` says that filter i was skipped.

    Raises
    ------
    BadChunk
        The bytes are damaged.
    """
    data = stored
    for step, size in _steps(tuple(filters), mask, wanted):
        data = step(data, size)
        if size >= 0 and len(data) != size:
            raise BadChunk(f"it has {len(data)} bytes where {size} should be")
    return data


@functools.lru_cache(maxsize=64)
def _steps(filters: tuple[Filter, ...], mask: int, wanted: int) -> tuple[tuple[Undo, int], ...]:
    """What to do in turn, and how many bytes must be there after each; -1 before a compression: unknown."""
    steps: list[tuple[Undo, int]] = []
    size = wanted  # before each stage, in the order of the writer
    for i, stage in enumerate(filters):
        if mask >> i & 1:
            continue
        if stage.code == FLETCHER32:
            steps.append((_checked, size))
            size += CHECKSUM_BYTES if size >= 0 else 0
        elif stage.code == SHUFFLE:
            steps.append((functools.partial(_unshuffled, element=stage.values[0] if stage.values else 1), size))
        else:
            steps.append((decompressor(stage), size))
            size = -1
    if not steps:
        steps.append((_as_it_is, wanted))
    return tuple(reversed(steps))


def _as_it_is(data: Bytes, wanted: int) -> Bytes:  # noqa: ARG001 - as all of them
    return data


@functools.cache
def decompressor(stage: Filter) -> Undo:
    """What undoes a compression; imported when it is first needed."""
    if (codec := native_codec(stage)) is not None:
        return _unnative(*codec)
    if stage.code == BLOSC:
        return _unblosc()
    return _unzstd() if stage.code == ZSTD else _ungzip()


def _unnative(codec: str, element: int) -> Undo:
    decode = native_decode()
    assert decode is not None, "undoable() was not asked"

    def undo_native(data: Bytes, wanted: int) -> Bytes:
        out = np.empty(wanted, np.uint8)
        try:
            decode(codec, element, data, out)
        except ValueError as error:
            raise BadChunk(f"its {codec} data are damaged ({error!s:.80})") from error
        return out

    return undo_native


def _ungzip() -> Undo:
    """Deflate by isal, 1.7 times as fast as zlib, where it is installed; both let other threads run."""
    name = "isal.isal_zlib" if importlib.util.find_spec("isal") else "zlib"
    zlib: Any = importlib.import_module(name)

    def undo_gzip(data: Bytes, wanted: int) -> Bytes:
        worker = zlib.decompressobj()
        try:
            found: bytes = worker.decompress(data, wanted + 1)  # one more than can be right: enough to notice a bomb
        except zlib.error as error:
            raise BadChunk(f"its deflate stream is damaged ({error!s:.80})") from error
        if len(found) <= wanted and not worker.eof:
            raise BadChunk(f"its deflate stream ends after {len(found)} of {wanted} bytes")
        return found

    return undo_gzip


def _unblosc() -> Undo:
    from numcodecs import blosc

    def undo_blosc(data: Bytes, wanted: int) -> Bytes:
        # Blosc 1 header: four bytes of versions and flags, then sizes of 32 bits: plain, block, compressed
        head = bytes(data[:16])
        if len(head) < 16 or int.from_bytes(head[4:8], "little") != wanted:
            raise BadChunk(f"its blosc header does not say {wanted} bytes")
        if int.from_bytes(head[12:16], "little") > len(data):
            raise BadChunk("its blosc frame is cut off")
        try:
            return memoryview(blosc.decompress(data)).cast("B")
        except (RuntimeError, ValueError) as error:
            raise BadChunk(f"its blosc frame is damaged ({error!s:.80})") from error

    return undo_blosc


def _unzstd() -> Undo:
    from numcodecs import zstd

    def undo_zstd(data: Bytes, wanted: int) -> Bytes:
        if _zstd_size(bytes(data[:18])) != wanted:
            raise BadChunk(f"its zstd frame does not say {wanted} bytes")
        try:
            return memoryview(zstd.decompress(data)).cast("B")
        except (RuntimeError, ValueError) as error:
            raise BadChunk(f"its zstd frame is damaged ({error!s:.80})") from error

    return undo_zstd


def _zstd_size(head: bytes) -> int | None:
    """The size that a Zstandard frame header states, which HDF5's plug-in always writes (RFC 8878, section 3.1.1.1)."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flags = head[4]
    single = flags >> 5 & 1
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    if width == 0 or len(head) < start + width:
        return None
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)


def _unshuffled(data: Bytes, wanted: int, element: int) -> Bytes:  # noqa: ARG001 - as all of them
    """Bytes of each number together again; what is left over behind the last whole number stays where it is."""
    count = len(data) // element if element > 0 else 0
    if element <= 1 or count <= 1:
        return data
    flat = np.frombuffer(data, np.uint8)
    out = np.empty(len(flat), np.uint8)
    planes, whole = flat[: count * element].reshape(element, count), out[: count * element].reshape(count, element)
    for i in range(element):
        whole[:, i] = planes[i]
    out[count * element :] = flat[count * element :]
    return out


def _checked(data: Bytes, wanted: int) -> Bytes:  # noqa: ARG001 - as all of them
    if len(data) < CHECKSUM_BYTES:
        raise BadChunk("its checksum is cut off")
    flat = np.frombuffer(data, np.uint8)
    if fletcher32(flat[:-CHECKSUM_BYTES]) != int.from_bytes(flat[-CHECKSUM_BYTES:].tobytes(), "little"):
        raise BadChunk("its checksum is wrong")
    return flat[:-CHECKSUM_BYTES]


def fletcher32(flat: np.ndarray) -> int:
    """Fletcher's checksum of (n,) uint8 as HDF5 computes it: big-endian words of 16 bits, sums modulo 65535."""
    even = len(flat) // 2 * 2
    words = flat[:even].view(">u2")
    first = second = 0
    for start in range(0, len(words), SUM_WORDS):
        part = words[start : start + SUM_WORDS].astype(np.float64)
        # sum of the running sums: word i of n is in n - i of them, and in all of those that follow
        second += first * len(part) + int(part @ _falling(len(part)))
        first += int(part.sum())
    if even < len(flat):
        first += int(flat[-1]) << 8
        second += first
    return _folded(second) << 16 | _folded(first)


@functools.lru_cache(maxsize=4)
def _falling(count: int) -> np.ndarray:
    return np.arange(count, 0, -1, dtype=np.float64)


def _folded(total: int) -> int:
    """Modulo 65535 by adding carries, which leaves 65535 and not 0 where the sum is a multiple of it."""
    return (total - 1) % 65535 + 1 if total else 0
