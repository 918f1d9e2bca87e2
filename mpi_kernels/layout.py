"""Where every frame of an acquisition lies and how it is stored: small, plain, and the same on every rank.

Rank 0 parses the file once; a `Layout` is all that the other ranks, and the compiled readers, need to know of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

Codec = Literal["", "bitshuffle-lz4", "lz4"]
"""How a record's pixels are stored: plain, or as the HDF5 filters 32008 (with LZ4) and 32004 write them."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Layout:
    """Records in scan order, each of ``record_frames`` frames (the last may hold more than the scan has).

    A plain record is ``lead + payload + tail`` bytes, of which the payload holds the pixels.  A compressed one is
    ``sizes[i]`` bytes that decode to ``payload`` bytes; it has no lead and no tail.

    Attributes
    ----------
    files : tuple of str
        The files that hold pixels.
    dtype : str
        Pixel type as stored, such as ``">u2"``.
    payload : int
        Bytes of pixels of a record, once decoded.
    record_frames : int
        Frames of a record.
    first : int
        Byte at which the first record starts, where they follow one another in ``files[0]``.
    offsets : (records,) ndarray of int64, optional
        Byte at which each record starts in its file, where they do not.
    file_of : (records,) ndarray of int32, optional
        Index into ``files`` of each record; None: all lie in the first.
    sizes : (records,) ndarray of int64, optional
        Stored bytes of each record, where it is compressed.
    codec : str
        How it is compressed.
    element : int
        Bytes of the numbers that a compressor shuffles (the pixel's size, unless the writer said otherwise).
    lead, tail : int
        Bytes before and after the pixels (a frame header, metadata rows).
    magic : bytes
        What every record must start with; checked at each read.
    numbered : int, optional
        Number of the first record, where each record carries its number as the second of comma-separated fields of
        its lead (Merlin's); they must follow one another, or a frame is missing or doubled.  With ``offsets`` into one
        file, records between them count too.
    decode : str, optional
        ``module:function`` for pixels that are not plain numbers in C order: ``decode(stored, out, **decode_with)``
        turns (n, payload) uint8 into (n, det_y, det_x).
    decode_with : mapping of str to int
        Its further arguments.
    flag : int, optional
        Pixel value that marks a dead pixel (Dectris: the largest of the type); delivered as 0.
    """

    files: tuple[str, ...]
    dtype: str
    payload: int
    record_frames: int = 1
    first: int = 0
    offsets: np.ndarray | None = None
    file_of: np.ndarray | None = None
    sizes: np.ndarray | None = None
    codec: Codec = ""
    element: int = 0
    lead: int = 0
    tail: int = 0
    magic: bytes = b""
    numbered: int | None = None
    decode: str | None = None
    decode_with: Mapping[str, int] = field(default_factory=dict)
    flag: int | None = None

    @property
    def record(self) -> int:
        """Bytes from one plain record to the next, where they follow one another."""
        return self.lead + self.payload + self.tail

    def to_bytes(self) -> bytes:
        """As one buffer for other ranks: a line of JSON, then the arrays."""
        plain: dict[str, object] = {}
        arrays = []
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                arrays.append(np.ascontiguousarray(value))
                value = {"array": [value.dtype.str, len(value)]}
            plain[name] = value.hex() if isinstance(value, bytes) else value
        return json.dumps(plain).encode("ascii") + b"\n" + b"".join(a.tobytes() for a in arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """What `to_bytes` has made; only ever of this program's own ranks."""
        line, _, rest = data.partition(b"\n")
        plain = json.loads(line)
        at = 0
        for name, value in plain.items():
            if isinstance(value, dict) and "array" in value:
                kind, count = np.dtype(value["array"][0]), value["array"][1]
                plain[name] = np.frombuffer(rest, kind, count, at)
                at += kind.itemsize * count
        return cls(**plain | {"files": tuple(plain["files"]), "magic": bytes.fromhex(plain["magic"])})
