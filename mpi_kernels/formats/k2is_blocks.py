"""The eight sector files of a Gatan K2 in-situ recording: blocks, brought into step, and unpacked.

A block has 0x5758 bytes: a header of 40 bytes, big-endian, and 930 x 16 pixels of 12 bits, two in three bytes with
the first one's low bits first.  A sector is a strip of the frame, 256 pixels wide and 1860 high, which 32 blocks make
up; each says in its header where it belongs and of which frame it is.  The files begin anywhere, each at another block,
and even within one.
Source: LiberTEM ``io/dataset/k2is.py`` and py4DSTEM's ``read_K2.py`` (read, not copied).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from mpi_kernels.errors import FormatError, Incomplete, MissingData, printable
from mpi_kernels.formats.access import os_errors

SECTORS, BLOCKS = 8, 32
BLOCK_BYTES, HEADER_BYTES = 0x5758, 40
BLOCK_HEIGHT, BLOCK_WIDTH = 930, 16
HEIGHT, WIDTH = 2 * BLOCK_HEIGHT, 16 * BLOCK_WIDTH
"""Rows and columns of a sector."""

SYNC = 0xFFFF0055
_MARK = SYNC.to_bytes(4, "big")
EXPOSED = 1
"""Bit of a block's flags: the shutter was open."""

STRIDE = 400
"""Frames from one look for an open shutter to the next: a second of the detector."""

HEADER = np.dtype(
    {
        "names": ["sync", "flags", "count", "width", "height", "frame", "x", "y", "x_end", "y_end", "size"],
        "formats": [">u4", "u1", ">u4", ">u2", ">u2", ">u4", ">u2", ">u2", ">u2", ">u2", ">u4"],
        "offsets": [0, 9, 16, 20, 22, 24, 28, 30, 32, 34, 36],
        "itemsize": HEADER_BYTES,
    }
)


