"""What the kernels are told about a recipe: columns of weights, sorted regions, and the compiler's options.

Nothing here needs a card.  What the kernels can't compute exactly is `Unsuited`, with the reason; `mpi_kernels.fused`
on the CPU does it then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq, Term
from mpi_kernels.terms import Key
from mpi_kernels.weights import columns_of, largest, norm, sum_dtype

KERNEL = Path(__file__).with_name("kernel.cu")

THREADS = 256
"""Of a block."""

PIXELS = 8
"""Pixels of a thread; a number of kernel.cu."""

COLUMNS = 8
"""Columns of weights in one visit: their sums stay in registers.  More of them take another visit."""

GROUP_FRAMES = 64
"""Frames that one thread adds up before their sum is handed on, at most; sums of 16-bit pixels fit 32 bits."""

GROUP_BYTES = 32 << 20
"""Memory of a group at most, so that at least one fits a buffer of 64 MiB, whatever the frames' size."""

PIXEL_OPTIONS = {
    "uint8": "-DPIXEL_U8",
    "uint16": "-DPIXEL_U16",
    "uint32": "-DPIXEL_U32",
    "int16": "-DPIXEL_I16",
    "float32": "-DPIXEL_F32",
}


class Unsuited(Exception):
    """The kernels do not do this; the message is the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One visit of a block.

    Attributes
    ----------
    options : tuple of str
        For the compiler.
    start, stop : int
        Its columns among those of the program.
    integers : (i, pixels) ndarray of uint32 or uint64
        Weights in two's complement, as wide as the sums of a warp are.
    floats : (f, pixels) ndarray of float64
        The columns after them.
    """

    options: tuple[str, ...]
    start: int
    stop: int
    integers: np.ndarray
    floats: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Sorted:
    """Pixels of disjoint regions: region ``r`` has ``order[starts[r] : starts[r + 1]]``, int32, in C order."""

    order: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, slots=True)
class _Column:
    weights: np.ndarray
    dtype: np.dtype


class Program:
    """Terms made ready for the kernels.

    Parameters
    ----------
    terms : mapping of Key to Term
        Different ones.
    header : Header
        Oriented.
    threads : int
        Of a block, a multiple of 32.

    Raises
    ------
    Unsuited
        The kernels can't do this exactly.
    """

    def __init__(self, terms: Mapping[Key, Term], header: Header, threads: int = THREADS) -> None:
        self.dtype = np.dtype(header.dtype)
        if self.dtype.name not in PIXEL_OPTIONS:
            raise Unsuited(f"no kernel for pixels of type {self.dtype}")
        self.shape = header.det_shape
        self.pixels = int(np.prod(header.det_shape))
        if max(self.pixels, header.frames) >= 1 << 31:
            raise Unsuited(f"{header.frames} frames of {self.pixels} pixels: indices and sums are proven below 2**31")
        self.threads = threads
        self.tiles = -(-self.pixels // (threads * PIXELS))
        self.group = group_frames(self.pixels * self.dtype.itemsize)
        self.whole = sum_dtype(self.dtype)
        self.wants = frozenset(type(t) for t in terms.values())
        self.level = _level(terms)
        self.sorted = {k: _sorted(t) for k, t in terms.items() if isinstance(t, Labels)}
        columns = {k: _columns(t, header) for k, t in terms.items()}
        flat = [(k, c) for k, found in columns.items() for c in found]
        flat.sort(key=lambda pair: pair[1].dtype.kind == "f")  # stable: integers first
        self.columns = len(flat)
        self.at = {k: [i for i, (key, _) in enumerate(flat) if key == k] for k in columns}
        self.dtypes = {k: found[0].dtype if found else self.whole for k, found in columns.items()}
        starts = range(0, max(1, self.columns), COLUMNS)
        self.passes = tuple(self._pass(s, [c for _, c in flat[s : s + COLUMNS]]) for s in starts)

    def _pass(self, start: int, columns: list[_Column]) -> Pass:
        whole = [c for c in columns if c.dtype.kind != "f"]
        floats = [c.weights.astype(np.float64) for c in columns if c.dtype.kind == "f"]
        narrow, signed = _fits_32_bits(whole, self.dtype)
        options = [PIXEL_OPTIONS[self.dtype.name], f"-DTHREADS={self.threads}"]
        options += [f"-DINTEGER_COLUMNS={len(whole)}", f"-DFLOAT_COLUMNS={len(floats)}"]
        options += ["-DNARROW"] * narrow + ["-DSIGNED_ROWS"] * signed
        if not start:
            wanted = {Sum: "-DWANT_SUM", SumSq: "-DWANT_SQUARES", Max: "-DWANT_MAX"}
            options += [option for kind, option in wanted.items() if kind in self.wants] + ["-DQUALITY"]
            options += ["-DWITH_LEVEL"] * (self.level is not None)
        words = np.zeros((len(whole), self.pixels), np.uint32 if narrow else np.uint64)
        for row, column in zip(words, whole, strict=True):
            wide = np.uint64 if column.weights.dtype.kind == "u" else np.int64
            row[...] = column.weights.astype(wide).astype(words.dtype)  # modulo 2**32 or 2**64
        matrix = np.array(floats, np.float64).reshape(len(floats), self.pixels)
        return Pass(tuple(options), start, start + len(columns), words, matrix)


def group_frames(frame_bytes: int) -> int:
    """Frames of a group, the unit in which floats are added: a power of two that the frame's size alone decides."""
    fit = max(1, GROUP_BYTES // frame_bytes)
    return min(GROUP_FRAMES, 1 << (fit.bit_length() - 1))


def _level(terms: Mapping[Key, Term]) -> np.ndarray | None:
    """What floats are squared less, (pixels,) float64, or None."""
    shifts = [t.shift for t in terms.values() if isinstance(t, SumSq)]
    if len(shifts) > 1:
        raise Unsuited(f"squares about {len(shifts)} different levels: the kernels take one")
    return shifts[0].reshape(-1) if shifts and shifts[0] is not None else None


def _columns(term: Term, header: Header) -> list[_Column]:
    """Columns of one term, (pixels,) each, with the dtype of their sums."""
    if not isinstance(term, Masks | Moments):
        return []
    rows, dtype = columns_of(term, header)
    if dtype.kind != "f":
        top = _largest_pixel(np.dtype(header.dtype))
        for row in rows:
            reach = top * norm(row)
            if reach > np.iinfo(dtype).max:
                raise Unsuited(f"a weighted sum of a frame can reach {reach}, more than {dtype} holds")
    return [_Column(row, dtype) for row in rows]


def _fits_32_bits(columns: list[_Column], data: np.dtype) -> tuple[bool, bool]:
    """Whether the integer sums of a warp fit 32 bits, and whether they may be negative."""
    if not columns:
        return False, False
    signed = any(c.dtype.kind == "i" for c in columns)
    reach = _largest_pixel(data) * max(largest(c.weights) for c in columns) * 32 * PIXELS
    return reach < 1 << (31 if signed else 32), signed


def _sorted(term: Labels) -> Sorted:
    labels = term.labels.reshape(-1)
    counted = np.flatnonzero(labels >= 0)
    order = counted[np.argsort(labels[counted], kind="stable")]
    starts = np.searchsorted(labels[order], np.arange(term.regions + 1))
    return Sorted(order.astype(np.int32), starts.astype(np.int32))


def _largest_pixel(data: np.dtype) -> int:
    limits = np.iinfo(data)
    return max(int(limits.max), -int(limits.min))
