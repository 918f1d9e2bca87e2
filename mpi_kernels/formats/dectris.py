"""Dectris ARINA, QUADRO and EIGER: a master file, numbered data files, and the scan's own sidecar."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header, Member
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat, printable
from mpi_kernels.formats.access import check_caps, member, os_errors
from mpi_kernels.formats.dectris_master import Master, inside, read_master, scan_of
from mpi_kernels.formats.dectris_source import DectrisSource, Part
from mpi_kernels.formats.hdf5_checks import checked, offset_of
from mpi_kernels.formats.hdf5_open import opened
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of
from mpi_kernels.protocols import Source

MASTER = "_master.h5"
_WAIT = "wait for the writer, or copy all files of the acquisition again"


class Dectris:
    """Masters of ARINA, QUADRO and EIGER detectors.

    Layout: ``<stem>_master.h5`` holds the settings and, in ``/entry/data``, external links ``data_NNNNNN`` to
    ``<stem>_data_NNNNNN.h5``, each with a dataset (frames, det_y, det_x), a chunk a frame, compressed with
    bitshuffle-LZ4 or LZ4.  Links are never followed by the HDF5 library: data files are found by their number beside
    the master, so that renamed (staged) files are found too, and a link that names a folder is refused.
    Source: Dectris, "NEXUS Data Format" and "EIGER HDF5 files"; NXmx.

    Complete when every linked data file is there and their lengths add up to ``nimages * ntrigger``.  The master is
    written when the detector is armed, so it is no signal.  HDF5 files do not know their own end: stability.

    The scan shape is ``NumPixelsY, NumPixelsX`` of the group ``STEM Metadata`` in the master or in ``<stem>.h5``
    beside it; else it is a stack and the recipe's ``scan_shape`` makes it a scan.

    The largest value of the pixel type marks pixels that are masked, in a gap or not valid: it is delivered as 0.
    """

    suffixes: ClassVar[tuple[str, ...]] = (MASTER,)

    def probe(self, path: str) -> Header:
        """Read the master, and of each data file its shape and which chunks are there."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return DectrisSource(*_probe(path))


def _probe(path: str) -> tuple[Header, tuple[Part, ...]]:
    if not path.lower().endswith(MASTER):
        raise NotThisFormat(f"not a Dectris master: its name does not end with {MASTER}", path=path)
    with opened(path) as file:
        master = read_master(file, path)
    if master.frames < 1:
        raise FormatError("it announces no frames", path=path, next_step="check nimages and ntrigger of the detector")
    parts, det_shape, stored = _parts(path, master)
    check_caps(path, master.frames, stored.itemsize * det_shape[0] * det_shape[1])
    sidecar = path[: -len(MASTER)] + ".h5"
    members = [member(path, MASTER), *(member(p.path, _suffix(p.number)) for p in parts)]
    scan = master.scan
    if os.path.lexists(sidecar):
        _own_file(sidecar, path)
        members.append(member(sidecar, ".h5"))
        with opened(sidecar) as file:
            scan = scan or scan_of(file)
    return _header(master, scan, det_shape, stored, members), parts


def _header(
    master: Master,
    scan: tuple[tuple[int, ...], tuple[float, ...]] | None,
    det_shape: tuple[int, int],
    stored: np.dtype,
    members: Sequence[Member],
) -> Header:
    warnings: list[str] = []
    scan_shape, step_nm = scan or ((master.frames,), ())
    if int(np.prod(scan_shape)) != master.frames:
        warnings.append(
            f"the sidecar's scan of {scan_shape} does not fit {master.frames} frames: it is read as a stack"
        )
        scan_shape, step_nm = (master.frames,), ()
    facts = dict(master.facts)
    if stored.kind == "u":
        facts["flag_delivered_as_0"] = int(np.iinfo(stored).max)
    if master.masked is not None:
        facts["masked_pixels"] = master.masked
    if master.masked:
        warnings.append(f"{master.masked} pixels are masked by the detector and delivered as 0")
    scan_axes: tuple[Axis, ...] = ()
    if step_nm:
        scan_axes = axes(scan_shape, [(step_nm[0], 0.0, "nm")] * 2 + [(1.0, 0.0, "px")] * 2)[0]
    return Header(
        format="dectris",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(stored).name,
        members=tuple(members),
        rule="stability",
        scan_axes=scan_axes,
        metadata=facts,
        warnings=tuple(warnings),
    )


