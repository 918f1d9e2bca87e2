"""The words that the service and the kernels share: records and file names; standard library only.

Everything that crosses hosts is one of these records, written as JSON by :mod:`mpi_kernels.jsonfile`.
Arrays follow one order everywhere: scan ``(y, x)`` before detector ``(y, x)``, C order, native byte order.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1
"""Version of every JSON file; a reader refuses a version that it does not know."""

ACQUISITION_ID = re.compile(r"[0-9a-f]{16}")
JOB_NAME = re.compile(r"(?P<acquisition>[0-9a-f]{16})-(?P<attempt>[0-9]{2})")

# Files of a run folder: runs/<day>/<acquisition>/<nn>/
JOB_FILE = "job.json"
CLAIM_FILE = "claim"
RESULT_H5 = "result.h5"
PARTIAL = "partial-{}"
"""Name, without suffix, of the n-th partial result (``.h5``, then ``.json``), n from 1."""
RESULT_FILE = "result.json"
PREVIEW_FILE = "preview.png"
ERROR_FILE = "error.json"
READY_FILE = re.compile(r"ready-([0-9]{1,9})\.json")
"""In the acquisition's folder, above the run folder."""
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


Device = Literal["cpu", "gpu"]
Kernel = Literal["auto", "numpy", "portable", "avx2", "avx512"]
Reading = Literal["auto", "mmap", "read", "direct", "source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How to compute, on which a result never depends; what was used in the end is in the result's manifest.

    Attributes
    ----------
    device : {"cpu", "gpu"}
        ``gpu`` falls back to the CPU where there is none, and the manifest says why.
    kernel : {"auto", "numpy", "portable", "avx2", "avx512"}
        ``auto``: the best that this processor and this installation have.
    reading : {"auto", "mmap", "read", "direct", "source"}
        ``auto``: by what is cached, and on which file system; ``direct`` goes past the page cache (O_DIRECT);
        ``source``: through the format's own ``frames``.
    threads : int
        Of each rank; 0: the cores that this process may use, divided by the ranks of its node.
    """

    device: Device = "cpu"
    kernel: Kernel = "auto"
    reading: Reading = "auto"
    threads: int = 0


AUTO = Method()
"""The best that can be had."""


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
    ``scheduler`` and ``planned_ns`` (wall time) are there for `emflow rebuild`; the kernels do not look at them.

    With ``growing`` the file is still being written: the kernels follow the ``ready-<n>.json`` in the folder above,
    publish partial results meanwhile, and give up when nothing new was ready for ``stall_s`` seconds.
    """

    job: str
    acquisition: str
    trace: str
    recipe: Recipe
    source: SourceSpec
    ranks: int = 1
    block_bytes: int = 4 << 20
    method: Method = AUTO
    growing: bool = False
    stall_s: float = 60.0
    attributes: dict[str, str] = field(default_factory=dict)
    program: str = ""
    scheduler: str = ""
    planned_ns: int = 0
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
    """``result.json``: the commit.  Only a job with this file has a result.  ``partial-<n>.json`` is the same record.

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
    method : dict
        How it was computed: ``device``, ``kernel``, ``reading``, ``threads``, and ``why`` where something that was
        asked for could not be had.
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
    method: dict[str, str | int] = field(default_factory=dict)
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
