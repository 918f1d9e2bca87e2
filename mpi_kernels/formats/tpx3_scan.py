"""Where the hits of a scan are in a Timepix3 stream: the lines' triggers, and the times of each piece of the stream."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import from_os
from mpi_kernels.formats.tpx3_packets import EDGES, UNITS_PER_NS, Packets, decode, places, walk

PIECE_BYTES = 1 << 20
"""Stream that is decoded at a time, in whole chunks; one has at most 64 KiB."""

NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What the sidecar says.

    Attributes
    ----------
    shape : (int, int)
        Lines, and positions of a line.
    dwell_ps : int
        Time of a position, ps.
    trigger : str
        The edge that begins a line, a key of `tpx3_packets.EDGES`.
    first_line : int, optional
        Trigger of the first line, counted from 0; None: there are no other triggers than those of the lines.
    delay_ns : float
        From the trigger to the begin of the line's first position.
    chips, gap : int
        One chip or four; rows and columns between these.
    """

    shape: tuple[int, int]
    dwell_ps: int
    trigger: str
    first_line: int | None = None
    delay_ns: float = 0.0
    chips: int = 4
    gap: int = 0

    def position(self, since: np.ndarray) -> np.ndarray:
        """Position within a line by the time since its begin, in units of 25/96 ns; exact."""
        found: np.ndarray = since * 3125 // (12 * self.dwell_ps)
        return found

    @property
    def line_units(self) -> int:
        """Time from the begin of a line to the end of its last position, units of 25/96 ns, rounded up."""
        return -(-self.shape[1] * 12 * self.dwell_ps // 3125)


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole chunks: where they lie, the last time before them, and the first and last time of a hit."""

    offset: int
    words: int
    before: int | None
    low: int
    high: int


class Index:
    """Lines and pieces of one stream."""

    def __init__(self, scan: Scan, path: str, lines: np.ndarray, pieces: list[Piece]) -> None:
        self._scan, self._path = scan, path
        self._lines, self._pieces = lines, pieces
        self._low = np.array([p.low for p in pieces], np.int64)
        self._high = np.array([p.high for p in pieces], np.int64)

    @classmethod
    def of(cls, fd: int, scan: Scan, path: str) -> Index:
        """Go through a stream.

        Raises
        ------
        Incomplete
            Lines are missing, or the stream ends before the scan; names the first frame.
        FormatError
            Chunks that are none, hits without times, more triggers than lines, lines shorter than their positions.
        """
        size, at, before = os.fstat(fd).st_size, 0, None
        pieces: list[Piece] = []
        triggers: list[np.ndarray] = []
        heard = np.full(256, NO_TIME, np.int64)
        hit, ended = np.zeros(256, bool), np.zeros(256, bool)
        while at < size:
            words = _words(fd, at, PIECE_BYTES, path)
            heads, chips, used = walk(words, at, path)
            if not used:
                raise Incomplete("it ends within a chunk of packets", path=path, next_step="wait for the writer")
            found = decode(words[:used], heads, chips, before, path)
            times = found.time[found.pixel]
            low, high = (int(times.min()), int(times.max())) if len(times) else (1, 0)
            pieces.append(Piece(at, used, before, low, high))
            triggers.append(found.triggers(EDGES[scan.trigger]))
            np.maximum.at(heard, found.chip, found.time)
            hit[found.chip[found.pixel]] = True
            ended[found.ended] = True
            before = int(found.time[-1]) if len(found.time) else before
            at += 8 * used
        _check_chips(np.flatnonzero(hit), scan, path)
        lines = _lines(np.unique(np.concatenate(triggers)), scan, path)
        index = cls(scan, path, lines, pieces)
        index._check_end(heard, hit & ~ended)
        return index

    def _check_end(self, heard: np.ndarray, open_chips: np.ndarray) -> None:
        end = int(self._lines[-1]) + self._scan.line_units
        for chip in np.flatnonzero(open_chips & (heard < end)).tolist():
            frame = int(np.searchsorted(self._lines, heard[chip], "right")) - 1
            raise Incomplete(
                f"chip {chip} is not heard of after the scan's last position",
                path=self._path,
                frame=max(0, frame) * self._scan.shape[1],
                next_step="wait for the writer; a recording has to go on a little longer than its scan",
            )

    def pieces_of(self, start: int, stop: int) -> list[int]:
        """Pieces that may have hits of the frames ``start:stop``."""
        if start >= stop:
            return []
        columns = self._scan.shape[1]
        begin, end = self._lines[start // columns], self._lines[(stop - 1) // columns] + self._scan.line_units
        return [int(i) for i in np.flatnonzero((self._high >= begin) & (self._low < end) & (self._low <= self._high))]

    def hits(self, number: int, fd: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame and pixel of each hit of a piece that is in the scan, (m,) int64."""
        piece = self._pieces[number]
        words = _words(fd, piece.offset, 8 * piece.words, self._path)
        heads, chips, used = walk(words, piece.offset, self._path)
        if used < piece.words:
            raise Incomplete("the file was cut off", path=self._path)
        found = decode(words, heads, chips, piece.before, self._path)
        return self._placed(found)

    def _placed(self, found: Packets) -> tuple[np.ndarray, np.ndarray]:
        columns = self._scan.shape[1]
        time = found.time[found.pixel]
        line = np.searchsorted(self._lines, time, "right") - 1
        position = self._scan.position(time - self._lines[np.maximum(line, 0)])
        inside = (line >= 0) & (position < columns)
        words, chip = found.words[found.pixel][inside], found.chip[found.pixel][inside]
        return (line * columns + position)[inside], places(words, chip, self._scan.chips, self._scan.gap)


def _words(fd: int, offset: int, count: int, path: str) -> np.ndarray:
    pieces = []
    try:
        while count > 0 and (piece := os.pread(fd, count, offset)):
            pieces.append(piece)
            offset, count = offset + len(piece), count - len(piece)
    except OSError as error:
        raise from_os(error, path) from error
    data = b"".join(pieces)
    return np.frombuffer(data, "<u8", len(data) // 8).astype(np.uint64)


def _check_chips(found: np.ndarray, scan: Scan, path: str) -> None:
    allowed = len(found) <= 1 if scan.chips == 1 else bool((found < scan.chips).all())
    if not allowed:
        raise FormatError(
            f"it has hits of chips {found.tolist()[:8]}, and the sidecar says {scan.chips}",
            path=path,
            next_step='correct "chips" in the sidecar: 1, or 4 for a square of four',
        )


def _lines(triggers: np.ndarray, scan: Scan, path: str) -> np.ndarray:
    """Time at which each line begins; a trigger that several chips report counts once."""
    rows, columns = scan.shape
    first = scan.first_line or 0
    lines = triggers[first : first + rows]
    if len(lines) < rows:
        raise Incomplete(
            f"{len(lines)} of {rows} lines have their trigger ({scan.trigger})",
            path=path,
            frame=len(lines) * columns,
            next_step="wait for the writer, or correct scan_shape, line_trigger or first_line in the sidecar",
        )
    if scan.first_line is None and len(triggers) > rows:
        raise FormatError(
            f"it has {len(triggers)} triggers ({scan.trigger}) for {rows} lines",
            path=path,
            next_step='say in the sidecar which of them begins the first line: "first_line": 0',
        )
    apart = int(np.diff(lines).min()) if rows > 1 else scan.line_units
    if scan.position(np.array([apart]))[0] < columns - 1:
        raise FormatError(
            f"lines follow one another after {apart / UNITS_PER_NS:.0f} ns, less than {columns} positions take",
            path=path,
            next_step="correct dwell_ns, scan_shape or line_trigger in the sidecar",
        )
    begins: np.ndarray = lines + round(scan.delay_ns * UNITS_PER_NS)
    return begins
