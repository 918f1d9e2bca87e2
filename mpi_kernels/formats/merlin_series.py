"""Merlin acquisitions in several files, and rows with a frame of the flyback at their end."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import check_caps, check_table, sibling, size_of
from mpi_kernels.formats.parts import numbered
from mpi_kernels.layout import Layout

_RULE = re.compile(r"(?P<stem>.*?)(?P<number>\d{1,9})(?P<end>\.mib)", re.IGNORECASE | re.DOTALL)


def parts(path: str) -> tuple[tuple[str, ...], str | None]:
    """The files of an acquisition in order, and its .hdr.

    A file with an .hdr of its own stem is alone.  ``<stem><number>.mib`` without one belongs to ``<stem>.hdr`` (also
    where the stem ends with a separator) together with its neighbours of the same stem, unless a ``<stem>.mib`` owns
    that .hdr.  A ``<stem>RAW.mib`` is never taken for a part.
    """
    own = sibling(path, ".hdr")
    found = _RULE.fullmatch(os.path.basename(path))  # noqa: PTH119
    if own is not None or found is None:
        return (path,), own
    folder = os.path.dirname(path)  # noqa: PTH120
    for stem in dict.fromkeys((found["stem"], found["stem"].rstrip("_- "))):
        owner = os.path.join(folder, f"{stem}{found['end']}")  # noqa: PTH118
        hdr = sibling(owner, ".hdr") if stem else None
        if hdr is not None and not os.path.isfile(owner):  # noqa: PTH113
            return numbered(path, _RULE), hdr
    return (path,), None


def suffix(part: str, every: Sequence[str]) -> str:
    """What of a part's name must stay when it is copied: that it is a part, and which."""
    return ".mib" if len(every) == 1 else f"_{every.index(part):06d}.mib"


def joined(layout: Layout, files: Sequence[str], announced: int) -> tuple[Layout, int]:
    """The layout of a first part over all parts, and their frames; each part must end with a whole frame.

    Raises
    ------
    Incomplete
        Frames are missing; names the first.
    FormatError
        More frames than were announced.
    """
    counts: list[int] = []
    for file in files:
        whole, rest = divmod(size_of(file), layout.record)
        counts.append(whole)
        if rest:
            raise Incomplete("it ends within a frame", path=file, frame=sum(counts), next_step="wait for the writer")
    frames = sum(counts)
    if frames < announced:
        told = f"{frames} of {announced} frames are there"
        raise Incomplete(told, path=files[-1], frame=frames, next_step="wait for the writer, or copy the files again")
    if announced and frames > announced:
        told = f"its {len(files)} files hold {frames} frames, {announced} were announced"
        raise FormatError(told, path=files[0], next_step="check that all files belong to one acquisition")
    check_caps(files[0], frames, layout.record)
    check_table(files[0], frames)
    offsets = np.concatenate([layout.record * np.arange(n, dtype=np.int64) for n in counts])
    file_of = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    return replace(layout, files=tuple(files), offsets=offsets, file_of=file_of), frames


@dataclass(frozen=True, slots=True)
class WithoutFlyback:
    """A scan whose rows had one frame more than the scan has columns."""

    layout: Layout
    scan_shape: tuple[int, int]
    warning: str


def without_flyback(layout: Layout, scan_shape: tuple[int, int], frames: int) -> WithoutFlyback | None:
    """The layout without the last frame of each row, if the file has exactly one more in each; else None.

    Source: fpd's ``MerlinBinary``, whose ``row_end_skip`` is 1 for the scan engine's flyback.
    """
    rows, columns = scan_shape
    if not (rows and columns and rows * (columns + 1) == frames) or frames == rows * columns:
        return None
    check_table(layout.files[0], frames)
    kept = (np.arange(rows, dtype=np.int64)[:, None] * (columns + 1) + np.arange(columns)).ravel()
    offsets = kept * layout.record if layout.offsets is None else layout.offsets[kept]
    file_of = None if layout.file_of is None else layout.file_of[kept]
    # the numbers of several files are not checked: which were left out can't be told from offsets alone
    number = layout.numbered if file_of is None else None
    warning = f"{columns + 1} frames in each of {rows} rows: the last of each is the flyback's and is left out"
    return WithoutFlyback(replace(layout, offsets=offsets, file_of=file_of, numbered=number), scan_shape, warning)
