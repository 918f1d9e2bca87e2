"""Gatan K2 in-situ raw recordings: a .gtg with tags, and eight .bin files with a strip of every frame each."""

from __future__ import annotations

import os
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat, printable
from mpi_kernels.formats import dm_tags
from mpi_kernels.formats.access import check_caps, member, read_exactly, size_of
from mpi_kernels.formats.dm_tags import Tree
from mpi_kernels.formats.k2is_blocks import HEIGHT, SECTORS, WIDTH, Sectors
from mpi_kernels.formats.pixels import kind_of
from mpi_kernels.formats.plan import check_request
from mpi_kernels.protocols import Source

UNCHECKED = "no real K2 in-situ recording was compared yet"
NO_FRAME_BEFORE = "the shutter's flag is set from the first frame on: it is taken for the first position of the scan"

LIVE = "1792 x 1920"
"""Rows and columns that see electrons, from the first ones on.  Source: py4DSTEM ``read_K2.py``."""

_SCAN = ("SI Dimensions/Size Y", "SI Dimensions/Size X")
_WITHOUT_FLYBACK = "SI Image Tags/SI/Acquisition/Spatial Sampling/"


class K2is:
    """K2 in-situ: ``<stem>_.gtg`` with ``<stem>_1.bin`` to ``<stem>_8.bin``.

    Layout: the .gtg holds DigitalMicrograph's tags and no image; `k2is_blocks` has that of the others.  Frames are
    1860 x 2048 pixels of 12 bits, delivered as uint16.  The detector sees 1792 x 1920 of them; the rows below and the
    columns to the right hold the noise of reading, which is not subtracted.

    The files begin at different blocks and with frames of before the exposure.  Frame 0 is the first one that is
    whole in all files and has the shutter's flag; where the tags tell a scan (``SI Dimensions``) it is the one before
    that, since the STEM unit sets the flag one frame late.  Source: LiberTEM ``io/dataset/k2is.py``, for this and for
    the scan's tags (read, not copied); py4DSTEM's reader begins with the flag.

    Complete when every file holds the scan's frames; what was recorded after them is left alone.  Without a scan in
    the tags the frames are a stack, as many as all files have.  Stability.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".gtg",)

    def probe(self, path: str) -> Header:
        """Read the tags, and headers of the first blocks of each file."""
        header, sectors, _ = _open(path)
        sectors.close()
        return header

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return K2isSource(*_open(path))


def _open(path: str) -> tuple[Header, Sectors, int]:
    """The header, the files, and the frame of these with which the scan begins."""
    if not path.lower().endswith(".gtg"):
        raise NotThisFormat("K2 in-situ recordings are named by their .gtg", path=path)
    size_of(path)
    if read_exactly(path, 0, 4, "its header")[:3] != b"\0\0\0":
        raise NotThisFormat("not a K2 in-situ recording: no tags of version 3 or 4", path=path)
    tree = dm_tags.read(path)
    files = _files(path)
    for file in files:
        size_of(file)
    sectors = Sectors(files)
    try:
        return _described(path, tree, sectors)
    except BaseException:
        sectors.close()
        raise


def _files(path: str) -> tuple[str, ...]:
    stem = path[: -len(".gtg")]
    found = [next((f for f in (f"{stem}{n}.bin", f"{stem}{n}.BIN") if os.path.isfile(f)), None)  # noqa: PTH113
             for n in range(1, SECTORS + 1)]  # fmt: skip
    files = tuple(f for f in found if f is not None)
    if len(files) < SECTORS:
        name = printable(os.path.basename(f"{stem}{found.index(None) + 1}.bin"))  # noqa: PTH119
        raise Incomplete(
            f"{name} is not there: a recording has {SECTORS} sector files", path=path, next_step="wait for it"
        )
    return files


def _described(path: str, tree: Tree, sectors: Sectors) -> tuple[Header, Sectors, int]:
    first = sectors.exposed()
    if first is None:
        raise Incomplete(
            f"in none of its {sectors.frames} frames the shutter was open", path=path, next_step="wait for the exposure"
        )
    scan_shape, warnings = _scan(path, tree), [UNCHECKED]
    if scan_shape:
        warnings += [] if first else [NO_FRAME_BEFORE]
        first = max(0, first - 1)
    else:
        scan_shape = (sectors.frames - first,)
    frames = int(np.prod(scan_shape, dtype=object))
    check_caps(path, frames, 2 * HEIGHT * SECTORS * WIDTH)
    if first + frames > sectors.frames:
        there = sectors.frames - first
        raise Incomplete(
            f"{there} of {frames} frames are there", path=path, frame=there, next_step="wait for the writer"
        )
    header = Header(
        format="k2is",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=(HEIGHT, SECTORS * WIDTH),
        dtype="uint16",
        members=(member(path, "_.gtg"), *(member(f, f"_{n}.bin") for n, f in enumerate(sectors.paths, 1))),
        rule="stability",
        metadata=_facts(tree, sectors, first),
        warnings=tuple(warnings),
    )
    return header, sectors, first


def _scan(path: str, tree: Tree) -> tuple[int, ...]:
    sizes = [tree.values.get(name) for name in _SCAN]
    if sizes == [None, None]:
        return ()
    if not all(isinstance(n, int | float) and 0 < n < 1 << 20 and n == int(n) for n in sizes):
        raise FormatError(
            f"its tags tell a scan of {sizes[0]!r:.40} x {sizes[1]!r:.40} positions",
            path=path,
            next_step="copy it again",
        )
    return tuple(int(n) for n in sizes if n is not None)


def _facts(tree: Tree, sectors: Sectors, first: int) -> dict[str, Scalar]:
    facts: dict[str, Scalar] = {"first_frame_number": sectors.number + first, "recorded_frames": sectors.frames}
    facts["live_area"] = LIVE
    inner = [tree.values.get(f"{_WITHOUT_FLYBACK}{side} (pixels)") for side in ("Height", "Width")]
    if all(isinstance(n, int | float) for n in inner):
        facts["scan_without_flyback"] = f"{inner[0]:g} x {inner[1]:g}"
    return facts


class K2isSource:
    """Frames of one recording.

    Parameters
    ----------
    header : Header
        What the format found.
    sectors : Sectors
        The open files; closed with the source.
    first : int
        The scan's first frame among theirs.
    """

    align = 1
    layout = None

    def __init__(self, header: Header, sectors: Sectors, first: int) -> None:
        self.header = header
        self._sectors, self._first = sectors, first

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, 1860, 2048) uint16; `MissingData` names the frame that is not there."""
        check_request(self.header, start, stop, out)
        for i in range(start, stop):
            self._sectors.read(self._first + i, out[i - start], i)

    def complete(self) -> None:
        """Raise `MissingData` with the first frame that the files should hold and do not."""
        self._sectors.check(self._first, self.header.frames)

    def close(self) -> None:
        """Give the files back; more than once does no harm."""
        self._sectors.close()
