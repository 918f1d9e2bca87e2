"""Exact scans as detectors stream them, block by block or hit by hit: Gatan's K2 in-situ and Timepix3."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_kernels.exact import ExactScan
from mpi_kernels.formats.k2is_blocks import BLOCK_BYTES, BLOCKS, HEADER, HEIGHT, SECTORS, SYNC, WIDTH


class Inset(ExactScan):
    """A small exact scan somewhere in a large frame of zeros: few counts, and small ones, on a detector of full size.

    Parameters
    ----------
    scan_shape, det_shape : tuple of int
        Of the whole.
    dtype : str
        Unsigned pixels; the counts fit 8 bits.
    inner : (int, int)
        Shape of the small one.
    at : (int, int)
        ``(y, x)`` of its first pixel.
    """

    def __init__(
        self,
        scan_shape: tuple[int, ...],
        det_shape: tuple[int, int],
        dtype: str,
        inner: tuple[int, int],
        at: tuple[int, int],
        seed: int = 0,
        empty_every: int = 0,
    ) -> None:
        super().__init__(scan_shape, inner, "uint8", seed, empty_every)
        self._inner = ExactScan(scan_shape, inner, "uint8", seed, empty_every)
        self.det_shape, self.dtype = det_shape, np.dtype(dtype)
        self._at = tuple(slice(a, a + n) for a, n in zip(at, inner, strict=True))

    def frames(self, start: int, stop: int) -> np.ndarray:
        """Frames ``start:stop``: (n, det_y, det_x) in ``dtype``."""
        out = np.zeros((stop - start, *self.det_shape), self.dtype)
        out[:, self._at[0], self._at[1]] = self._inner.frames(start, stop)
        return out


def write_k2is(
    scan: ExactScan,
    path: Path,
    *,
    before: int = 1,
    after: int = 1,
    lags: Sequence[int] = (0, 5, 0, 40, 0, 0, 31, 1),
    number: int = 700,
) -> Path:
    """A K2 in-situ recording ``<stem>_.gtg`` of counts below 4096, 1860 x 2048 pixels.

    Parameters
    ----------
    before, after : int
        Frames of noise before the scan, which the shutter's flag leaves out, and after it.
    lags : sequence of int
        Blocks that each file lacks at its beginning; those of frames before the scan go first.
    number : int
        The detector's number of the first frame.
    """
    if scan.det_shape != (HEIGHT, SECTORS * WIDTH) or scan.dtype != np.uint16:
        raise ValueError("K2 frames are 1860 x 2048 uint16")
    is_scan = len(scan.scan_shape) == 2
    lead = before + -(-max(lags) // BLOCKS)  # noise that some file has not all of comes first
    noise = np.random.default_rng(number).integers(0, 4096, scan.det_shape, np.uint16)
    stem = path.name.removesuffix(".gtg")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((path.parent / f"{stem}{n}.bin").open("wb")) for n in range(1, SECTORS + 1)]
        for i in range(lead + scan.count + after):
            exposed = i - lead >= (1 if is_scan else 0)  # the STEM unit's flag comes a frame late
            frame = scan.frame(i - lead) if 0 <= i - lead < scan.count else noise
            for file, strip, lag in zip(files, np.split(frame, SECTORS, axis=1), lags, strict=True):
                file.write(sector_blocks(strip, number + i, exposed=exposed)[max(0, lag - BLOCKS * i) :].tobytes())
    size = scan.scan_shape if is_scan else ()
    path.write_bytes(_gtg({f"Size {axis}": n for axis, n in zip("YX", size, strict=False)}))
    return path


def sector_blocks(strip: np.ndarray, number: int, *, exposed: bool) -> np.ndarray:
    """A strip of a frame, (1860, 256), as its blocks (32, 0x5758) uint8: from right to left, the upper ones first."""
    rows = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
    for i, row in enumerate(rows):
        y, x = _corner(i)
        pairs = strip[y : y + 930, x : x + 16].astype(np.uint32).reshape(-1, 2)
        packed = pairs[:, 0] | pairs[:, 1] << 12
        row[:40] = np.frombuffer(block_header(number, i, exposed=exposed), np.uint8)
        row[40:] = np.ascontiguousarray(packed.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :3].reshape(-1)
    return rows


def block_header(number: int, block: int, *, exposed: bool) -> bytes:
    """The 40 bytes before the pixels of a block of frame ``number``."""
    y, x = _corner(block)
    head = np.zeros(1, HEADER)
    count = (BLOCKS * number + block) % 2**32
    head[0] = (SYNC, exposed, count, WIDTH, HEIGHT, number, x, y, x + 15, y + 929, BLOCK_BYTES)
    return head.tobytes()


def _corner(block: int) -> tuple[int, int]:
    return 930 * (block // 16), 16 * (15 - block % 16)


def _gtg(sizes: dict[str, int]) -> bytes:
    """Tags of version 3, little-endian, with no image."""

    def named(kind: int, name: str) -> bytes:
        return struct.pack(">BH", kind, len(name)) + name.encode("latin-1")

    values = [named(21, name) + b"%%%%" + struct.pack(">II", 1, 5) + struct.pack("<I", n) for name, n in sizes.items()]
    groups = (
        [named(20, "SI Dimensions") + b"\0\0" + struct.pack(">I", len(values)) + b"".join(values)] if values else []
    )
    groups.append(named(21, "Version") + b"%%%%" + struct.pack(">II", 1, 5) + struct.pack("<I", 1))
    body = b"\0\0" + struct.pack(">I", len(groups)) + b"".join(groups)
    return struct.pack(">III", 3, len(body), 1) + body + bytes(8)


def write_tpx3(
    scan: ExactScan, path: Path, *, dwell_ns: int = 1000, start_s: float = 26.84354, hits: int = 100
) -> Path:
    """A Timepix3 stream of 256 x 256 or 512 x 512 pixels, a hit for each count, and its sidecar.

    Parameters
    ----------
    dwell_ns : int
        Time of a position; a line takes two positions more, for the flyback, in which there is a hit too.
    start_s : float
        Time of the first trigger; the default lets the pixels' clock begin anew within the scan.
    hits : int
        Packets of a chunk; chunks of different chips come one after the other, so later times before earlier ones.
    """
    if dwell_ns % 50:
        raise ValueError("a position has to last a whole number of 3.125 ns")
    rows, columns = scan.scan_shape
    chips = 1 if scan.det_shape == (256, 256) else 4
    streams: list[list[tuple[int, int]]] = [[] for _ in range(chips)]  # (time in 25/16 ns, word)
    begin = 2 * round(start_s * 1e9 * 8 / 25)
    for i, frame in enumerate(scan.frames(0, scan.count)):
        line, position = divmod(i, columns)
        trigger = begin + line * (columns + 2) * dwell_ns * 16 // 25
        if position == 0:
            streams[0].append((trigger, 0x6F << 56 | line % 4096 << 44 | trigger // 2 % 2**35 << 9 | 1 << 5))
            streams[0].append(_hit(trigger + (columns + 1) * dwell_ns * 16 // 25, 0, 0))
        y, x = (np.repeat(a, frame[frame > 0].astype(np.int64)) for a in np.nonzero(frame))
        within = np.linspace(0, dwell_ns * 16 // 25 - 1, max(1, len(y))).astype(np.int64)
        for when, at_y, at_x in zip(within.tolist(), y.tolist(), x.tolist(), strict=False):
            chip, place_y, place_x = _on_chip(at_y, at_x, chips)
            streams[chip].append(_hit(trigger + position * dwell_ns * 16 // 25 + when, place_y, place_x))
    data = b""
    while any(streams):
        for chip, packets in enumerate(streams):
            words, streams[chip] = [word for _, word in packets[:hits]], packets[hits:]
            words += [] if streams[chip] or not words else [0x71B0 << 48]
            data += struct.pack(f"<{len(words) + 1}Q", 8 * len(words) << 48 | chip << 32 | 0x33585054, *words)
    said = {"scan_shape": [rows, columns], "dwell_ns": dwell_ns, "line_trigger": "tdc1 rising", "chips": chips}
    path.with_suffix(".json").write_text(json.dumps(said))
    path.write_bytes(data)
    return path


def _on_chip(y: int, x: int, chips: int) -> tuple[int, int, int]:
    """Chip, row and column of a pixel of the frame."""
    if chips == 1:
        return 0, y, x
    if y < 256:
        return (3 if x < 256 else 0), y, x % 256
    return (2 if x < 256 else 1), 511 - y, 255 - x % 256


def _hit(when: int, y: int, x: int) -> tuple[int, int]:
    """A hit at a time in 25/16 ns: coarse times count on, and the fine one back from the next."""
    coarse = -(-when // 16)
    address = (x >> 1) << 9 | (y >> 2) << 3 | (x & 1) << 2 | y & 3
    word = (
        0xB << 60 | address << 44 | coarse % 2**14 << 30 | 20 << 20 | coarse * 16 - when << 16 | coarse >> 14 & 0xFFFF
    )
    return when, word
