"""Sum, mean, largest value and variance of all frames, pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.protocols import Max, Output, Reduction, Sum, SumSq, Term
from mpi_kernels.weights import sum_dtype

SLAB = 1 << 16
"""Pixels whose variance is worked out at a time in Python's integers."""

SAMPLE = 3
"""Frames whose median is the level of floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern(Reduction):
    """The pattern of the whole scan: outputs ``sum``, ``mean``, ``max`` and ``variance``.

    Parameters
    ----------
    variance : bool
        Leave it out with false.

    Notes
    -----
    The variance is that of the population, ``(N sum(x^2) - (sum x)^2) / N^2``.  Integers: the numerator is exact, so
    nothing cancels, and the result is rounded at most twice.  Floats: ``sum((x - r)^2)/N - (mean - r)^2`` in float64,
    not below 0, within ``2 N 2**-52 (max (x - r)^2 + |mean - r| max|x|)``; r is the median of three frames, so that a
    pedestal does not cancel the digits of what varies on it.
    Source: Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115 (shifted data).
    """

    variance: bool = True

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Arrays of the frame's shape."""
        whole = sum_dtype(header.dtype).name

        def frame(dtype: str, unit: str, long_name: str) -> Output:
            return Output(over="frame", shape=header.det_shape, dtype=dtype, unit=unit, long_name=long_name)

        found = {
            "sum": frame(whole, header.unit, "sum of all frames"),
            "mean": frame("float64", header.unit, "mean of all frames"),
            "max": frame(header.dtype, header.unit, "largest value of all frames"),
        }
        if self.variance:
            found["variance"] = frame("float64", f"{header.unit}^2" if header.unit else "", "variance of all frames")
        return found

    def samples(self, header: Header) -> int:
        """Three where the variance of floats is wanted: one may be blank, or have a bad pixel."""
        return SAMPLE if self.variance and np.dtype(header.dtype).kind == "f" else 0

    def settled(self, frames: np.ndarray, header: Header) -> Reduction:  # noqa: ARG002
        """With the level that squares are taken from."""
        with np.errstate(invalid="ignore", over="ignore"):
            level = np.median(frames.astype(np.float64), axis=0)
        return _Shifted(variance=True, level=np.where(np.isfinite(level), level, 0.0))

    def terms(self, header: Header) -> Mapping[str, Term]:  # noqa: ARG002
        """Sum, largest value, and squares for the variance."""
        found: dict[str, Term] = {"sum": Sum(), "max": Max()}
        return found | {"squares": SumSq(self._level())} if self.variance else found

    def end(
        self, arrays: Mapping[str, np.ndarray], header: Header
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Divide by the number of frames."""
        n, total = header.frames, arrays["sum"]
        found = {"sum": total, "mean": total / n, "max": arrays["max"]}
        if self.variance:
            squares = arrays["squares"]
            exact = total.dtype.kind in "iu"
            found["variance"] = (
                _exact_variance(n, total, squares) if exact else _float_variance(n, total, squares, self._level())
            )
        scalars: dict[str, Scalar] = {"total": _plain(total.sum(dtype=object)), "max": _plain(arrays["max"].max())}
        return found, scalars

    def _level(self) -> np.ndarray | None:
        """What floats are squared less, (det_y, det_x) float64."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shifted(Pattern):
    """With a level from a sample."""

    level: np.ndarray

    def _level(self) -> np.ndarray | None:
        return self.level


def _exact_variance(n: int, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Variance from exact integers: ``squares`` are (2, det_y, det_x) words of 32 bits."""
    found = np.empty(total.size)
    sums, (high, low) = total.reshape(-1), squares.reshape(2, -1)
    for start in range(0, total.size, SLAB):
        at = slice(start, start + SLAB)
        if n * ((int(high[at].max()) + 1) << 32) < 1 << 63:  # (sum x)^2 <= N sum(x^2), so this bounds both
            first = sums[at].astype(np.int64)
            words = ((high[at] << np.uint64(32)) + low[at]).astype(np.int64)
            found[at] = (n * words - first * first) / (n * n)
        else:
            whole = zip(sums[at].tolist(), high[at].tolist(), low[at].tolist(), strict=True)
            found[at] = [(n * ((h << 32) + w) - s * s) / (n * n) for s, h, w in whole]
    return found.reshape(total.shape)


def _float_variance(n: int, total: np.ndarray, squares: np.ndarray, level: np.ndarray | None) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # infinities in the data
        mean = total / n if level is None else total / n - level
        return np.maximum(squares / n - mean * mean, 0.0)


def _plain(value: float) -> Scalar:
    return value if isinstance(value, int | float) else value.item()
