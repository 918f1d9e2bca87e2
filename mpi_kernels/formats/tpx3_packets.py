"""Timepix3 packets: 64-bit words, little-endian, in chunks that name their chip.

Layout, bit 63 first.  Chunk: bytes of its words (16), reserved (8), chip (8), ``TPX3`` (32).  Pixel in the mode with
arrival times: 0xb, address (16), ToA (14, 25 ns), ToT (10), fToA (4, 1.5625 ns, subtracted), SPIDR time (16,
409.6 us).  TDC: 0x6, edge (4), trigger count (12), time (35, 3.125 ns), fine time (4, 1 to 12, 3.125/12 ns).  Global
time: 0x44, reserved (8), low part (32, 25 ns), SPIDR time (16).  0x71a0 and 0x71b0 end a readout.  All count from the
same moment.  Sources (read, not copied): the SERVAL manual 3.2 of Amsterdam Scientific Instruments, "TPX3 raw file
format"; for the address and the chips' places tpx3awkward (NSLS-II) and tpx3HitParser (M4I).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpi_kernels.errors import FormatError

MAGIC = 0x33585054
"""``TPX3`` as the low half of a word."""

CHIP = 256
"""Rows and columns of a chip."""

UNITS_PER_NS = 96 / 25
"""Times are counted in units of 25/96 ns, in which each of the clocks ticks in whole numbers."""

PERIOD = 6 << 34
"""Units after which a pixel's time begins anew: 26.8 s; those of the other clocks are multiples of it."""

EDGES = {"tdc1 rising": 0xF, "tdc1 falling": 0xA, "tdc2 rising": 0xE, "tdc2 falling": 0xB}
_COUNTING, _PIXEL, _TDC, _GLOBAL_LOW, _ENDS = 0xA, 0xB, 0x6, 0x44, (0x71A0, 0x71B0)


def walk(words: np.ndarray, at: int, path: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Follow the chunks of words that begin at byte ``at``.

    Returns
    -------
    heads, chips : ndarray of int64
        Index of each whole chunk's first word, and its chip.
    used : int
        Words of all whole chunks; what follows is a begun one.

    Raises
    ------
    FormatError
        No chunk begins where one should.
    """
    heads, chips, i = [], [], 0
    while i < len(words):
        head = int(words[i])
        size = head >> 48
        if head & 0xFFFFFFFF != MAGIC or size % 8:
            raise FormatError(
                f"no chunk of Timepix3 packets begins at byte {at + 8 * i}", path=path, next_step="copy it again"
            )
        if i + 1 + size // 8 > len(words):
            break
        heads.append(i)
        chips.append(head >> 32 & 0xFF)
        i += 1 + size // 8
    return np.array(heads, np.int64), np.array(chips, np.int64), i


@dataclass(frozen=True, slots=True, eq=False)
class Packets:
    """Packets with a time, in the order of the file.

    Attributes
    ----------
    words : (m,) ndarray of uint64
        As they are.
    chip : (m,) ndarray of int64
        Chip of each.
    time : (m,) ndarray of int64
        Units of 25/96 ns since the first time of the file was last 0; no longer modulo `PERIOD`.
    pixel : (m,) ndarray of bool
        Whether it is a hit.
    ended : ndarray of int64
        Chips whose readout ended in these chunks.
    """

    words: np.ndarray
    chip: np.ndarray
    time: np.ndarray
    pixel: np.ndarray
    ended: np.ndarray

    def triggers(self, edge: int) -> np.ndarray:
        """Times of a TDC's edges."""
        found: np.ndarray = self.time[self.words >> np.uint64(56) == (_TDC << 4 | edge)]
        return found


def decode(words: np.ndarray, heads: np.ndarray, chips: np.ndarray, before: int | None, path: str) -> Packets:
    """Times of the packets of whole chunks.

    Parameters
    ----------
    words : (n,) ndarray of uint64
        Chunks, one after the other.
    heads, chips : ndarray of int64
        As `walk` finds them.
    before : int, optional
        The last time that came before; None at the beginning of the file.  From packet to packet time goes on or back
        by less than half a `PERIOD`, whatever their order is.
    path : str
        Named in errors.

    Raises
    ------
    FormatError
        The detector counted, and hits have no arrival time.
    """
    chip = np.repeat(chips, np.diff(np.append(heads, len(words))))
    kind = words >> np.uint64(60)
    kind[heads] = 0
    if (kind == _COUNTING).any():
        raise FormatError(
            "its packets are of the counting mode (0xa), which has no time of arrival",
            path=path,
            next_step="record it again in the mode with ToA and ToT",
        )
    ends = np.isin(words >> np.uint64(48), np.array(_ENDS, np.uint64)) & (kind != 0)
    timed = (kind == _PIXEL) | (kind == _TDC) | ((words >> np.uint64(56) == _GLOBAL_LOW) & (kind != 0))
    found, kind = words[timed], kind[timed]
    time = np.where(kind == _PIXEL, _pixel_time(found), np.where(kind == _TDC, _tdc_time(found), _global_time(found)))
    time %= PERIOD
    if len(time):
        steps = np.diff(time, prepend=time[0] if before is None else before % PERIOD)
        steps = (steps + PERIOD // 2) % PERIOD - PERIOD // 2
        time = np.cumsum(steps) + (time[0] if before is None else before)
    return Packets(found, chip[timed], time, kind == _PIXEL, np.unique(chip[ends]))


def _bits(words: np.ndarray, low: int, count: int) -> np.ndarray:
    return (words >> np.uint64(low) & np.uint64((1 << count) - 1)).astype(np.int64)


def _pixel_time(words: np.ndarray) -> np.ndarray:
    coarse = _bits(words, 0, 16) << 14 | _bits(words, 30, 14)
    time: np.ndarray = 6 * ((coarse << 4) - _bits(words, 16, 4))
    return time


def _tdc_time(words: np.ndarray) -> np.ndarray:
    # fine times begin with 1; 0 stands where the board has none
    time: np.ndarray = 12 * _bits(words, 9, 35) + np.maximum(_bits(words, 5, 4), 1) - 1
    return time


def _global_time(words: np.ndarray) -> np.ndarray:
    return 96 * _bits(words, 16, 32)


def places(words: np.ndarray, chip: np.ndarray, chips: int, gap: int) -> np.ndarray:
    """Pixel of each hit, counted through the frame in C order.

    A chip's address is 7 bits of the double column, 6 of the super pixel, 3 of the pixel in it.  Four chips stand as
    3, 0 above 2, 1; those below are turned by 180 degrees.

    Parameters
    ----------
    words, chip : ndarray
        The hits.
    chips : int
        1 or 4.
    gap : int
        Rows and columns without pixels between four chips.
    """
    address = _bits(words, 44, 16)
    x = (address & 0xFE00) >> 8 | address >> 2 & 1
    y = (address & 0x01F8) >> 1 | address & 3
    if chips == 1:
        alone: np.ndarray = y * CHIP + x
        return alone
    turned, right = (chip == 1) | (chip == 2), chip < 2
    x, y = (np.where(turned, CHIP - 1 - a, a) for a in (x, y))
    found: np.ndarray = (y + turned * (CHIP + gap)) * (2 * CHIP + gap) + x + right * (CHIP + gap)
    return found
