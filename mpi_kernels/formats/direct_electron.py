"""What a Direct Electron camera writes beside a movie: settings as ``_info.txt``, scan positions as ``.csv``.

Source: rosettasciio's ``mrc`` reader (read, not copied) and real files of DE-MC.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

import numpy as np

from mpi_kernels.contract import Axis, Member, Scalar
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import member, read_at, read_sidecar, size_of
from mpi_kernels.formats.pixels import axes

MOVIE, INFO, POSITIONS = "_movie.mrc", "_info.txt", "_scan_coordinates.csv"
POSITIONS_LIMIT = 64 << 20
_ROW = re.compile(rb"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")
_FACTS = {
    "Instrument Accelerating Voltage (V)": "high_tension_v",
    "Camera Model": "camera",
    "Frames Per Second": "frames_per_second",
    "Scan - Rotation": "scan_rotation_deg",
    "Timestamp (seconds since Epoch)": "timestamp_s",
    "Image Processing - Mode": "mode",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What the files beside a movie say of it."""

    scan_shape: tuple[int, ...]
    members: tuple[Member, ...]
    scan_axes: tuple[Axis, ...]
    det_axes: tuple[Axis, ...]
    metadata: dict[str, Scalar]
    warnings: tuple[str, ...]


def is_movie(path: str) -> bool:
    """Whether the file's name is that of a Direct Electron movie."""
    return path.lower().endswith(MOVIE)


def scan(path: str, frames: int) -> Scan:
    """Settings and positions of the movie at ``path``, which holds ``frames`` frames.

    A raster of exactly that many points is a scan.  Positions of any other order make a stack, in the order of
    acquisition: ``scan_positions``, their extent and repeats are facts, the positions stay in their file.

    Raises
    ------
    Incomplete
        The camera's program has not finished, or has written fewer frames than were asked for.
    FormatError
        The files do not belong together.
    """
    info_path = _beside(path, INFO)
    if info_path is None:
        raise Incomplete(
            f"its {INFO} is not there: the camera writes it when it has finished",
            path=path,
            next_step=f"wait; a movie of another program needs another name than <stem>{MOVIE}",
        )
    info = _info(info_path)
    _check_finished(path, info_path, info, frames)
    members = [member(info_path, INFO)]
    metadata = {ours: _scalar(info[name]) for name, ours in _FACTS.items() if info.get(name)}
    scanning = info.get("Scan - Enable") == "Enable"
    scan_shape: tuple[int, ...] = (frames,)
    warnings: tuple[str, ...] = ()
    if scanning and info.get("Scan - Type", "Raster") == "Raster":
        scan_shape, warnings = _raster(info, frames)
    elif scanning:
        scan_shape, facts, positions, warnings = _positions(path, frames)
        metadata |= facts
        members.append(positions)
    scan_axes, det_axes = axes(scan_shape, _calibrations(info, len(scan_shape)))
    return Scan(
        scan_shape=scan_shape,
        members=tuple(members),
        scan_axes=scan_axes,
        det_axes=det_axes,
        metadata=metadata,
        warnings=warnings,
    )


def _scalar(text: str) -> Scalar:
    try:
        value = float(text)
    except ValueError:
        return text[:128]
    return value if math.isfinite(value) else text[:128]


def _beside(path: str, suffix: str) -> str | None:
    """The file of the same stem, or of the stem without the movie's number."""
    stem = path[: -len(MOVIE)]
    for candidate in (stem + suffix, re.sub(r"_\d+$", "", stem) + suffix):
        if os.path.isfile(candidate):  # noqa: PTH113
            return candidate
    return None


