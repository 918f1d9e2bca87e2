"""Equality of terms, so that a recipe computes each of them once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq, Term

Key = tuple[str, ...]


def key(term: Term) -> Key:
    """What makes two terms equal: kind and content of their arrays."""
    match term:
        case Masks(weights):
            return ("Masks", *_digest(weights))
        case Labels(labels, regions):
            return ("Labels", str(regions), *_digest(labels))
        case Moments(array) | SumSq(array):
            return (type(term).__name__, *(_digest(array) if array is not None else ()))
        case _:
            return (type(term).__name__,)


def unique(terms: Iterable[Term]) -> dict[Key, Term]:
    """Terms by key, each once, in order of first mention."""
    found: dict[Key, Term] = {}
    for term in terms:
        found.setdefault(key(term), term)
    return found


def check(name: str, terms: Mapping[str, Term], header: Header) -> None:
    """Raise `RecipeError` where a term's arrays do not fit the frames."""
    for label, term in terms.items():
        where = f"{name}: term {label!r}"
        match term:
            case Sum() | SumSq(None) | Max() | Moments(None):
                pass
            case SumSq(shift):
                assert shift is not None
                _shape(where, shift, header, leading=0)
                if shift.dtype != np.float64 or not np.isfinite(shift).all() or np.dtype(header.dtype).kind != "f":
                    raise RecipeError(f"{where}: a shift is finite float64 and for floats ({shift.dtype})")
            case Masks(weights):
                _shape(where, weights, header, leading=1)
                if weights.dtype.kind not in "biuf" or not np.isfinite(weights).all():
                    raise RecipeError(f"{where}: weights are not finite real numbers ({weights.dtype})")
            case Labels(labels, regions):
                _shape(where, labels, header, leading=0)
                if labels.dtype.kind not in "iu" or (labels.size and int(labels.max()) >= regions):
                    raise RecipeError(f"{where}: labels are not integers below {regions}")
            case Moments(mask):
                assert mask is not None
                _shape(where, mask, header, leading=0)
                if mask.dtype != np.bool_:
                    raise RecipeError(f"{where}: the mask of moments is {mask.dtype}, not bool")


def _shape(where: str, array: np.ndarray, header: Header, *, leading: int) -> None:
    if array.ndim != leading + 2 or array.shape[leading:] != header.det_shape:
        raise RecipeError(f"{where}: array of shape {array.shape} does not fit frames of {header.det_shape}")


def _digest(array: np.ndarray) -> tuple[str, str, str]:
    data = np.ascontiguousarray(array)
    return str(data.shape), data.dtype.str, hashlib.sha256(data.tobytes()).hexdigest()
