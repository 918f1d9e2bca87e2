"""The protocols of the compute side: what a file format and a reduction have to do; standard library only.

Arrays follow one order everywhere: scan ``(y, x)`` before detector ``(y, x)``, C order, native byte order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from mpi_kernels.contract import Axis, Header, Kind, Scalar

if TYPE_CHECKING:
    import numpy as np

    from mpi_kernels.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Declares one array that a reduction delivers from ``end``.

    Attributes
    ----------
    over : {"scan", "frame"}
        ``scan``: one entry per frame, so the array has shape ``scan_shape + shape``.
        ``frame``: one array for all frames, of shape ``shape``, merged between blocks and ranks by ``merge``.
    shape : tuple of int
        Shape of one entry (``scan``) or of the whole array (``frame``).
    axes : tuple of Axis
        Calibration of ``shape``; empty means the detector's axes where ``shape`` is the frame's, else the index.
    """

    over: Literal["scan", "frame"]
    shape: tuple[int, ...] = ()
    dtype: str = "float64"
    unit: str = ""
    long_name: str = ""
    axes: tuple[Axis, ...] = ()
    merge: Literal["sum", "max", "min"] = "sum"


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive frames in one buffer.

    Attributes
    ----------
    frames : (n, det_y, det_x) ndarray
        Oriented, in the header's dtype.  Read-only: the buffer is shared by all reductions of the recipe.
    start : int
        Index of the first frame in scan order.
    header : Header
        Oriented, as the other methods get it: the scan's shape turns an index into a position.
    """

    frames: np.ndarray
    start: int
    header: Header


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Pixels that were hit in consecutive frames: any number in each, which no `Output` has a shape for.

    Attributes
    ----------
    start : int
        Index of the first frame in scan order.
    counts : (n,) ndarray of int64
        Events of each frame.
    pixels : (sum of counts,) ndarray of uint32
        Index ``y * det_x + x`` of each event in its frame; frame by frame, ascending within a frame.
    """

    start: int
    counts: np.ndarray
    pixels: np.ndarray


class Source(Protocol):
    """An opened acquisition; one per rank."""

    header: Header
    align: int
    """Frames per chunk of the file: bounds on multiples of it read nothing twice."""

    @property
    def layout(self) -> Layout | None:
        """Where the frames lie, if they can be read without this source: threads and ranks then read for themselves."""

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""

    def complete(self) -> None:
        """Raise `MissingData` with the first frame that the file should hold and does not."""

    def close(self) -> None:
        """Give the file back."""


@runtime_checkable
class Format(Protocol):
    """A file format: ``suffixes`` is a cheap first choice, ``probe`` decides.

    A format whose acquisitions may be folders says so with ``folders = True``; the others are never asked about one.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def probe(self, path: str) -> Header:
        """Read header bytes only.  `Incomplete` = ask later, `NotThisFormat` = not mine, `FormatError` = never."""

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""


@runtime_checkable
class GrowingFormat(Protocol):
    """A format whose files grow by whole frames and say at the start how many there will be."""

    def probe_growing(self, path: str) -> Header:
        """Read header bytes only, of a file that is still being written."""

    def open_growing(self, path: str) -> Source:
        """Open it; frames that are not there yet are `MissingData`."""


class Reduction:
    """What to compute, as terms that the engine fuses into one pass, or as numpy on each block.

    A subclass is a frozen dataclass whose fields are the recipe's parameters, and overrides ``terms`` (preferred)
    or ``reduce``.  MPI is derived from `Output` and the terms, never written.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"stack", "4d"})
    """Kinds of data that it applies to; for others the recipe skips it and says so."""
    sparse: ClassVar[bool] = False
    """Whether ``reduce`` returns the block's `Events`, which are gathered and stored beside the outputs."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Declare the arrays that ``end`` returns."""
        raise NotImplementedError

    def terms(self, header: Header) -> Mapping[str, Term]:  # noqa: ARG002
        """Name the terms that ``end`` needs; equal terms of a recipe are computed once."""
        return {}

    def samples(self, header: Header) -> int:  # noqa: ARG002
        """How many frames, the first ones of the scan, it wants to see before the pass; 0 for most."""
        return 0

    def settled(self, frames: np.ndarray, header: Header) -> Reduction:  # noqa: ARG002
        """The reduction with what it took from those frames, (n, det_y, det_x) oriented; the same on every rank."""
        return self

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> Events | None:
        """Add a block: ``out`` holds, per output, the block's own rows (scan) or this rank's accumulator (frame)."""
        raise NotImplementedError

    def end(
        self,
        arrays: Mapping[str, np.ndarray],
        header: Header,  # noqa: ARG002
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Turn merged terms (or outputs) into the declared outputs and scalars; runs on rank 0 only.

        In a partial result ``header.frames`` counts the frames that were measured; the scan's shape stays.
        """
        return arrays, {}


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Sum of all frames: (det_y, det_x), int64 or uint64 for integers, else float64."""


@dataclass(frozen=True, slots=True, eq=False)
class SumSq:
    """Sum of squares of all frames: exact ``(2, det_y, det_x)`` uint64 ``[high, low]`` words of 32 bits for integers
    (value = high * 2**32 + low), else (det_y, det_x) float64."""  # noqa: D205, D209

    shift: np.ndarray | None = None
    """(det_y, det_x) float64, finite: floats are squared less this, so that a pedestal does not cost their digits."""


@dataclass(frozen=True, slots=True, eq=False)
class Max:
    """Largest value of each pixel: (det_y, det_x) in the data's dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Weighted sums of each frame: scan + (k,), exact 64-bit integers where weights and data are, else float64."""

    weights: np.ndarray
    """(k, det_y, det_x) bool, integer or float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Sum of each frame over disjoint regions: scan + (regions,)."""

    labels: np.ndarray
    """(det_y, det_x) int32; region of each pixel, -1 for none."""
    regions: int


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Total and first moments of each frame: scan + (3,) as ``[sum I, sum y I, sum x I]``, exact for integers."""

    mask: np.ndarray | None = None
    """(det_y, det_x) bool, pixels that count; None for all."""


Term = Sum | SumSq | Max | Masks | Labels | Moments