def _suffix(number: int) -> str:
    return f"_data_{number:06d}.h5"


def _parts(path: str, master: Master) -> tuple[tuple[Part, ...], tuple[int, int], np.dtype]:
    """Data files in order, and the shape and type that all have; `Incomplete` names the first frame not there."""
    parts: list[Part] = []
    first, det_shape, stored = 0, (0, 0), np.dtype(np.uint32)
    for number in range(1, max(master.links, default=0) + 1):
        if number not in master.links:
            raise Incomplete(f"it does not link data file {number}", path=path, frame=first, next_step=_WAIT)
        target, name = master.links[number]
        data = _data_file(path, number, target, first)
        if data is None:
            break  # a master may link more files than the frames fill
        with opened(data) as file:
            frames, shape, dtype = _measured(file, name, data, first)
        if parts and (shape, dtype) != (det_shape, stored):
            raise FormatError(
                f"it holds frames {shape} of {dtype}, the files before {det_shape} of {stored}",
                path=data,
                next_step="the files are of different acquisitions: copy them again",
            )
        det_shape, stored = shape, dtype
        parts.append(Part(data, name, number, first, frames))
        first += frames
    if first < master.frames:
        missing = os.path.basename(path)[: -len(MASTER)] + _suffix(len(parts) + 1)  # noqa: PTH119
        raise Incomplete(
            f"{first} of {master.frames} frames are there; next would be {printable(missing)}",
            path=path,
            frame=first,
            next_step=_WAIT,
        )
    if first > master.frames:
        raise FormatError(
            f"its data files hold {first} frames, and it announces {master.frames}",
            path=path,
            next_step="master and data files are of different acquisitions: copy them again",
        )
    return tuple(parts), det_shape, stored


def _data_file(path: str, number: int, target: str, first: int) -> str | None:
    """The data file of a number beside the master; None if it is not there."""
    if not target or target in (".", "..") or any(c in target for c in "/\\\0"):
        raise FormatError(
            f"its link to data file {number} leads out of its folder: {printable(target):.120}",
            path=path,
            frame=first,
            next_step="put all files of the acquisition into one folder, and write the links without folders",
        )
    folder = os.path.dirname(path)  # noqa: PTH120
    own = path[: -len(MASTER)] + _suffix(number)
    linked = os.path.join(folder, target)  # noqa: PTH118
    there = [p for p in dict.fromkeys((own, linked)) if os.path.lexists(p)]
    for candidate in there:
        _own_file(candidate, path)
    if len(there) == 2 and not os.path.samefile(*there):  # noqa: PTH121
        raise FormatError(
            f"its name and its link say different files for part {number}, and both are there: "
            f"{printable(os.path.basename(own))}, {printable(target)}",  # noqa: PTH119
            path=path,
            frame=first,
            next_step="rename the master and its data files together",
        )
    return there[0] if there else None


def _own_file(path: str, master: str) -> None:
    """Refuse what is not a file of the master's own folder: a link may lead anywhere."""
    with os_errors(path):
        facts = os.lstat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise FormatError(
            f"{printable(os.path.basename(path))} is no regular file; links are not followed",  # noqa: PTH119
            path=master,
            next_step="put the file itself beside the master",
        )


def _measured(file: Any, name: str, path: str, first: int) -> tuple[int, tuple[int, int], np.dtype]:
    import h5py

    dataset = inside(file, name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 3:
        raise FormatError(
            f"{printable(name):.80} is no dataset of frames", path=path, frame=first, next_step="copy the file again"
        )
    try:
        stored = checked(dataset, name, path)
        offset_of(dataset, [0], dataset.shape[:1], stored, path)
    except Incomplete as error:
        frame = first + (error.frame or 0)
        raise Incomplete(error.message, path=path, frame=frame, next_step=error.next_step) from error
    return int(dataset.shape[0]), (int(dataset.shape[1]), int(dataset.shape[2])), stored
