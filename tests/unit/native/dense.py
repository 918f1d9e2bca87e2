"""What a pass must deliver, the dense way: all frames at once in numpy, Python's integers where 64 bits are too few."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

ULP = 2.0**-52


BOOL = np.dtype("bool")


def whole_dtype(data: np.dtype, weights: np.dtype = BOOL) -> np.dtype:
    """Of sums: 64-bit integers if everything is, else float64."""
    if "f" in (data.kind, weights.kind):
        return np.dtype("float64")
    return np.dtype("int64" if "i" in (data.kind, weights.kind) else "uint64")


@dataclass
class Terms:
    """What is asked of a pass, and the arrays it fills."""

    x: np.ndarray
    """(frames, pixels)"""
    shape: tuple[int, int]
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[tuple[np.ndarray, int]] = field(default_factory=list)
    moments: list[np.ndarray | None] = field(default_factory=list)
    level: np.ndarray | None = None

    def __post_init__(self) -> None:
        n, pixels = self.x.shape
        dtype = self.x.dtype
        self.floats = dtype.kind == "f"
        whole = whole_dtype(dtype)
        self.sum = np.zeros((2, pixels) if self.floats else pixels, whole)
        self.squares = np.zeros((2, pixels), "float64" if self.floats else "uint64")
        self.max = np.full(pixels, -np.inf if self.floats else np.iinfo(dtype).min, dtype)
        self.mask_rows = [np.zeros((n, len(w)), whole_dtype(dtype, w.dtype)) for w in self.masks]
        self.label_rows = [np.zeros((n, regions), whole) for _, regions in self.labels]
        self.moment_rows = [np.zeros((n, 3), whole) for _ in self.moments]

    def arguments(self) -> dict[str, Any]:
        """Of Pass, by name."""
        more = {} if self.level is None else {"level": self.level}
        return more | {
            "sum": self.sum,
            "squares": self.squares,
            "max": self.max,
            "masks": list(zip(self.masks, self.mask_rows, strict=True)),
            "labels": [(*pair, rows) for pair, rows in zip(self.labels, self.label_rows, strict=True)],
            "moments": list(zip(self.moments, self.moment_rows, strict=True)),
        }

    def check(self, quality: dict[str, int]) -> None:
        """Compare everything: integers to the bit, floats within their bound."""
        with np.errstate(all="ignore"):
            self._check_images()
            for weights, rows in zip(self.masks, self.mask_rows, strict=True):
                self._check_rows(weights, rows)
            for (labels, regions), rows in zip(self.labels, self.label_rows, strict=True):
                self._check_rows(labels == np.arange(regions)[:, None], rows)
            y, x = (a.reshape(-1) for a in np.mgrid[: self.shape[0], : self.shape[1]])
            for mask, rows in zip(self.moments, self.moment_rows, strict=True):
                inside = np.ones(len(y), int) if mask is None else mask.astype(int)
                self._check_rows(np.stack([inside, y * inside, x * inside]).astype(np.uint32), rows)
        assert quality == {
            "pixels": self.x.size,
            "not_finite": int((~np.isfinite(self.x)).sum()),
            "saturated": 0 if self.floats else int((self.x == np.iinfo(self.x.dtype).max).sum()),
            "empty_frames": int((~self.x.any(axis=1)).sum()),
        }

    def _check_images(self) -> None:
        x = self.x
        if len(x):
            assert np.array_equal(self.max, x.max(axis=0), equal_nan=self.floats)
        if self.floats:
            wide = x.astype(np.float64)
            _close(self.sum.sum(axis=0), wide.sum(axis=0), np.abs(wide).sum(axis=0) * (len(x) + 1) * ULP)
            off = wide if self.level is None else wide - self.level
            squares = (off * off).sum(axis=0)
            _close(self.squares.sum(axis=0), squares, squares * (len(x) + 4) * ULP)
            return
        big = x.astype(object)
        assert self.sum.tolist() == big.sum(axis=0, initial=0).tolist()
        words = self.squares.astype(object)
        assert (words[0] * 2**32 + words[1]).tolist() == (big * big).sum(axis=0, initial=0).tolist()
        assert (self.squares[1] < 2**32).all()

    def _check_rows(self, weights: np.ndarray, rows: np.ndarray) -> None:
        if rows.dtype.kind != "f":
            # wraps as the machine does; the constructor has refused what could
            wide = self.x.astype(np.uint64) @ weights.astype(np.uint64).T
            assert np.array_equal(rows.view(np.uint64), wide)
            return
        x, w = self.x.astype(np.float64), weights.astype(np.float64)
        # by frame and column, so that a pixel of weight 0 counts for nothing, whatever it is
        products = np.where(w[None] != 0, x[:, None] * w[None], 0.0)
        _close(rows, products.sum(axis=2), np.abs(products).sum(axis=2) * x.shape[1] * ULP)


def _close(found: np.ndarray, true: np.ndarray, bound: np.ndarray) -> None:
    same = (found == true) | (np.isnan(found) & np.isnan(true)) | (np.abs(found - true) <= bound)
    assert same.all(), (found[~same], true[~same], bound[~same])
