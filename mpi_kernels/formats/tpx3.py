"""Timepix3 streams of hits, .tpx3: brought into frames by the scan's line signal."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData
from mpi_kernels.formats.access import (
    check_caps,
    json_object,
    member,
    os_errors,
    read_at,
    sibling,
    size_of,
    starts_like,
)
from mpi_kernels.formats.plan import check_request
from mpi_kernels.formats.tpx3_packets import CHIP, EDGES, MAGIC, walk
from mpi_kernels.formats.tpx3_scan import Index, Scan
from mpi_kernels.protocols import Source
from mpi_kernels.sparse import Events, densify

TAIL_BYTES = 1 << 18
"""What is looked at of the end, to see whether it is that of a chunk: four of the largest."""

UNCHECKED = "no real .tpx3 file was compared yet"
_EXAMPLE = '{"scan_shape": [256, 256], "dwell_ns": 10000, "line_trigger": "tdc1 rising"}'
_KEYS = ("scan_shape", "dwell_ns", "line_trigger", "first_line", "line_delay_ns", "chips", "gap")
_KEPT = 4
"""Decoded pieces of the stream that are kept for the next call."""


class Tpx3:
    """Raw Timepix3 data of SPIDR boards, as SERVAL stores them, and a sidecar ``<stem>.json``.

    Layout: `tpx3_packets`.  The stream knows the time of each hit and not of what frame it is, so the sidecar says
    which edge of which TDC input begins a line of the scan, and how long a position lasts.  A hit belongs to line j if
    it comes after the j-th trigger and before the next, and to position ``(time - trigger) / dwell`` of it; what comes
    after the last position of a line is flyback and left out.  Chunks are in no strict order, which does not matter:
    each hit is placed by its own time, once all triggers are known.

    Delivered as uint32 counts of hits, and as events, from which all terms are computed without making frames.  An
    electron makes several hits; they are not joined.  Time walk and the phase of the columns (below 25 ns) stay.

    Complete when there are as many triggers as lines, and each chip that has hits was heard after the scan's end: a
    later packet, or the end of its readout.  Probing looks at the sidecar and at the stream's ends alone, opening goes
    through all of it.  Stability.  Source of the sidecar: own definition.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".tpx3",)

    def probe(self, path: str) -> Header:
        """Read the sidecar, the first word, and the chunks at the end."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Go through the stream; raises what ``probe`` raises, and `Incomplete` with the first frame not there."""
        return Tpx3Source(*_probe(path), path)


def _probe(path: str) -> tuple[Header, Scan]:
    size = size_of(path)
    starts_like(read_at(path, 0, 4), MAGIC.to_bytes(4, "little"), path, "Timepix3")
    sidecar = sibling(path, ".json")
    if sidecar is None:
        raise Incomplete(
            "a stream of hits does not say what scan it is of, and no sidecar <stem>.json is there yet",
            path=path,
            next_step=f"write the sidecar: {_EXAMPLE}",
        )
    scan = _scan(json_object(sidecar), sidecar)
    _check_end(path, size)
    side = CHIP if scan.chips == 1 else 2 * CHIP + scan.gap
    check_caps(sidecar, math.prod(scan.shape), 4 * side**2)
    header = Header(
        format="tpx3",
        kind="4d",
        scan_shape=scan.shape,
        det_shape=(side, side),
        dtype="uint32",
        members=(member(path, ".tpx3"), member(sidecar, ".json")),
        rule="stability",
        unit="hits",
        metadata={"dwell_ns": scan.dwell_ps / 1000, "line_trigger": scan.trigger, "chips": scan.chips},
        warnings=(UNCHECKED,),
    )
    return header, scan


