"""From the ranks' parts to whole arrays on rank 0, and from those to what the reductions deliver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import KernelError
from mpi_kernels.plan import Plan, Step, output_shape
from mpi_kernels.protocols import Max, Output, Reduction, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key

Range = tuple[int, int]
"""Frames ``start:stop`` of the scan."""


def joined(ranges: Sequence[Range]) -> list[Range]:
    """Ranges in the same order, those that follow one another as one."""
    found: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def places(ranks: Ranks, ranges: Sequence[Range]) -> list[Range] | None:
    """Which frames the rows of all ranks are, in rank order, on rank 0; None elsewhere."""
    told = ranks.gather_json([list(r) for r in joined(ranges)])
    return None if told is None else joined([(int(a), int(b)) for ranges in told for a, b in ranges])


def gather(ranks: Ranks, rows: np.ndarray, where: Sequence[Range] | None, frames: int) -> np.ndarray | None:
    """Rows of all ranks in scan order, (frames, ...), on rank 0; zeros for frames that nobody has seen."""
    found = ranks.gather_rows(rows)
    if found is None or where is None or where == [(0, frames)]:
        return found
    whole = np.zeros((frames, *found.shape[1:]), found.dtype)
    at = 0
    for start, stop in where:
        whole[start:stop] = found[at : at + stop - start]
        at += stop - start
    return whole


def over_frames(
    ranks: Ranks,
    terms: Mapping[Key, Term],
    array: Callable[[Key], np.ndarray | None],
    *,
    pairs: bool = False,
) -> dict[Key, np.ndarray] | None:
    """Arrays of the terms that have one value for each pixel, of all ranks, on rank 0; None elsewhere.

    Parameters
    ----------
    ranks : Ranks
    terms : mapping of Key to Term
        The others are left out.
    array : callable
        This rank's array of a term; squares of integers are [high, low] words of 32 bits.
    pairs : bool
        Sums of floats are [high, low] pairs as well, and their low parts count.
    """
    found: dict[Key, np.ndarray | None] = {}
    for key, term in terms.items():
        if not isinstance(term, Sum | SumSq | Max):
            continue
        mine = array(key)
        assert mine is not None
        floats = mine.dtype.kind == "f"
        if isinstance(term, Max):
            found[key] = ranks.reduce(mine, "max")
        elif floats and pairs:
            found[key] = _rounded(ranks.reduce_pairs(mine))
        else:
            whole = ranks.reduce(mine, "sum")
            found[key] = whole if floats or isinstance(term, Sum) else _carried(whole)
    return None if ranks.rank else {k: a for k, a in found.items() if a is not None}


def _carried(words: np.ndarray | None) -> np.ndarray | None:
    """``[high, low]`` words of 32 bits whose low ones were summed: what stands above 32 bits goes up, in place."""
    if words is not None:
        words[0] += words[1] >> np.uint64(32)
        words[1] &= np.uint64(0xFFFFFFFF)
    return words


def _rounded(pairs: np.ndarray | None) -> np.ndarray | None:
    """Float64 numbers from [high, low] pairs; what is not finite has no low part."""
    if pairs is None:
        return None
    with np.errstate(invalid="ignore"):
        rounded: np.ndarray = np.where(np.isfinite(pairs[0]), pairs[0] + pairs[1], pairs[0])
    return rounded


def covered(where: Sequence[Range], frames: int) -> np.ndarray:
    """Which frames were seen, (frames,) bool."""
    mask = np.zeros(frames, np.bool_)
    for start, stop in where:
        mask[start:stop] = True
    return mask


def accumulators(step: Step, rows: int) -> dict[str, np.ndarray]:
    """What a reduction without terms fills: rows for maps over the scan, one array for those over the frame."""
    if type(step.reduction).reduce is Reduction.reduce:
        raise KernelError(f"{step.spec.use}: a reduction needs terms or a reduce method")
    return {
        name: np.zeros((rows, *o.shape), o.dtype) if o.over == "scan" else np.full(o.shape, _identity(o), o.dtype)
        for name, o in step.outputs.items()
    }


def _identity(output: Output) -> int | float:
    """The value that a merge starts from."""
    dtype = np.dtype(output.dtype)
    if output.merge == "sum":
        return 0
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return int(limits.min if output.merge == "max" else limits.max)
    return -np.inf if output.merge == "max" else np.inf


def read_only(array: np.ndarray) -> np.ndarray:
    """The same array, not to be written: other reductions share it."""
    array = array.view()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part(Header):
    """The header of a scan of which not all frames were measured: a mean is over those that were."""

    measured: int

    @property
    def frames(self) -> int:
        """Number of frames that were measured."""
        return self.measured


def measured(header: Header, frames: int) -> Header:
    """The header as `end` gets it, of which so many frames were measured."""
    if frames == header.frames:
        return header
    return _Part(**{f.name: getattr(header, f.name) for f in fields(Header)}, measured=frames)


def end(
    step: Step, parts: Mapping[str, np.ndarray], plan: Plan, frames: int
) -> tuple[dict[str, np.ndarray], dict[str, Scalar]]:
    """Finish one reduction of so many frames, and hold it to what it declared."""
    if not step.terms:
        parts = {n: a.reshape(output_shape(step.outputs[n], plan.header)) for n, a in parts.items()}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # NaN in the data are NaN in the maps
        arrays, scalars = step.reduction.end(parts, measured(plan.header, frames))
    name = step.spec.name
    if set(arrays) != set(step.outputs):
        raise KernelError(f"{name}: declared {sorted(step.outputs)}, but end() returned {sorted(arrays)}")
    for n, output in step.outputs.items():
        want = output_shape(output, plan.header), np.dtype(output.dtype)
        if (arrays[n].shape, arrays[n].dtype) != want:
            raise KernelError(f"{name}/{n}: declared {want}, but end() returned {(arrays[n].shape, arrays[n].dtype)}")
    return dict(arrays), dict(scalars)
