"""Zarr arrays of version 2 and 3: what their JSON says, and chunks undone within limits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_kernels.errors import FormatError, NotThisFormat
from mpi_kernels.formats.access import json_object
from mpi_kernels.formats.pixels import stored_dtype

V2, V3 = ".zarray", "zarr.json"
MAX_CHUNK_BYTES = 1 << 30
_STDLIB = ("zlib", "gzip", "bz2", "lzma")
_NUMCODECS = ("blosc", "zstd", "lz4")
_NEXT = "write it with one of blosc, zstd, lz4, gzip, in C order and without filters or shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """One array: a folder with a file for each chunk.

    Attributes
    ----------
    path : str
        The array's folder.
    shape, chunks : tuple of int
        Of the array, and of one chunk; chunks at the edges are whole in the file too.
    stored : numpy.dtype
        Pixel type as stored.
    codec : str
        How chunks are compressed; "" for not at all.
    separator, prefix : str
        Name of a chunk: prefix, and its indices with the separator between.
    attributes : mapping
        The user's own.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    stored: np.dtype
    codec: str
    separator: str
    prefix: str
    attributes: Mapping[str, Any]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * self.stored.itemsize

    def name(self, index: tuple[int, ...]) -> str:
        """File of a chunk, inside the array's folder."""
        return self.prefix + self.separator.join(map(str, index))


def read(path: str) -> Array:
    """What an array's JSON says.

    Raises
    ------
    NotThisFormat
        The folder is no array.
    FormatError
        It is one that can't be read here.
    """
    v2, v3 = os.path.join(path, V2), os.path.join(path, V3)  # noqa: PTH118
    if os.path.isfile(v2):  # noqa: PTH113
        return _version_2(path, json_object(v2))
    if os.path.isfile(v3) and (described := json_object(v3)).get("node_type") == "array":  # noqa: PTH113
        return _version_3(path, described)
    raise NotThisFormat("the folder is no Zarr array", path=path)


def _version_2(path: str, said: dict[str, Any]) -> Array:
    compressor = said.get("compressor") or {}
    codec = compressor.get("id", "") if isinstance(compressor, dict) else "?"
    if said.get("order") != "C" or said.get("filters") or said.get("zarr_format") != 2:
        raise _refused(path, f"order {said.get('order')!r:.20}, filters {said.get('filters')!r:.80}")
    beside = os.path.join(path, ".zattrs")  # noqa: PTH118
    attributes = json_object(beside) if os.path.isfile(beside) else {}  # noqa: PTH113
    separator = said.get("dimension_separator", ".")
    return _checked(path, said.get("shape"), said.get("chunks"), said.get("dtype"), codec, separator, "", attributes)


def _version_3(path: str, said: dict[str, Any]) -> Array:
    try:
        grid, keys, codecs = said["chunk_grid"], said["chunk_key_encoding"], said["codecs"]
        names = [c["name"] for c in codecs]
        order = {"little": "<", "big": ">"}[codecs[0].get("configuration", {}).get("endian", "little")]
        if said["zarr_format"] != 3 or grid["name"] != "regular" or names[0] != "bytes" or len(names) > 2:
            raise _refused(path, f"grid {grid['name']!r:.40}, codecs {names!r:.120}")
        kind = np.dtype(said["data_type"])
        separator = keys.get("configuration", {}).get("separator", "/" if keys["name"] == "default" else ".")
        chunks, shape, attributes = grid["configuration"]["chunk_shape"], said["shape"], said.get("attributes", {})
        prefix = f"c{separator}" if keys["name"] == "default" else ""
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _refused(path, f"{type(error).__name__} {error!s:.80} in {V3}") from error
    text = kind.newbyteorder(order).str if kind.kind in "biuf" else str(kind)
    return _checked(path, shape, chunks, text, names[1] if len(names) == 2 else "", separator, prefix, attributes)