def _scan(value: dict[str, Any], sidecar: str) -> Scan:
    def wrong(message: str) -> FormatError:
        return FormatError(message, path=sidecar, next_step=f"known keys: {', '.join(_KEYS)}; such as {_EXAMPLE}")

    def number(key: str, default: float, low: float, high: float, *, whole: bool = True) -> float:
        found = value.get(key, default)
        if type(found) not in ((int,) if whole else (int, float)) or not low <= found <= high:
            raise wrong(f"{key} is {found!r:.80}, not a number from {low:g} to {high:g}")
        return float(found)

    for key in value:
        if key not in _KEYS:
            raise wrong(f"unknown key {key!r:.80}")
    shape, trigger = value.get("scan_shape"), value.get("line_trigger")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in shape):
        raise wrong(f"scan_shape is {shape!r:.80}, not [lines, positions of a line]")
    if not isinstance(trigger, str) or trigger not in EDGES:
        raise wrong(f"line_trigger is {trigger!r:.80}, none of {', '.join(EDGES)}")
    chips = int(number("chips", 4, 1, 4))
    if chips not in (1, 4):
        raise wrong(f"chips is {chips}: one chip, or four in a square, are known")
    return Scan(
        shape=(shape[0], shape[1]),
        dwell_ps=round(1000 * number("dwell_ns", 0, 1, 1e10, whole=False)),
        trigger=trigger,
        first_line=int(number("first_line", 0, 0, 1 << 24)) if "first_line" in value else None,
        delay_ns=number("line_delay_ns", 0, -1e9, 1e9, whole=False),
        chips=chips,
        gap=int(number("gap", 0, 0, 64)),
    )


def _check_end(path: str, size: int) -> None:
    """Refuse a stream that does not end with a whole chunk; chunks are found by following those near the end."""
    cut = Incomplete("it ends within a chunk of packets", path=path, next_step="wait for the writer, or copy it again")
    if size % 8:
        raise cut
    at = max(0, size - TAIL_BYTES)
    words = np.frombuffer(read_at(path, at, size - at), "<u8")
    begins = np.flatnonzero(words & np.uint64(0xFFFFFFFF) == MAGIC) if at else np.zeros(1, np.int64)
    wrong: KernelError = FormatError("no chunk of packets is at its end", path=path, next_step="copy it again")
    for begin in begins.tolist():  # a hit may look like the begin of a chunk, and then no chunk follows it
        try:
            used = walk(words[begin:], at + 8 * begin, path)[2]
        except FormatError as error:
            wrong = error
            continue
        if begin + used == len(words):
            return
        wrong = cut
    raise wrong


@dataclass(frozen=True, slots=True, eq=False)
class _Hits:
    frame: np.ndarray
    pixel: np.ndarray


class Tpx3Source:
    """Events and frames of one stream.

    Parameters
    ----------
    header : Header
        What the format found.
    scan : Scan
        What the sidecar says.
    path : str
        The file.
    """

    align = 1
    layout = None

    def __init__(self, header: Header, scan: Scan, path: str) -> None:
        self.header = header
        self._scan, self._path = scan, path
        self._kept: dict[int, _Hits] = {}
        with os_errors(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(self._fd).st_size
            self._index = Index.of(self._fd, scan, path)
        except BaseException:
            self.close()
            raise

    def events(self, start: int, stop: int) -> Events:
        """Hits of frames ``start:stop``, every count 1; `MissingData` names the frame that is not there."""
        if not 0 <= start <= stop <= self.header.frames:
            raise ValueError(f"frames {start}:{stop} are not within 0:{self.header.frames}")
        frames, pixels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number in self._index.pieces_of(start, stop):
            hits = self._hits(number, start)
            inside = (hits.frame >= start) & (hits.frame < stop)
            frames.append(hits.frame[inside])
            pixels.append(hits.pixel[inside])
        frame = np.concatenate(frames)
        order = np.argsort(frame, kind="stable")
        bounds = np.searchsorted(frame[order], np.arange(start, stop + 1))
        return Events(np.concatenate(pixels)[order], None, bounds)

    def _hits(self, number: int, frame: int) -> _Hits:
        hits = self._kept.get(number)
        if hits is None:
            try:
                found = self._index.hits(number, self._fd)
            except KernelError as error:
                raise self._missing(error.message, frame) from error
            hits = self._kept[number] = _Hits(*found)
            if len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return hits

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        densify(self.events(start, stop), out)

    def _missing(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self._path, frame=frame, next_step="copy the file again")

    def complete(self) -> None:
        """Raise `MissingData` if the stream was cut off since it was opened; what is not in it, opening has refused."""
        if os.fstat(self._fd).st_size < self._size:
            raise self._missing(f"the file was cut off: it had {self._size} bytes", 0)

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
