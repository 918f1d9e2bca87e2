"""The words that the service and the kernels share: records, file names and protocols; standard library only.

Everything that crosses hosts is one of these records, written as JSON by :mod:`mpi_kernels.jsonfile`.
Arrays follow one order everywhere: scan ``(y, x)`` before detector ``(y, x)``, C order, native byte order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
"""Version of every JSON file; a reader refuses a version that it does not know."""

ACQUISITION_ID = re.compile(r"[0-9a-f]{16}")
JOB_NAME = re.compile(r"(?P<acquisition>[0-9a-f]{16})-(?P<attempt>[0-9]{2})")

# Files of a run folder: runs/<day>/<acquisition>/<nn>/
JOB_FILE = "job.json"
CLAIM_FILE = "claim"
RESULT_H5 = "result.h5"
RESULT_FILE = "result.json"
PREVIEW_FILE = "preview.png"
ERROR_FILE = "error.json"
HEARTBEAT_FILE = "heartbeat"

Kind = Literal["image", "stack", "4d"]
Quality = Literal["OK", "DOUBTFUL", "INVALID"]
Scalar = bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A calibrated axis: position of index ``i`` is ``offset + scale * i`` in ``unit``."""

    name: str
    scale: float = 1.0
    offset: float = 0.0
    unit: str = "px"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of an acquisition; staged as ``<acquisition id><suffix>``, so that no user's name travels."""

    path: str
    suffix: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a format knows from header bytes alone.

    Attributes
    ----------
    format : str
        Name of the format in the registry.
    kind : {"image", "stack", "4d"}
        One frame; a series of frames; a two-dimensional scan of frames.
    scan_shape : tuple of int
        ``()`` for an image, ``(n,)`` for a stack, ``(scan_y, scan_x)`` for 4d.
    det_shape : (int, int)
        ``(det_y, det_x)`` of one frame, in pixels.
    dtype : str
        Native-endian numpy name of the pixels that the source delivers, such as ``"uint16"``.
    members : tuple of Member
        Every file of the acquisition, the main one first.
    rule : {"exact", "stability"}
        ``exact``: the format itself says how many bytes belong to it and they are there.
        ``stability``: it cannot tell (preallocated or endless), so only a file that stays unchanged is complete.
    scan_axes, det_axes : tuple of Axis
        Calibrations, one per axis; empty where the file has none.
    unit : str
        Unit of the pixel values.
    metadata : dict
        Flat facts that are worth keeping with the result (voltage, camera, date).
    warnings : tuple of str
        What had to be guessed, in plain words.
    """

    format: str
    kind: Kind
    scan_shape: tuple[int, ...]
    det_shape: tuple[int, int]
    dtype: str
    members: tuple[Member, ...]
    rule: Literal["exact", "stability"]
    scan_axes: tuple[Axis, ...] = ()
    det_axes: tuple[Axis, ...] = ()
    unit: str = "counts"
    metadata: dict[str, Scalar] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        """Number of frames of the whole scan."""
        return math.prod(self.scan_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orientation:
    """How detector frames are turned before anything else: transpose first, then the flips.  Never applied silently."""

    transpose: bool = False
    flip_y: bool = False
    flip_x: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReductionSpec:
    """One line of a recipe: ``use`` is a registered name or ``module:attr``, ``name`` the group in the result."""

    use: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named list of reductions that are computed in one read of the data."""

    name: str
    reductions: tuple[ReductionSpec, ...]
    scan_shape: tuple[int, ...] | None = None
    orientation: Orientation = Orientation()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """Where a job reads: the main file, the format's plug-in as ``module:attr``, and the acquisition's digest."""

    path: str
    format: str
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """``job.json``: all that the kernels need to know; written once by the service before submission.

    ``attributes`` are names that people gave (share, relative path); they end up in the result and nowhere else.
    """

    job: str
    acquisition: str
    trace: str
    recipe: Recipe
    source: SourceSpec
    ranks: int = 1
    block_bytes: int = 4 << 20
    attributes: dict[str, str] = field(default_factory=dict)
    program: str = ""
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """``claim``: created with O_EXCL by rank 0 as its first act; who finds it there exits 0 without a result."""

    job: str
    host: str
    pid: int
    scheduler_id: str
    wall_ns: int
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultManifest:
    """``result.json``: the commit.  Only a job with this file has a result.

    Attributes
    ----------
    result, result_sha256 : str
        File name beside the manifest, and its digest.
    outputs : tuple of str
        Paths of the maps inside the result file, ``/<reduction>/<output>``.
    scalars : dict
        ``{reduction: {name: value}}``; a value that is not finite is ``None``.
    skipped : tuple of str
        Reductions of the recipe that do not apply to this kind of data.
    frames : int
        Frames that were reduced.
    coverage : float
        Share of the scan that they are, 0 to 1.
    seconds : dict
        Wall time by step (``read``, ``reduce``, ``merge``, ``write``, ``total``), the slowest rank's.
    """

    job: str
    acquisition: str
    trace: str
    recipe: str
    result: str
    result_sha256: str
    preview: str | None
    outputs: tuple[str, ...]
    scalars: dict[str, dict[str, Scalar]]
    skipped: tuple[str, ...]
    frames: int
    coverage: float
    partial: bool
    quality: Quality
    quality_reasons: tuple[str, ...]
    seconds: dict[str, float]
    ranks: int
    host: str
    source_digest: str | None
    wall_ns: int
    program: str
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """``error.json``: why this attempt has no result."""

    job: str
    code: str
    message: str
    path: str | None
    frame: int | None
    next_step: str
    retryable: bool
    rank: int
    host: str
    traceback: str
    wall_ns: int
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """``ready-<n>.json`` of an acquisition: how many frames may be read.  The newest ``n`` counts."""

    frames: int
    complete: bool
    digest: str | None
    v: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened; the same record in every plane, ordered by ``(host, pid, seq)``.

    ``subject`` is the id of an acquisition, a job or a command; ``mono_ns`` compares only within one host.
    """

    trace: str
    subject: str
    plane: Literal["data", "control", "management"]
    host: str
    pid: int
    seq: int
    name: str
    wall_ns: int
    mono_ns: int
    attrs: dict[str, Any] = field(default_factory=dict)
    v: int = SCHEMA


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
    """

    frames: np.ndarray
    start: int


