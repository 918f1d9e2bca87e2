"""NanoMEGAS TopSpin's .app5: an HDF5 file with a dataset for each frame."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats.access import check_caps, member
from mpi_kernels.formats.hdf5_checks import checked
from mpi_kernels.formats.hdf5_open import opened, text_of
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

Position = tuple[float, float]
"""(y, x) in metres."""

MAX_FRAMES = 1 << 22
SERIES_DEPTH, MAX_GROUPS = 3, 1000
TEXT_BYTES = 1 << 16
OFF_GRID = 0.05
"""Part of a step by which a beam position may lie off the grid of the scan."""

_WAIT = "wait for the writer, or export it again from TopSpin"
_NUMBER = r"\s*<Offset[^>]*>([^<]{1,40})</Offset>\s*<Scale[^>]*>([^<]{1,40})</Scale>.{0,400}?<Text[^>]*>([^<]{1,40})<"
_POSITION = re.compile(r"RequestedBeamPosition<.{0,200}?<X[^>]*>([^<]{1,40})<.{0,80}?<Y[^>]*>([^<]{1,40})<", re.DOTALL)


class Topspin:
    """TopSpin's .app5.

    Layout: a group (named by a GUID, at the top or inside a procedure's group) with a group ``0``, ``1``, ... for each
    frame, of which ``Data`` is the frame and ``Metadata`` XML.  The names are numbers and sorted as such.  Each dataset
    is contiguous, so frames are read by offset.
    Source: real files of four versions; their order compared with the beam positions in them.

    Complete when the numbers have no gap and every ``Data`` was written.  How many there should be is not said in a way
    that is documented, so the rule is stability.

    The scan is what the requested beam positions of the frames say: if they are a grid, rows of equal steps, it is 4d
    with these steps; else a stack.  The detector's scale is that of the first frame's calibration.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".app5",)

    def probe(self, path: str) -> Header:
        """Read the names of the frames, the first and the last frame, and the beam positions that tell the scan."""
        with opened(path) as file:
            return _header(_series(file, path), path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises, and `Incomplete` for a frame that is not there."""
        with opened(path) as file:
            series = _series(file, path)
            header, stored = _header(series, path)
            offsets = np.array([_place(series, i, header, stored, path) for i in range(header.frames)], np.int64)
        payload = stored.itemsize * header.det_shape[0] * header.det_shape[1]
        return LayoutSource(header, Layout(files=(path,), dtype=stored.str, payload=payload, offsets=offsets))


def _series(file: Any, path: str) -> Any:
    """The group with the most frames, at most `SERIES_DEPTH` groups deep; hard links only are followed."""
    import h5py

    found: list[tuple[int, int, Any]] = []
    todo, looked = [(0, file["/"])], 0
    while todo and looked < MAX_GROUPS:
        depth, group = todo.pop(0)
        looked += 1
        names = [n for n in group if isinstance(group.get(n, getlink=True), h5py.HardLink)]
        if "0" in names and isinstance(group["0"], h5py.Group) and "Data" in group["0"]:
            found.append((sum(n.isdecimal() for n in names), -len(found), group))
        elif depth < SERIES_DEPTH:
            inner = (group[n] for n in names[:MAX_GROUPS])
            todo += [(depth + 1, g) for g in inner if isinstance(g, h5py.Group)][: MAX_GROUPS - len(todo)]
    if not found:
        raise NotThisFormat("not TopSpin's: no group holds a dataset for each frame", path=path)
    return max(found)[2]


def _header(series: Any, path: str) -> tuple[Header, np.dtype]:
    numbers = sorted(int(n) for n in series if n.isascii() and n.isdecimal() and len(n) < 9)
    frames = len(numbers)
    gap = next((i for i, n in enumerate(numbers) if n != i), None)
    if gap is not None:
        raise Incomplete(f"frame {gap} is not there, frame {numbers[gap]} is", path=path, frame=gap, next_step=_WAIT)
    if frames > MAX_FRAMES:
        raise FormatError(f"it holds {frames} frames, more than any scan has", path=path, next_step="export a part")
    first = _member(series, 0, "Data", path)
    stored = checked(first, first.name, path)
    if first.ndim != 2:
        raise FormatError(f"its frames have {first.ndim} axes", path=path, next_step="export it again from TopSpin")
    det_shape = (int(first.shape[0]), int(first.shape[1]))
    check_caps(path, frames, stored.itemsize * math.prod(det_shape))
    scan_shape, step_nm = _scan(lambda i: _position(series, i), frames)
    scan_axes, det_axes = _axes(_text(series, 0), scan_shape, step_nm)
    header = Header(
        format="topspin",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(stored).name,
        members=(member(path, ".app5"),),
        rule="stability",
        scan_axes=scan_axes,
        det_axes=det_axes,
        metadata={"layout": "TopSpin", "dataset": str(series.name)},
    )
    _place(series, frames - 1, header, stored, path)
    return header, stored


def _member(series: Any, frame: int, name: str, path: str) -> Any:
    """A dataset of a frame's group, by hard links alone."""
    import h5py

    place = f"{frame}/{name}"
    hard = all(isinstance(series.get(p, getlink=True), h5py.HardLink) for p in (str(frame), place) if p in series)
    found = series[place] if place in series and hard else None
    if not isinstance(found, h5py.Dataset):
        raise Incomplete(f"{place} is no dataset yet", path=path, frame=frame, next_step=_WAIT)
    return found


def _place(series: Any, frame: int, header: Header, stored: np.dtype, path: str) -> int:
    """The byte at which a frame begins; through h5py's low level, since a scan has 65,536 of them."""
    import h5py

    name, space, offset = str(frame).encode("ascii"), None, None
    if series.id.links.get_info(name).type == h5py.h5l.TYPE_HARD:
        group = h5py.h5g.open(series.id, name)
        if group.links.exists(b"Data") and group.links.get_info(b"Data").type == h5py.h5l.TYPE_HARD:
            space = h5py.h5d.open(group, b"Data")
    if space is None:
        raise Incomplete(f"{frame}/Data is no dataset yet", path=path, frame=frame, next_step=_WAIT)
    if space.shape != header.det_shape or space.dtype != stored:
        raise FormatError(
            f"frame {frame} is {space.shape} of {space.dtype}, the first {header.det_shape} of {stored}",
            path=path,
            frame=frame,
            next_step="export one series per file",
        )
    plist = space.get_create_plist()
    if plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0:
        if space.get_storage_size() >= stored.itemsize * math.prod(header.det_shape):
            offset = space.get_offset()
        if offset is None:
            raise Incomplete(f"frame {frame} was never written", path=path, frame=frame, next_step=_WAIT)
    if offset is None:
        raise FormatError(
            f"frame {frame} is not stored as plain numbers in this file",
            path=path,
            frame=frame,
            next_step="unpack it: h5repack -f NONE -l CONTI",
        )
    return int(offset)


def _text(series: Any, frame: int) -> str:
    """A frame's XML; empty if there is none, or more of it than any frame has."""
    import h5py

    place = f"{frame}/Metadata"
    if place not in series or not isinstance(series.get(place, getlink=True), h5py.HardLink):
        return ""
    dataset = series[place]
    small = isinstance(dataset, h5py.Dataset) and dataset.shape == () and dataset.dtype.itemsize <= TEXT_BYTES
    return text_of(dataset[()])[:TEXT_BYTES] if small else ""


def _position(series: Any, frame: int) -> Position | None:
    found = _POSITION.search(_text(series, frame))
    x, y = (_number(found[1]), _number(found[2])) if found else (math.nan, math.nan)
    return (y, x) if math.isfinite(x) and math.isfinite(y) else None


def _scan(
    position: Callable[[int], Position | None], frames: int
) -> tuple[tuple[int, ...], tuple[float, float] | None]:
    """Scan shape and steps (y, x) in nm from beam positions; a stack where these are no grid.

    The first row ends where the step from frame to frame changes.  Then every row must begin where a constant step
    from row to row leads, and the last frame must lie in the last corner.
    """
    stack = (frames,), None
    places = [position(0), position(1) if frames > 1 else None]
    if None in places:
        return stack
    (y0, x0), (y1, x1) = places[0] or (0.0, 0.0), places[1] or (0.0, 0.0)
    dy, dx = y1 - y0, x1 - x0
    step = math.hypot(dy, dx)
    if not step > 0:
        return stack

    def lies(frame: int, y: float, x: float, size: float) -> bool:
        found = position(frame)
        return found is not None and math.hypot(found[0] - y, found[1] - x) <= OFF_GRID * size

    width = 2
    while width < frames and lies(width, y0 + width * dy, x0 + width * dx, step):
        width += 1
    if width == frames or frames % width:
        return stack
    second = position(width) or (math.nan, math.nan)
    ey, ex = second[0] - y0, second[1] - x0
    row = math.hypot(ey, ex)
    if not row > 0 or abs(ex * dy - ey * dx) < OFF_GRID * row * step:  # rows must not lie on one line
        return stack
    for number in range(1, frames // width):
        y, x = y0 + number * ey, x0 + number * ex
        last = number * width + width - 1
        along = width - 1
        if not (lies(number * width, y, x, row) and lies(last, y + along * dy, x + along * dx, min(row, step))):
            return stack
    return (frames // width, width), (row * 1e9, step * 1e9)


def _axes(
    text: str, scan_shape: Sequence[int], step_nm: tuple[float, float] | None
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Axes from the steps, and from the first frame's calibration (angles in rad)."""
    scan = [(s, 0.0, "nm") for s in step_nm] if step_nm else [(1.0, 0.0, "px")] * len(scan_shape)
    detector = []
    for name in "YX":
        found = re.search(rf"<{name} [^>]*>{_NUMBER}", text, re.DOTALL)
        offset, scale = (_number(found[1]), _number(found[2])) if found else (math.nan, math.nan)
        detector.append((scale, offset, "rad" if found and found[3] == "Angle" else ""))
    usable = all(math.isfinite(s) and math.isfinite(o) and s and u for s, o, u in detector)
    made = axes(tuple(scan_shape), [*scan, *(detector if usable else [(1.0, 0.0, "px")] * 2)])
    return made[0] if step_nm else (), made[1] if usable else ()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
