"""HDF5: Nion Swift, EMD (py4DSTEM, Prismatic, fpd), HyperSpy, NeXus, EBSD patterns, or one plain dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats import hdf5_layouts
from mpi_kernels.formats.access import check_caps, member, size_of
from mpi_kernels.formats.hdf5_holes import expected_chunks, first_missing
from mpi_kernels.formats.hdf5_open import MAX_RANK, opened, walk
from mpi_kernels.formats.hdf5_source import check_chunks, check_filters, chunked, kept_axes
from mpi_kernels.formats.pixels import delivered_dtype, kind_of, split_shape, stored_dtype
from mpi_kernels.formats.plan import c_order
from mpi_kernels.protocols import Source

_WAIT = "wait for the writer, or record it again"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the frames are: ``offset`` is the byte of a contiguous array that can be read without HDF5."""

    name: str
    offset: int | None
    dtype: np.dtype


class Hdf5:
    """HDF5 files that hold frames.

    Layouts, in the order in which they are tried: Nion Swift (``/data`` with JSON ``properties``), EMD 1.0 and 0.x
    (``emd_group_type``), HyperSpy (``Experiments/*/data``), NXdata (``signal``), EBSD patterns, else the only
    dataset with the most axes.  Contiguous arrays are read by offset, chunked ones through the library.
    Sources: nionswift HDF5Handler.py; https://emdatasets.com/format; rosettasciio's hspy format, version 3.3;
    https://manual.nexusformat.org/classes/base_classes/NXdata.html; fpd's file description; kikuchipy's h5ebsd.

    Complete when HDF5's own end of file is there, no writer has it open or locked, and no chunk is missing.  That is
    necessary and not sufficient: Swift makes the file full size and fills it, and chunks can be allocated before they
    are written.  So the rule is stability, for all of HDF5.

    Never followed: soft and external links, external storage, virtual datasets; each would read a file that is not
    part of the acquisition.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".h5", ".hdf5", ".hdf", ".emd", ".hspy", ".nxs", ".h5ebsd", ".he5")

    def probe(self, path: str) -> Header:
        """Read metadata only; holds HDF5's lock for that moment."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        header, place = _probe(path)
        if place.offset is not None:
            return c_order(header, path, place.offset, place.dtype)
        return chunked(header, path, place.name)


def _probe(path: str) -> tuple[Header, _Place]:
    with opened(path) as file:
        found = hdf5_layouts.find(walk(file, path), path)
        dataset = file[found.name]
        stored = _checked(dataset, found.name, path)
        _, scan_shape, det_shape = split_shape(dataset.shape, path)
        lead = kept_axes(dataset.shape, len(scan_shape))
        scan_shape = found.scan_shape or scan_shape
        check_caps(path, math.prod(scan_shape), stored.itemsize * math.prod(det_shape))
        offset = _offset(dataset, lead, scan_shape, stored, path)
        suffix = next((s for s in Hdf5.suffixes if path.lower().endswith(s)), ".h5")
        header = Header(
            format="hdf5",
            kind=kind_of(scan_shape),
            scan_shape=scan_shape,
            det_shape=det_shape,
            dtype=delivered_dtype(stored).name,
            members=(member(path, suffix),),
            rule="stability",
            scan_axes=found.scan_axes,
            det_axes=found.det_axes,
            unit=found.unit,
            metadata={"layout": found.layout, "dataset": found.name, **found.metadata},
            warnings=found.warnings,
        )
        return header, _Place(found.name, offset, stored)


def _checked(dataset: Any, name: str, path: str) -> np.dtype:
    """The stored pixel type, after everything that must not be read has been refused."""
    plist = dataset.id.get_create_plist()
    if dataset.is_virtual or plist.get_external_count() > 0:
        kind = "a virtual dataset" if dataset.is_virtual else "stored outside the file"
        raise FormatError(
            f"{name} is {kind}: its frames lie in other files, which are not followed",
            path=path,
            next_step="name the file that holds the frames, or copy them into one with h5repack",
        )
    if dataset.ndim > MAX_RANK or 0 in dataset.shape:
        raise Incomplete(f"{name} has shape {dataset.shape}: nothing is in it yet", path=path, next_step=_WAIT)
    if dataset.chunks:
        check_chunks(dataset, path)
        check_filters(dataset, path)
    return stored_dtype(dataset.dtype.str, path)


def _offset(dataset: Any, lead: list[int], scan_shape: tuple[int, ...], stored: np.dtype, path: str) -> int | None:
    """Byte of a contiguous array; None for what the library must read.  `Incomplete` names the first missing frame."""
    import h5py

    if dataset.chunks:
        there, expected = dataset.id.get_num_chunks(), expected_chunks(dataset)
        if there != expected:
            frame = first_missing(dataset, lead, 0, math.prod(scan_shape))
            raise Incomplete(f"{there} of {expected} chunks are written", path=path, frame=frame, next_step=_WAIT)
        return None
    if dataset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT:
        return None
    wanted = dataset.size * stored.itemsize
    if dataset.id.get_storage_size() < wanted:
        raise Incomplete("its array was never written", path=path, frame=0, next_step=_WAIT)
    offset = dataset.id.get_offset()
    if offset is None or offset + wanted > size_of(path):
        raise Incomplete("its array is not whole", path=path, frame=0, next_step=_WAIT)
    # a type that numpy has no equal of (odd precision, bit fields) is converted by the library
    same = h5py.h5t.py_create(dataset.dtype, logical=True).equal(dataset.id.get_type())
    return int(offset) if same else None
