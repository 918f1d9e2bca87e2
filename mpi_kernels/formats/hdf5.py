"""HDF5: Nion Swift, EMD (py4DSTEM, Prismatic, fpd), HyperSpy, NeXus, EBSD patterns, or one plain dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.formats import hdf5_layouts
from mpi_kernels.formats.access import check_caps, member
from mpi_kernels.formats.hdf5_checks import checked, offset_of
from mpi_kernels.formats.hdf5_open import opened, walk
from mpi_kernels.formats.hdf5_source import chunked, kept_axes, repeated
from mpi_kernels.formats.pixels import delivered_dtype, kind_of, split_shape
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

    Layouts, in the order in which they are tried: Nion Swift (``/data`` or ``/data/0`` with JSON ``properties``),
    EMD 1.0 and 0.x (``emd_group_type``), HyperSpy (``Experiments/*/data``), NXdata (``signal``), EBSD patterns, else
    the only dataset with the most axes.  Contiguous arrays and plain chunks of whole frames are read by offset, other
    chunks by offset and decompressed here where the filters are known, else through the library.
    Sources: nionswift HDF5Handler.py; https://emdatasets.com/format; rosettasciio's hspy format, version 3.3;
    https://manual.nexusformat.org/classes/base_classes/NXdata.html; fpd's file description; kikuchipy's h5ebsd.

    Complete when HDF5's own end of file is there, no writer has it open or locked, and no chunk is missing.  That is
    necessary and not sufficient: Swift makes the file full size and fills it, and chunks can be allocated before they
    are written.  So the rule is stability, for all of HDF5.

    Never followed: soft and external links, external storage, virtual datasets; each would read a file that is not
    part of the acquisition.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".h5", ".hdf5", ".hdf", ".emd", ".hspy", ".nxs", ".nhdf", ".h5ebsd", ".he5")

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
        stored = checked(dataset, found.name, path)
        _, scan_shape, det_shape = split_shape(dataset.shape, path)
        lead = kept_axes(dataset.shape, len(scan_shape))
        scan_shape = found.scan_shape or scan_shape
        check_caps(path, math.prod(scan_shape), stored.itemsize * math.prod(det_shape))
        offset = offset_of(dataset, lead, scan_shape, stored, path)
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
            warnings=(*found.warnings, *repeated(dataset, lead)),
        )
        return header, _Place(found.name, offset, stored)
