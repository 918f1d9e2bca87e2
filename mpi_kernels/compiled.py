"""All terms of a recipe through the compiled kernels: the same numbers as :mod:`mpi_kernels.fused`, many times faster.

The kernels see frames as they lie in the file.  Where a recipe turns the detector, its masks are turned back instead,
once, and what is made per pixel is turned at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header, Kernel, Orientation
from mpi_kernels.extension import MISSING, native
from mpi_kernels.fused import Quality
from mpi_kernels.merging import over_frames
from mpi_kernels.plan import oriented, unturned
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key, unique
from mpi_kernels.weights import moment_weights, sum_dtype

PIXELS = frozenset({"uint8", "uint16", "uint32", "int16", "float32"})
"""Kinds of pixels that the kernels know."""


class NotCompiled(Exception):
    """Why the compiled kernels can't be used for these data or this recipe."""


class Compiled:
    """Accumulators of one rank, as `mpi_kernels.fused.Fused`, but in the compiled kernels.

    Parameters
    ----------
    wanted : iterable of Term
        Equal ones are computed once.
    header : Header
        Oriented.
    rows : int
        Frames that this rank may be given.
    orientation : Orientation
        How the frames will be turned; `add` takes them as they are in the file.
    kernel : str
        Instruction set, or "auto".
    threads : int
        Threads of `add`.

    Raises
    ------
    NotCompiled
        Why it can't be done here: the caller takes `mpi_kernels.fused.Fused`.
    """

    in_file_order: ClassVar[bool] = True

    def __init__(
        self,
        wanted: Iterable[Term],
        header: Header,
        rows: int,
        *,
        orientation: Orientation,
        kernel: Kernel = "auto",
        threads: int = 1,
    ) -> None:
        if header.dtype not in PIXELS:
            raise NotCompiled(f"no compiled kernels for pixels of {header.dtype}")
        if native is None:
            raise NotCompiled(MISSING)
        self.terms = unique(wanted)
        self._orientation, self._threads = orientation, threads
        self._dtype = dtype = np.dtype(header.dtype)
        shifts = [t.shift for t in self.terms.values() if isinstance(t, SumSq)]
        if len(shifts) > 1:
            raise NotCompiled(f"squares about {len(shifts)} different levels: the compiled kernels take one")
        level = shifts[0] if shifts else None
        if dtype.kind in "iu" and header.frames * int(np.iinfo(dtype).max) > np.iinfo(np.int64).max:
            raise NotCompiled(f"{header.frames} frames of {header.dtype} could leave 64 bits")
        self._shape = header.det_shape[::-1] if orientation.transpose else header.det_shape
        kinds = {type(t) for t in self.terms.values()}
        pixels = int(np.prod(self._shape))
        whole, integer = sum_dtype(dtype), dtype.kind in "iu"
        self._sum = np.zeros(pixels if integer else (2, pixels), whole) if Sum in kinds else None
        self._squares = np.zeros((2, pixels), np.uint64 if integer else np.float64) if SumSq in kinds else None
        lowest = np.iinfo(dtype).min if integer else -np.inf
        self._max = np.full(pixels, lowest, dtype) if Max in kinds else None
        self._rows: dict[Key, np.ndarray] = {}
        per_frame = self._per_frame(header, rows)
        try:
            self.native: Any = native.Pass(
                header.dtype,
                self._shape,
                rows,
                kernel=kernel,
                sum=self._sum,
                squares=self._squares,
                level=None if level is None else self._flat(level),
                max=self._max,
                **per_frame,
            )
        except ValueError as error:
            raise NotCompiled(str(error)) from error
        self.kernel: str = self.native.kernel
        floats = Sum in kinds or SumSq in kinds
        self.group: int = self.native.group if floats and not integer else 1
        """Frames that are summed together; shares that begin at multiples of it change no bit of float sums."""

    def _per_frame(self, header: Header, rows: int) -> dict[str, list[Any]]:
        """Arguments of the pass for what has one entry a frame, and the arrays that it fills."""
        found: dict[str, list[Any]] = {"masks": [], "labels": [], "moments": []}
        whole = sum_dtype(self._dtype)
        for key, term in self.terms.items():
            match term:
                case Labels(labels, regions):
                    out = np.zeros((rows, regions), whole)
                    found["labels"].append((self._flat(labels.astype(np.int32)), regions, out))
                case Moments(mask) if self._orientation == Orientation():
                    out = np.zeros((rows, 3), whole)
                    found["moments"].append((None if mask is None else self._flat(mask), out))
                case Moments():  # of a turned frame: weights like any others
                    weights = np.stack(moment_weights(term, header)).reshape(3, *header.det_shape)
                    out = np.zeros((rows, 3), whole)
                    found["masks"].append((self._flat(weights), out))
                case Masks(weights):
                    out = np.zeros((rows, len(weights)), sum_dtype(self._dtype, weights.dtype))
                    given = weights.astype(np.float64) if weights.dtype.kind == "f" else weights
                    found["masks"].append((self._flat(given), out))
                case _:
                    continue
            self._rows[key] = out
        return found

    def _flat(self, array: np.ndarray) -> np.ndarray:
        """An array over the turned frame as one over the file's, pixels flat."""
        turned = unturned(array, self._orientation)
        return np.ascontiguousarray(turned).reshape(*array.shape[:-2], -1)

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add (n, det_y, det_x) frames as they are in the file; the first one is row ``row`` of this rank's share."""
        self.native.add(np.ascontiguousarray(frames), row, self._threads)

    @property
    def quality(self) -> Quality:
        """What the frames so far were like."""
        return Quality(**self.native.quality())

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Arrays per pixel by term on rank 0, None elsewhere; more frames may be added afterwards."""
        self.native.flush()
        arrays = {Sum: self._sum, SumSq: self._squares, Max: self._max}
        found = over_frames(ranks, self.terms, lambda key: arrays[type(self.terms[key])], pairs=True)
        return None if found is None else {k: self._turned(a) for k, a in found.items()}

    def rows(self, used: int) -> Mapping[Key, np.ndarray]:
        """Sums of this rank's first ``used`` frames, by term."""
        return {key: rows[:used] for key, rows in self._rows.items()}

    def _turned(self, array: np.ndarray) -> np.ndarray:
        frames = array.reshape(-1, *self._shape)
        turned = oriented(frames, self._orientation)
        return np.ascontiguousarray(turned).reshape(*array.shape[:-1], *turned.shape[1:])