class Source(Protocol):
    """An opened acquisition; one per rank."""

    header: Header
    align: int
    """Frames per chunk of the file: bounds on multiples of it read nothing twice."""

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""

    def complete(self) -> None:
        """Raise `MissingData` with the first frame that the file should hold and does not."""

    def close(self) -> None:
        """Give the file back."""


@runtime_checkable
class Format(Protocol):
    """A file format: ``suffixes`` is a cheap first choice, ``probe`` decides."""

    suffixes: ClassVar[tuple[str, ...]]

    def probe(self, path: str) -> Header:
        """Read header bytes only.  `Incomplete` = ask later, `NotThisFormat` = not mine, `FormatError` = never."""

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""


class Reduction:
    """What to compute, as terms that the engine fuses into one pass, or as numpy on each block.

    A subclass is a frozen dataclass whose fields are the recipe's parameters, and overrides ``terms`` (preferred)
    or ``reduce``.  MPI is derived from `Output` and the terms, never written.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"stack", "4d"})
    """Kinds of data that it applies to; for others the recipe skips it and says so."""

    def outputs(self, header: Header) -> Mapping[str, Output]:
        """Declare the arrays that ``end`` returns."""
        raise NotImplementedError

    def terms(self, header: Header) -> Mapping[str, Term]:  # noqa: ARG002
        """Name the terms that ``end`` needs; equal terms of a recipe are computed once."""
        return {}

    def reduce(self, block: Block, out: Mapping[str, np.ndarray]) -> None:
        """Add a block: ``out`` holds, per output, the block's own rows (scan) or this rank's accumulator (frame)."""
        raise NotImplementedError

    def end(
        self,
        arrays: Mapping[str, np.ndarray],
        header: Header,  # noqa: ARG002
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, Scalar]]:
        """Turn merged terms (or outputs) into the declared outputs and scalars; runs on rank 0 only."""
        return arrays, {}


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Sum of all frames: (det_y, det_x), int64 or uint64 for integers, else float64."""


@dataclass(frozen=True, slots=True, eq=False)
class SumSq:
    """Sum of squares of all frames: exact ``(2, det_y, det_x)`` uint64 ``[high, low]`` words of 32 bits for integers
    (value = high * 2**32 + low), else (det_y, det_x) float64."""  # noqa: D205, D209


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
