"""Merlin's R64 pixels: the chips' own bits, unpacked and put in their places.

A row is a sequence of big-endian 64-bit words, and the pixels of a word go from its low end to its high end.  So
with the bytes of each word reversed, the row is plain little-endian: bits, bytes or 16-bit numbers for counter depths
1, 6 and 12.  24 bits are two 12-bit frames, the upper half first.

Four chips (layout 2x2) share each row of the file, in the order bottom right, bottom left, top right, top left; the
two of the bottom are turned by 180 degrees.  Source: LiberTEM ``io/dataset/mib.py`` (read, not copied), and for 1 and
12 bits real files: a raw twin of a processed series, and one hot pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpi_kernels.errors import FormatError

COLUMNS = 256
"""Pixels in a row of a Medipix 3 chip; also its number of rows."""

_BITS = {1: 1, 6: 8, 12: 16, 24: 32}
_DTYPE = {1: "uint8", 6: "uint8", 12: "uint16", 24: "uint32"}


@dataclass(frozen=True, slots=True)
class RawLayout:
    """Bytes of a frame, its shape and type, and what has not been checked against a real file."""

    payload: int
    det_shape: tuple[int, int]
    dtype: str
    warnings: tuple[str, ...]


def layout(chips: int, rows: int, depth: int, path: str) -> RawLayout:
    """What a raw frame holds.

    Parameters
    ----------
    chips : int
        1 or 4.
    rows : int
        Rows of a chip that were read out.
    depth : int
        Counter depth, bits: 1, 6, 12 or 24.
    path : str
        Named in errors.
    """
    if depth not in _BITS or chips not in (1, 4) or (chips == 4 and rows != COLUMNS):
        raise FormatError(
            f"raw frames of {chips} chips, {rows} rows and counter depth {depth} are not known",
            path=path,
            next_step="record U08, U16 or U32, or full raw frames of one or four chips with depth 1, 6, 12 or 24",
        )
    side = math.isqrt(chips)
    checked = (chips, depth) in {(1, 1), (4, 6), (4, 12)}
    warnings = () if checked else (f"raw frames of {chips} chips with depth {depth}: no real file was compared yet",)
    return RawLayout(chips * rows * COLUMNS * _BITS[depth] // 8, (rows * side, COLUMNS * side), _DTYPE[depth], warnings)


def decode(stored: np.ndarray, out: np.ndarray, *, chips: int, rows: int, depth: int) -> None:
    """Unpack frames.

    Parameters
    ----------
    stored : (n, payload) ndarray of uint8
        Bytes as they are in the file.
    out : (n, det_y, det_x) ndarray
        Filled, in file order.
    chips, rows, depth : int
        As in `layout`.
    """
    n = len(stored)
    little = stored.reshape(n, -1, 8)[:, :, ::-1].reshape(n, -1)
    values = _numbers(np.ascontiguousarray(little), depth, n).reshape(n, rows, chips, COLUMNS)
    if chips == 1:
        out[...] = values[:, :, 0]
        return
    bottom_right, bottom_left, top_right, top_left = (values[:, :, c] for c in range(4))
    out[:, :rows, :COLUMNS], out[:, :rows, COLUMNS:] = top_left, top_right
    out[:, rows:, :COLUMNS], out[:, rows:, COLUMNS:] = bottom_left[:, ::-1, ::-1], bottom_right[:, ::-1, ::-1]


def _numbers(little: np.ndarray, depth: int, n: int) -> np.ndarray:
    """(n, payload) bytes, little-endian, as (n, pixels) numbers."""
    if depth == 1:
        return np.unpackbits(little, axis=1, bitorder="little")
    if depth == 6:
        return little
    words = little.view("<u2").reshape(n, -1)
    if depth == 12:
        return words
    upper, lower = words.reshape(n, 2, -1).astype(np.uint32).transpose(1, 0, 2)
    return (upper << np.uint32(12)) + lower


def encode(frames: np.ndarray, chips: int, depth: int) -> np.ndarray:
    """The inverse of `decode`: (n, det_y, det_x) counts as (n, payload) uint8, for files of our own making."""
    n, rows = len(frames), frames.shape[1] // math.isqrt(chips)
    if chips == 1:
        values = frames[:, :, None, :]
    else:
        top, bottom = frames[:, :rows], frames[:, rows:, :][:, ::-1, ::-1]
        parts = (bottom[:, :, :COLUMNS], bottom[:, :, COLUMNS:], top[:, :, COLUMNS:], top[:, :, :COLUMNS])
        values = np.stack(parts, axis=2)
    flat = np.ascontiguousarray(values).reshape(n, -1)
    if depth == 1:
        little = np.packbits(flat.astype(bool), axis=1, bitorder="little")
    elif depth == 6:
        little = flat.astype(np.uint8)
    else:
        halves = [flat] if depth == 12 else [flat >> 12, flat & 0xFFF]
        little = np.concatenate(halves, axis=1).astype("<u2").view(np.uint8)
    return little.reshape(n, -1, 8)[:, :, ::-1].reshape(n, -1)