class Sectors:
    """The open files; frames are counted from the first one that is whole in all of them.

    Parameters
    ----------
    paths : sequence of str
        The files, from the left strip of the frame to the right one.

    Attributes
    ----------
    number : int
        The detector's number of frame 0.
    frames : int
        Frames for which every file has bytes.

    Raises
    ------
    Incomplete
        The files have no whole frame in common yet.
    FormatError
        A file does not begin with a block, or its first blocks are of no frame that the others have.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._fds: list[int] = []
        try:
            for path in self.paths:
                with os_errors(path):
                    self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._sizes = [os.fstat(fd).st_size for fd in self._fds]
            self._begins = [self._begin(s) for s in range(SECTORS)]
            self._into_step()
        except BaseException:
            self.close()
            raise

    def _begin(self, sector: int) -> int:
        """Byte of the first whole block: pixels may look like its mark, but no other header follows those."""
        with os_errors(self.paths[sector]):
            data = os.pread(self._fds[sector], 2 * BLOCK_BYTES + HEADER_BYTES, 0)
        at = data.find(_MARK)
        while 0 <= at < BLOCK_BYTES and at + BLOCK_BYTES + HEADER_BYTES <= len(data):
            heads = np.concatenate([np.frombuffer(data, HEADER, 1, at + n) for n in (0, BLOCK_BYTES)])
            if _valid(heads).all():
                return at
            at = data.find(_MARK, at + 1)
        if len(data) < 2 * BLOCK_BYTES + HEADER_BYTES or not data[:HEADER_BYTES].strip(b"\0"):
            raise self._wait(sector, "its first blocks were not written yet")
        raise FormatError(
            "no block of a K2 sector is at its beginning",
            path=self.paths[sector],
            next_step="copy it again from the detector's server; binned frames are not read",
        )

    def _held(self, sector: int, size: int) -> int:
        """Whole blocks in so many bytes of a file."""
        return (size - self._begins[sector]) // BLOCK_BYTES

    def _into_step(self) -> None:
        begins = [self._first_whole(s) for s in range(SECTORS)]
        self.number: int = max(number for _, number in begins)
        self._first = [block + BLOCKS * (self.number - number) for block, number in begins]
        held = [(self._held(s, self._sizes[s]) - first) // BLOCKS for s, first in enumerate(self._first)]
        self.frames: int = min(held)
        if self.frames < 1:
            raise self._wait(held.index(self.frames), "it has no whole frame that the other sectors have too")
        for sector, first in enumerate(self._first):
            found = int(self._heads(sector, first, 1)["frame"][0])
            if found != self.number:
                raise FormatError(
                    f"it has frame number {found} where {self.number} should be: blocks are missing in it",
                    path=self.paths[sector],
                    frame=0,
                    next_step="copy it again, or record the scan again",
                )

    def _first_whole(self, sector: int) -> tuple[int, int]:
        """Block at which the first whole frame of a file begins, and that frame's number."""
        numbers = self._heads(sector, 0, BLOCKS)["frame"]
        block = 0 if (numbers == numbers[0]).all() else int(np.argmax(numbers != numbers[0]))
        numbers = self._heads(sector, block, BLOCKS)["frame"]
        if (numbers != numbers[0]).any():
            raise FormatError(
                f"its frame number {int(numbers[0])} has fewer than {BLOCKS} blocks",
                path=self.paths[sector],
                frame=0,
                next_step="copy it again, or record the scan again",
            )
        return block, int(numbers[0])

    def _heads(self, sector: int, block: int, count: int) -> np.ndarray:
        data = b""
        with os_errors(self.paths[sector]):
            if block + count > self._held(sector, self._sizes[sector]):
                raise self._wait(sector, f"{self._sizes[sector]} bytes of it are there, less than a frame needs")
            for b in range(block, block + count):
                data += os.pread(self._fds[sector], HEADER_BYTES, self._at(sector, b))
        if len(data) < count * HEADER_BYTES:
            raise self._wait(sector, "it was cut off meanwhile")
        heads = np.frombuffer(data, HEADER)
        if not _valid(heads).all():
            bad = int(np.argmin(_valid(heads)))
            at = self._at(sector, block + bad)
            if not heads[bad].tobytes().strip(b"\0"):
                raise self._wait(sector, f"the block at byte {at} was not written yet")
            raise FormatError(
                f"no block of a K2 sector begins at byte {at}",
                path=self.paths[sector],
                next_step="copy it again from the detector's server",
            )
        return heads

    def _wait(self, sector: int, why: str) -> Incomplete:
        return Incomplete(why, path=self.paths[sector], next_step="wait for the writer, or copy it again")

    def _at(self, sector: int, block: int) -> int:
        return self._begins[sector] + block * BLOCK_BYTES

    def exposed(self) -> int | None:
        """The first frame for which the shutter was open; None: it never was.

        It is looked for as LiberTEM does: a frame of every second is looked at until one was exposed, and the first
        one is then found by halving, so before it there must not have been another exposure.
        """
        looks = [*range(0, self.frames, STRIDE), self.frames - 1]
        late = next((k for k in looks if self._is_exposed(k)), None)
        if late is None:
            return None
        low, high = int(max((k for k in looks if k < late), default=-1)), int(late)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_exposed(middle) else (middle, high)
        return high

    def _is_exposed(self, frame: int) -> bool:
        flags = [int(self._heads(s, self._block(s, frame), 1)["flags"][0]) for s in range(SECTORS)]
        return all(f & EXPOSED for f in flags)

    def _block(self, sector: int, frame: int) -> int:
        return self._first[sector] + BLOCKS * frame

    def read(self, frame: int, out: np.ndarray, named: int) -> None:
        """Fill ``out``, (1860, 2048) uint16; `MissingData` calls the frame ``named``."""
        for sector, path in enumerate(self.paths):
            rows = np.empty((BLOCKS, BLOCK_BYTES), np.uint8)
            got = self._fill(sector, rows, self._at(sector, self._block(sector, frame)), named)
            if got < rows.size:
                raise _missing(f"{got // BLOCK_BYTES} of the {BLOCKS} blocks of its sector are there", path, named)
            wrong = unpack(rows, (self.number + frame) % 2**32, out[:, sector * WIDTH : (sector + 1) * WIDTH])
            if wrong:
                raise _missing(wrong, path, named)

    def _fill(self, sector: int, rows: np.ndarray, offset: int, named: int) -> int:
        view, done = rows.data.cast("B"), 0
        while done < len(view):
            try:
                n = os.preadv(self._fds[sector], [view[done:]], offset + done)
            except OSError as error:
                raise _missing(f"can't be read: {error.strerror}", self.paths[sector], named) from error
            if n == 0:
                break
            done += n
        return done

    def check(self, start: int, count: int) -> None:
        """Raise `MissingData` if a file lacks blocks of the frames ``start:start + count``, counted from ``start``."""
        for sector, path in enumerate(self.paths):
            blocks = self._held(sector, os.fstat(self._fds[sector]).st_size) - self._first[sector]
            whole = blocks // BLOCKS - start
            if whole < count:
                raise _missing("the file was cut off", path, max(0, whole))
            if self._in_step(sector, start + count - 1):
                continue
            good, bad = -1, count - 1  # what lies behind a lost block is out of step to the end
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if self._in_step(sector, start + middle) else (good, middle)
            raise _missing("a block of its sector is missing", path, bad)

    def _in_step(self, sector: int, frame: int) -> bool:
        block, number = self._block(sector, frame), (self.number + frame) % 2**32
        try:
            ends = [int(self._heads(sector, b, 1)["frame"][0]) for b in (block, block + BLOCKS - 1)]
        except (FormatError, Incomplete):
            return False
        return ends == [number, number]

    def close(self) -> None:
        """Give the files back; more than once does no harm."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _missing(why: str, path: str, frame: int) -> MissingData:
    name = printable(os.path.basename(path))  # noqa: PTH119
    step = "copy it again from the detector's server, or record the scan again"
    return MissingData(f"{name}: {why}", path=path, frame=frame, next_step=step)


def _valid(heads: np.ndarray) -> np.ndarray:
    valid: np.ndarray = (heads["sync"] == SYNC) & (heads["size"] == BLOCK_BYTES)
    valid &= (heads["width"] == WIDTH) & (heads["height"] == HEIGHT)
    return valid


def unpack(rows: np.ndarray, number: int, out: np.ndarray) -> str | None:
    """Pixels of a sector.

    Parameters
    ----------
    rows : (32, 0x5758) ndarray of uint8
        Its blocks, in any order.
    number : int
        The frame that they must be of.
    out : (1860, 256) ndarray of uint16
        Filled.

    Returns
    -------
    str or None
        What is wrong with the blocks, if anything is.
    """
    heads = np.ascontiguousarray(rows[:, :HEADER_BYTES]).view(HEADER)[:, 0]
    if not _valid(heads).all():
        return "a block of its sector was not written"
    if (heads["frame"] != number).any():
        other = int(heads["frame"][heads["frame"] != number][0])
        return f"a block of frame number {other} lies where one of {number} should be: a block is missing"
    (y, ry), (x, rx) = (np.divmod(heads[a].astype(np.int64), n) for a, n in (("y", BLOCK_HEIGHT), ("x", BLOCK_WIDTH)))
    place = y * (WIDTH // BLOCK_WIDTH) + x
    if ry.any() or rx.any() or not np.array_equal(np.sort(place), np.arange(BLOCKS)):
        return "its blocks do not make up the sector: one is doubled or misplaced"
    triples = rows[:, HEADER_BYTES:].reshape(BLOCKS, BLOCK_HEIGHT, BLOCK_WIDTH // 2, 3)
    low, middle, high = (triples[..., i].astype(np.uint16) for i in range(3))
    values = np.empty((BLOCKS, BLOCK_HEIGHT, BLOCK_WIDTH), np.uint16)
    values[place, :, 0::2] = low | (middle & 0xF) << 8
    values[place, :, 1::2] = middle >> 4 | high << 4
    strips = values.reshape(2, WIDTH // BLOCK_WIDTH, BLOCK_HEIGHT, BLOCK_WIDTH)
    for row in range(2):
        part = out[row * BLOCK_HEIGHT : (row + 1) * BLOCK_HEIGHT]
        part[...] = strips[row].transpose(1, 0, 2).reshape(BLOCK_HEIGHT, WIDTH)
    return None