def _info(path: str) -> dict[str, str]:
    lines = read_sidecar(path).decode("utf-8", "replace").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _check_finished(path: str, info_path: str, info: dict[str, str], frames: int) -> None:
    status = info.get("Acquisition Status", "Finished")  # not every version of the program writes it
    written = _number(info, "Autosave Movie Frames Written", info_path)
    asked = _number(info, "Number of Frames Requested", info_path)
    summed = max(1, _number(info, "Autosave Movie Sum Count", info_path))
    if status != "Finished":
        raise Incomplete(f"the acquisition is {status:.40}", path=info_path, frame=written, next_step="wait")
    if written * summed < asked:
        raise Incomplete(
            f"{written} of {asked // summed} frames were written", path=info_path, frame=written, next_step="wait"
        )
    if written and written != frames:
        raise FormatError(
            f"the movie has {frames} frames, and {written} were written",
            path=path,
            next_step=f"check that {INFO} and the movie belong to one acquisition",
        )


def _number(info: dict[str, str], name: str, path: str) -> int:
    text = info.get(name, "0")
    if not re.fullmatch(r"\d{1,12}", text):
        raise FormatError(f"{name!r} is {text!r:.80}", path=path, next_step="copy it again")
    return int(text)


def _raster(info: dict[str, str], frames: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    which = "Scan - ROI Size" if info.get("Scan - ROI Enable") == "Enable" else "Scan - Size"
    columns, rows = (int(t) if re.fullmatch(r"\d{1,6}", t := info.get(f"{which} {a}", "0")) else 0 for a in "XY")
    if rows * columns == frames:
        return (rows, columns), ()
    return (frames,), (f"the scan has {rows} x {columns} points and the movie {frames} frames: taken as a stack",)


def _positions(path: str, frames: int) -> tuple[tuple[int, ...], dict[str, Scalar], Member, tuple[str, ...]]:
    csv = _beside(path, POSITIONS)
    if csv is None:
        raise Incomplete(f"its {POSITIONS} is not there yet", path=path, next_step="wait for it")
    at = _read_positions(csv)
    if len(at) < frames:
        raise Incomplete(f"{len(at)} of {frames} positions are there", path=csv, frame=len(at), next_step="wait")
    if len(at) > frames:
        raise FormatError(
            f"it has {len(at)} positions for {frames} frames", path=csv, next_step="copy movie and positions again"
        )
    rows, columns = int(at[:, 0].max()) + 1, int(at[:, 1].max()) + 1
    index = at[:, 0].astype(np.int64) * columns + at[:, 1]
    facts: dict[str, Scalar] = {
        "scan_positions": frames,
        "scan_positions_distinct": len(np.unique(index)),
        "scan_extent_y": rows,
        "scan_extent_x": columns,
    }
    if rows * columns == frames and np.array_equal(index, np.arange(frames)):
        return (rows, columns), facts, member(csv, POSITIONS), ()
    warning = f"{frames} positions in an order of their own, within {rows} x {columns}: a stack in order of acquisition"
    return (frames,), facts, member(csv, POSITIONS), (warning,)


def _read_positions(path: str) -> np.ndarray:
    """(n, 2) int64 as (y, x); the file has ``x,y`` a line."""
    size = size_of(path)
    if size > POSITIONS_LIMIT:
        raise FormatError(f"it has {size} bytes; at most {POSITIONS_LIMIT} are read", path=path, next_step="check it")
    text = read_at(path, 0, size)
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _ROW.fullmatch(line)
        if found is None:
            raise FormatError(f"line {number} is {line!r:.80}, not x,y", path=path, next_step="copy it again")
        values.append((int(found[2]), int(found[1])))
    if not values:
        raise Incomplete("no positions are in it yet", path=path, frame=0, next_step="wait")
    return np.array(values, np.int64)


def _calibrations(info: dict[str, str], scan_axes: int) -> list[tuple[float, float, str]]:
    """Scale, offset and unit of each axis; -1 and 0 mean that the program did not know."""
    found = []
    names = [(f"Specimen Pixel Size {a} (nanometers)", "nm") for a in "YX"] if scan_axes == 2 else [("", "px")]
    names += [(f"Diffraction Pixel Size {a}", "1/nm") for a in "YX"]
    for name, unit in names:
        try:
            value = float(info.get(name, "0"))
        except ValueError:
            value = 0.0
        found.append((value, 0.0, unit) if value > 0 else (1.0, 0.0, "px"))
    return found