def _checked(
    path: str, shape: Any, chunks: Any, text: Any, codec: Any, separator: Any, prefix: str, attributes: Any
) -> Array:
    for sizes in (shape, chunks):
        if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < 1 << 40 for n in sizes):
            raise _refused(path, f"shape {shape!r:.80} in chunks {chunks!r:.80}")
    if len(shape) != len(chunks) or separator not in (".", "/"):
        raise _refused(path, f"shape {shape!r:.80} in chunks {chunks!r:.80}, separator {separator!r:.8}")
    if codec not in ("", *_STDLIB, *_NUMCODECS):
        raise _refused(path, f"compression {codec!r:.40}")
    stored = stored_dtype(text, path)
    made = Array(
        path=path,
        shape=tuple(shape),
        chunks=tuple(chunks),
        stored=stored,
        codec=codec,
        separator=separator,
        prefix=prefix,
        attributes=attributes if isinstance(attributes, dict) else {},
    )
    if made.chunk_bytes > MAX_CHUNK_BYTES:
        raise _refused(path, f"chunks of {made.chunk_bytes} bytes")
    return made


def _refused(path: str, what: str) -> FormatError:
    return FormatError(f"a Zarr array with {what} is not read", path=path, next_step=_NEXT)


def _zstd_size(stored: bytes) -> int:
    """Bytes that a Zstandard frame says it holds, -1 if it does not.  Source: RFC 8878, section 3.1.1.1."""
    if stored[:4] != b"\x28\xb5\x2f\xfd" or len(stored) < 6:
        return -1
    flags = stored[4]
    single, width = flags >> 5 & 1, (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
    at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(stored[at : at + width], "little") + (256 if width == 2 else 0) if width else -1


# numcodecs fills a part of a buffer without a word, so each chunk's own header is asked first
_SIZES: Mapping[str, Callable[[bytes], int]] = {
    "blosc": lambda stored: int.from_bytes(stored[4:8], "little"),
    "lz4": lambda stored: int.from_bytes(stored[:4], "little"),
    "zstd": _zstd_size,
}


def decoder(array: Array) -> Callable[[bytes, np.ndarray], int]:
    """A function that undoes a chunk's compression into a flat uint8 buffer and says how many bytes it filled.

    Nothing larger than the buffer is ever made, whatever a chunk's own header claims.  It raises ValueError or
    RuntimeError for what can't be undone.

    Raises
    ------
    FormatError
        The compression needs a package that is not installed.
    """
    if array.codec in _NUMCODECS:
        try:
            import numcodecs
        except ImportError as error:
            raise FormatError(
                f"it is compressed with {array.codec}, and numcodecs is not installed",
                path=array.path,
                next_step="pip install 'emflow[formats]'",
            ) from error
        codec = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4}[array.codec]()

        def undo(stored: bytes, out: np.ndarray) -> int:
            told = _SIZES[array.codec](stored)
            if told != out.nbytes:
                raise ValueError(f"it says that it holds {told} of {out.nbytes} bytes")
            codec.decode(stored, out=out)
            return out.nbytes

        return undo

    def inflate(stored: bytes, out: np.ndarray) -> int:
        data = stored if not array.codec else _inflated(array.codec, stored, out.nbytes + 1)
        if len(data) == out.nbytes:
            out[...] = np.frombuffer(data, np.uint8)
        return len(data)

    return inflate


def _inflated(codec: str, stored: bytes, limit: int) -> bytes:
    """At most ``limit`` bytes, by the standard library."""
    import bz2
    import lzma
    import zlib

    try:
        if codec == "bz2":
            return bz2.BZ2Decompressor().decompress(stored, limit)
        if codec == "lzma":
            return lzma.LZMADecompressor(memlimit=1 << 30).decompress(stored, limit)
        return zlib.decompressobj(47).decompress(stored, limit)  # 32 + 15: a zlib or a gzip header
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise ValueError(str(error)) from error
