"""A small picture of all maps of a result: a grey PNG, written with the standard library and numpy."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

TILE = 192
"""Side of a map in the contact sheet, in pixels."""
GAP = 4
GROUND = 24
LOW_PERCENT, HIGH_PERCENT = 1.0, 99.0


def contact_sheet(maps: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """PNG of maps side by side, first to last in reading order.

    Parameters
    ----------
    maps : sequence of (str, ndarray)
        Names, and arrays of one or two dimensions; others are left out.  Each is stretched between its 1st and 99th
        percentile; what is not finite is black.
    """
    drawn = [(name, _tile(a)) for name, a in maps if a.ndim in (1, 2) and a.size]
    columns = max(1, math.ceil(math.sqrt(len(drawn))))
    rows = max(1, math.ceil(len(drawn) / columns))
    sheet = np.full((rows * (TILE + GAP) + GAP, columns * (TILE + GAP) + GAP), GROUND, np.uint8)
    for i, (_, tile) in enumerate(drawn):
        y, x = (GAP + k * (TILE + GAP) for k in divmod(i, columns))
        y, x = y + (TILE - tile.shape[0]) // 2, x + (TILE - tile.shape[1]) // 2
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return png(sheet, ", ".join(name for name, _ in drawn))


def png(grey: np.ndarray, description: str = "") -> bytes:
    """PNG file of a (y, x) uint8 array.  Source: ISO/IEC 15948, colour type 0, filter type 0."""
    height, width = grey.shape
    lines = np.zeros((height, width + 1), np.uint8)
    lines[:, 1:] = grey
    text = b"Description\0" + description.encode("latin-1", "replace")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
            (b"tEXt", text),
            (b"IDAT", _compressed(lines)),
            (b"IEND", b""),
        )
    )


def _compressed(lines: np.ndarray) -> bytes:
    """Lines as a zlib stream; it looks for runs alone, as noise leaves nothing else to find, in a third of the time."""
    stream = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return stream.compress(lines.data) + stream.flush()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tile(array: np.ndarray) -> np.ndarray:
    if array.ndim == 1:
        return _curve(array)
    zoom = TILE / max(array.shape)
    # nearest pixel: a reduced map may miss bright spots between samples, but shows no value that is not there
    y, x = (np.minimum((np.arange(max(1, round(n * zoom))) / zoom).astype(int), n - 1) for n in array.shape)
    tile: np.ndarray = (_stretched(array.take(y, 0).take(x, 1)) * 255).astype(np.uint8)
    return tile


def _curve(values: np.ndarray) -> np.ndarray:
    sampled = values[(np.arange(TILE) * len(values) / TILE).astype(int)]
    heights = (_stretched(sampled, 0.0, 100.0) * (TILE // 2 - 1)).astype(int)
    level = np.arange(TILE // 2)[::-1, None]
    return np.where(level <= heights[None, :], 200, 0).astype(np.uint8)


def _stretched(array: np.ndarray, low: float = LOW_PERCENT, high: float = HIGH_PERCENT) -> np.ndarray:
    """Values from 0 to 1, 0 for what is not finite."""
    values = np.divide(array, 4, dtype=np.float64)  # the span of the largest floats must be one
    good = np.isfinite(values)
    all_good = good.all()
    if not good.any():
        return np.zeros(values.shape)
    shown = values.reshape(-1) if all_good else values[good]
    bottom, top = np.percentile(shown, [low, high])
    if top <= bottom:  # a few bright pixels on an even ground: show them rather than nothing
        bottom, top = shown.min(), shown.max()
    span = top - bottom
    if not 0 < span < np.inf:
        return np.where(good, 0.5, 0.0)
    if not all_good:
        values[~good] = bottom
    values -= bottom
    values /= span
    clipped: np.ndarray = np.clip(values, 0.0, 1.0, out=values)
    return clipped
