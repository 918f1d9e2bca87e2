"""Weighted sums of frames: all masks and moments of a recipe as the columns of one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Masks, Moments, Term
from mpi_kernels.terms import Key

EXACT = 1 << 53
"""Integers up to here are float64 numbers (IEEE 754)."""

MATRIX_BYTES = 32 << 20
"""A larger matrix of weights is made anew for each tile of pixels, so that memory stays bounded for large frames."""


def largest(values: np.ndarray) -> int:
    """Largest magnitude in an integer array, as a Python integer."""
    top = int(values.max())
    return max(top, -int(values.min())) if values.dtype.kind == "i" else top


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of one term, and the dtype of its sums."""

    start: int
    stop: int
    dtype: np.dtype


class Weights:
    """Weight columns; column 0 is always the plain total.

    Parameters
    ----------
    columns : list of (pixels,) ndarray
        Each column's weights in their own dtype.
    terms : dict
        Which columns belong to each term.
    dtype : dtype
        Of the pixels.
    """

    def __init__(self, columns: list[np.ndarray], terms: dict[Key, Columns], dtype: np.dtype) -> None:
        self._columns = columns
        self.terms = terms
        self._sums = [sum_dtype(dtype, w.dtype) for w in columns]
        self._norms = [norm(w) if s.kind in "iu" else 0 for w, s in zip(columns, self._sums, strict=True)]
        fits = len(columns) * columns[0].size * 8 <= MATRIX_BYTES
        self._matrix = self._made(slice(None)) if fits else None

    @classmethod
    def of(cls, terms: Mapping[Key, Term], header: Header) -> Weights:
        """Collect the columns of all masks and moments."""
        dtype = np.dtype(header.dtype)
        columns: list[np.ndarray] = [np.ones(int(np.prod(header.det_shape)), np.bool_)]
        found: dict[Key, Columns] = {}
        for key, term in terms.items():
            if isinstance(term, Masks | Moments):
                added, whole = columns_of(term, header)
                found[key] = Columns(len(columns), len(columns) + len(added), whole)
                columns += added
        return cls(columns, found, dtype)

    def rows(self, rows: int) -> np.ndarray:
        """Accumulator (k, rows) of 64-bit words; a column holds float64, int64 or uint64 by its weights."""
        return np.zeros((len(self._columns), rows), np.uint64)

    def take(self, rows: np.ndarray, key: Key) -> np.ndarray:
        """Sums of one term, (rows, columns), from the accumulator."""
        at = self.terms[key]
        return np.ascontiguousarray(rows[at.start : at.stop].view(at.dtype).T)

    def sums(self, strip: np.ndarray, tile: slice, *, finite: bool) -> np.ndarray:
        """Sums (n, k) in float64 over the pixels of a tile, given as ``strip`` (n, pixels of the tile) in float64.

        Unless all integers, a frame with NaN or infinity is done over: a pixel of weight 0 does not count, whatever
        its value.
        """
        matrix = self._made(tile) if self._matrix is None else self._matrix[tile]
        sums: np.ndarray = strip @ matrix
        if finite or np.isfinite(sums[:, 0]).all():
            return sums
        for i in np.flatnonzero(~np.isfinite(sums[:, 0])):
            for j in range(sums.shape[1]):
                counts = np.flatnonzero(matrix[:, j])
                sums[i, j] = strip[i, counts] @ matrix[counts, j]
        return sums

    def store(self, sums: np.ndarray, flat: np.ndarray, top: int | None, rows: np.ndarray) -> None:
        """Put the sums of a few frames into the accumulator, in integers where they must be exact.

        Parameters
        ----------
        sums : (n, k) ndarray of float64
            Over all pixels.
        flat : (n, pixels) ndarray
            The frames, for the sums that float64 can't hold.
        top : int or None
            Largest magnitude in ``flat``; None for floats.
        rows : (k, n) ndarray of uint64
            Filled with the bits of float64, int64 or uint64 sums.
        """
        for j, (weights, size, whole) in enumerate(zip(self._columns, self._norms, self._sums, strict=True)):
            if top is None or whole.kind == "f":
                rows[j] = np.ascontiguousarray(sums[:, j]).view(np.uint64)
            elif top * size < EXACT:
                rows[j] = sums[:, j].astype(whole).view(np.uint64)
            elif j:  # the plain total is only looked at, never delivered
                rows[j] = _integer_sums(flat, weights, top * size, whole).view(np.uint64)

    def _made(self, tile: slice) -> np.ndarray:
        return np.stack([w[tile].astype(np.float64) for w in self._columns], axis=1)


def columns_of(term: Masks | Moments, header: Header) -> tuple[list[np.ndarray], np.dtype]:
    """Weights of each sum of a term, (pixels,) each, and the dtype of the sums."""
    if isinstance(term, Moments):
        return moment_weights(term, header), sum_dtype(header.dtype)
    return list(term.weights.reshape(len(term.weights), -1)), sum_dtype(header.dtype, term.weights.dtype)


def moment_weights(term: Moments, header: Header) -> list[np.ndarray]:
    """Weights of total and first moments, (pixels,) each: 1, y and x where the mask counts."""
    mask = np.ones(header.det_shape, np.bool_) if term.mask is None else term.mask
    kind = np.uint16 if max(header.det_shape) <= 1 << 16 else np.uint32
    height, width = header.det_shape
    y, x = np.arange(height, dtype=kind)[:, None], np.arange(width, dtype=kind)[None, :]
    return [mask.reshape(-1), (y * mask).reshape(-1), (x * mask).reshape(-1)]


def sum_dtype(data: np.dtype | str, weights: np.dtype | None = None) -> np.dtype:
    """Dtype of sums of (weighted) pixels: 64-bit integers where both are integers, else float64."""
    kinds = np.dtype(data).kind + ("" if weights is None else weights.kind)
    if "f" in kinds:
        return np.dtype("float64")
    return np.dtype("int64" if "i" in kinds else "uint64")


def norm(weights: np.ndarray) -> int:
    """Sum of the magnitudes, in Python's integers where numpy's could wrap."""
    if weights.dtype.kind == "b":
        return int(np.count_nonzero(weights))
    if largest(weights) * weights.size < 1 << 63:
        return int(np.abs(weights.astype(np.int64)).sum())
    return sum(abs(int(w)) for w in weights.tolist())


def _integer_sums(flat: np.ndarray, weights: np.ndarray, bound: int, whole: np.dtype) -> np.ndarray:
    if bound > np.iinfo(whole).max:
        raise RecipeError(
            f"a weighted sum of a frame can reach {bound}, more than {whole} holds",
            next_step="use float weights, or smaller integers",
        )
    counts = np.flatnonzero(weights)
    chosen = weights[counts].astype(whole)
    return np.array([(frame[counts].astype(whole) * chosen).sum() for frame in flat], whole)
