"""One read of the data: this rank's share in blocks, each block to every reduction, and the merge on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import KernelError
from mpi_kernels.fused import Fused, Quality
from mpi_kernels.plan import Plan, Step, oriented, output_shape
from mpi_kernels.protocols import Block, Output, Reduction, Source, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key, key

CHUNK_BYTES = 64 << 20
"""A block grows up to here to hold one whole chunk of the file, so that no chunk is decompressed twice."""

Progress = Callable[[int, int], None]
"""Called after each block with the frames of this rank that are done, and all of them."""


class Accumulators(Protocol):
    """What computes the terms of one rank: `Fused`, or the same on a graphics card."""

    quality: Quality

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add (n, det_y, det_x) oriented frames; the first one is row ``row`` of this rank's share."""

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Whole arrays by term on rank 0, rows of frames flat along their first axis; None elsewhere."""


@dataclass(slots=True)
class Reduced:
    """What rank 0 holds after the merge: arrays and scalars by reduction, and what the frames were like."""

    arrays: dict[str, dict[str, np.ndarray]]
    scalars: dict[str, dict[str, Scalar]]
    quality: Quality
    seconds: dict[str, float] = field(default_factory=dict)


def block_frames(frame_bytes: int, align: int, block_bytes: int) -> int:
    """Frames of a block: whole chunks of the file where they fit."""
    fit = max(1, block_bytes // frame_bytes)
    if fit >= align:
        return fit - fit % align
    return align if align * frame_bytes <= CHUNK_BYTES else fit


def reduce(
    plan: Plan,
    source: Source,
    ranks: Ranks,
    *,
    block_bytes: int = 4 << 20,
    progress: Progress | None = None,
    make: Callable[[Iterable[Term], Header, int], Accumulators] = Fused,
) -> Reduced | None:
    """Compute a plan; every rank calls it, rank 0 gets the result, the others None.

    ``make`` makes the accumulators from the terms, the oriented header and the number of frames of this rank.

    Raises
    ------
    KernelError
        What the source or a reduction raises.
    """
    share = ranks.share(plan.header.frames, source.align)
    fused = make((t for s in plan.steps for t in s.terms.values()), plan.header, share[1] - share[0])
    own = {s.spec.name: _accumulators(s, share[1] - share[0]) for s in plan.steps if not s.terms}
    seconds = _Visit(plan, fused, own).read(source, share, block_bytes, progress)
    before = time.perf_counter()
    merged = fused.merge(ranks)
    arrays = {s.spec.name: _merged(s, own[s.spec.name], ranks) for s in plan.steps if not s.terms}
    seconds["merge"] = time.perf_counter() - before
    reports = ranks.gather_json({"seconds": seconds, "quality": asdict(fused.quality)})
    if reports is None or merged is None:
        return None
    quality = Quality()
    for report in reports:
        quality.add(report["quality"])
    slowest = {k: max(r["seconds"][k] for r in reports) for k in seconds}
    found = Reduced({}, {}, quality, slowest)
    for step in plan.steps:
        name = step.spec.name
        parts = arrays[name] if not step.terms else {k: _shaped(merged, step, k, plan) for k in step.terms}
        found.arrays[name], found.scalars[name] = _end(step, parts, plan)
    slowest["end"] = time.perf_counter() - before - seconds["merge"]
    return found


@dataclass(frozen=True, slots=True)
class _Visit:
    """One rank's way through its share: the terms, and the accumulators of reductions that do without them."""

    plan: Plan
    fused: Accumulators
    own: Mapping[str, Mapping[str, np.ndarray]]

    def read(
        self, source: Source, share: tuple[int, int], block_bytes: int, progress: Progress | None
    ) -> dict[str, float]:
        """Fill the accumulators; return the seconds spent reading and reducing."""
        first, last = share
        shape, dtype = source.header.det_shape, np.dtype(source.header.dtype)
        size = block_frames(int(np.prod(shape)) * dtype.itemsize, source.align, block_bytes)
        buffer = np.empty((min(size, last - first), *shape), dtype)
        seconds = {"read": 0.0, "reduce": 0.0}
        for start in range(first, last, size):
            stop = min(start + size, last)
            begin = time.perf_counter()
            source.frames(start, stop, buffer[: stop - start])
            middle = time.perf_counter()
            self._block(buffer[: stop - start], start, start - first)
            seconds["read"] += middle - begin
            seconds["reduce"] += time.perf_counter() - middle
            if progress is not None:
                progress(stop - first, last - first)
        return seconds

    def _block(self, raw: np.ndarray, start: int, row: int) -> None:
        frames = oriented(raw.view(self.plan.header.dtype), self.plan.recipe.orientation)
        frames.flags.writeable = False
        self.fused.add(frames, row)
        rows = slice(row, row + len(frames))
        for step in self.plan.steps:
            if not step.terms:
                arrays = self.own[step.spec.name]
                out = {n: a[rows] if step.outputs[n].over == "scan" else a for n, a in arrays.items()}
                step.reduction.reduce(Block(frames, start), out)


def _accumulators(step: Step, rows: int) -> dict[str, np.ndarray]:
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


def _merged(step: Step, arrays: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
    """Outputs of a reduction of its own, merged between ranks; rows of frames flat along their first axis."""
    found = {}
    for name, array in arrays.items():
        output = step.outputs[name]
        whole = ranks.gather_rows(array) if output.over == "scan" else ranks.reduce(array, output.merge)
        if whole is not None:
            found[name] = whole
    return found


def _shaped(merged: Mapping[Key, np.ndarray], step: Step, name: str, plan: Plan) -> np.ndarray:
    term = step.terms[name]
    array = merged[key(term)]
    if type(term).__name__ in ("Masks", "Labels", "Moments"):
        array = array.reshape((*plan.header.scan_shape, *array.shape[1:]))
    array = array.view()
    array.flags.writeable = False  # other reductions share it
    return array


def _end(step: Step, parts: Mapping[str, np.ndarray], plan: Plan) -> tuple[dict[str, np.ndarray], dict[str, Scalar]]:
    """Finish one reduction, and hold it to what it declared."""
    if not step.terms:
        parts = {n: a.reshape(output_shape(step.outputs[n], plan.header)) for n, a in parts.items()}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # NaN in the data are NaN in the maps
        arrays, scalars = step.reduction.end(parts, plan.header)
    name = step.spec.name
    if set(arrays) != set(step.outputs):
        raise KernelError(f"{name}: declared {sorted(step.outputs)}, but end() returned {sorted(arrays)}")
    for n, output in step.outputs.items():
        want = output_shape(output, plan.header), np.dtype(output.dtype)
        if (arrays[n].shape, arrays[n].dtype) != want:
            raise KernelError(f"{name}/{n}: declared {want}, but end() returned {(arrays[n].shape, arrays[n].dtype)}")
    return dict(arrays), dict(scalars)
