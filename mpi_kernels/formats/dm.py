"""Gatan DigitalMicrograph images, stacks and 4D scans, .dm3 and .dm4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header, Scalar
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats import dm_tags
from mpi_kernels.formats.access import check_caps, member, read_exactly, size_of
from mpi_kernels.formats.dm_tags import Place, Tree
from mpi_kernels.formats.fortran import DETECTOR_FIRST, FortranSource
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of
from mpi_kernels.formats.plan import c_order
from mpi_kernels.protocols import Source

_TYPES = {1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 14: "b1", 39: "i8", 40: "u8"}
_REFUSED = {3: "complex", 5: "packed complex", 8: "colour", 13: "complex", 23: "colour", 27: "complex", 28: "complex"}
_UNITS = {"µm": "um", "\N{GREEK SMALL LETTER MU}m": "um"}
_FACTS = {
    "Microscope Info/Voltage": "high_tension_v",
    "Microscope Info/STEM Camera Length": "camera_length_mm",
    "Microscope Info/Indicated Magnification": "magnification",
    "DataBar/Acquisition Date": "date",
    "DataBar/Acquisition Time": "time",
    "DataBar/Device Name": "camera",
    "Meta Data/Format": "dm_format",
}
_NO_SUFFIX = "DigitalMicrograph files end in .dm3 or .dm4"


@dataclass(frozen=True, slots=True)
class _Image:
    at: str
    """Path of its tags."""
    place: Place
    stored: np.dtype
    sizes: tuple[int, ...]
    """Slowest axis first."""


class Dm:
    """DigitalMicrograph 3 and 4.

    Layout: a tree of tags (`dm_tags`).  ``ImageList/<n>/ImageData`` has ``Data``, one array in one piece,
    ``DataType``, ``Dimensions`` (fastest first) and ``Calibrations``.  Of several images that are no thumbnails the
    largest is taken.

    Three dimensions are a stack.  Four are a scan with the frames in one piece if ``Meta Data/Data Order Swapped``
    says so; else the detector comes first, as GMS stored scans before, which is read correctly and slowly.  Source:
    LiberTEM ``io/dataset/dm_single.py`` for that tag; rosettasciio's reader for the types (both read, not copied).

    Complete when the tags can be read to their end and the pixels lie within the file.  The size of the frames stands
    behind them, so a file that is cut off can't name the missing one.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".dm3", ".dm4")

    def probe(self, path: str) -> Header:
        """Read the tags."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        header, image, detector_first = _probe(path)
        if detector_first:
            return FortranSource(header, path, image.place.offset, image.stored, detector_first=True)
        return c_order(header, path, image.place.offset, image.stored)


def _probe(path: str) -> tuple[Header, _Image, bool]:
    if not path.lower().endswith(Dm.suffixes):
        raise NotThisFormat(_NO_SUFFIX, path=path)
    size = size_of(path)
    if read_exactly(path, 0, 4, "its header")[:3] != b"\0\0\0":
        raise NotThisFormat("not a DigitalMicrograph file: no version 3 or 4", path=path)
    tree = dm_tags.read(path)
    image, others = _image(path, tree)
    detector_first, warnings = _order(tree, image)
    sizes = image.sizes[2:] + image.sizes[:2] if detector_first else image.sizes
    scan_shape, det_shape = sizes[:-2], (sizes[-2], sizes[-1])
    frame_bytes = image.stored.itemsize * math.prod(det_shape)
    check_caps(path, math.prod(scan_shape), frame_bytes)
    end = image.place.offset + image.place.count * image.place.item
    if end > size:
        whole = 0 if detector_first else max(0, size - image.place.offset) // frame_bytes
        told = f"{whole} of {math.prod(scan_shape)} frames are there"
        raise Incomplete(told, path=path, frame=whole, next_step="wait for the writer")
    calibrations = [_calibration(tree, image, k) for k in range(len(sizes))][::-1]
    if detector_first:
        calibrations = calibrations[2:] + calibrations[:2]
    scan_axes, det_axes = axes(scan_shape, calibrations)
    header = Header(
        format="dm",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(image.stored).name,
        members=(member(path, path[-4:].lower()),),
        rule="exact",
        scan_axes=scan_axes,
        det_axes=det_axes,
        unit=str(tree.values.get(f"{image.at}/ImageData/Calibrations/Brightness/Units", ""))[:64] or "counts",
        metadata=_facts(tree, image),
        warnings=others + warnings,
    )
    return header, image, detector_first


def _image(path: str, tree: Tree) -> tuple[_Image, tuple[str, ...]]:
    thumbnails = {f"ImageList/{v}" for k, v in tree.values.items() if k.startswith("Thumbnails/") and "Index" in k}
    found = [
        (place.count * place.item, key.removesuffix("/ImageData/Data"))
        for key, place in tree.arrays.items()
        if key.startswith("ImageList/") and key.endswith("/ImageData/Data") and key.count("/") == 3
    ]
    images = sorted((f for f in found if f[1] not in thumbnails), key=lambda f: (-f[0], f[1]))
    if not images:
        raise FormatError("no image is in it", path=path, next_step="save an image or a scan from DigitalMicrograph")
    at = images[0][1]
    place = tree.arrays[f"{at}/ImageData/Data"]
    code = tree.values.get(f"{at}/ImageData/DataType")
    if code not in _TYPES:
        raise FormatError(
            f"pixels of DigitalMicrograph's type {code} ({_REFUSED.get(int(code or 0), 'unknown')}) are no counts",
            path=path,
            next_step="save it as real numbers",
        )
    stored = np.dtype(tree.order + _TYPES[int(code)])
    sizes: list[int] = []
    while isinstance(n := tree.values.get(f"{at}/ImageData/Dimensions/{len(sizes)}"), int) and len(sizes) < 8:
        sizes.append(n)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    dm_format = str(tree.values.get(f"{at}/ImageTags/Meta Data/Format", ""))
    if not 2 <= len(sizes) <= 4 or min(sizes) < 1 or "spectrum" in dm_format.lower():
        raise FormatError(
            f"an array of {' x '.join(map(str, sizes)) or 'no'} numbers ({dm_format or 'no format'}) has no frames",
            path=path,
            next_step="spectra are not reduced; name an image, a stack or a 4D scan",
        )
    if math.prod(sizes) != place.count or place.item != stored.itemsize:
        raise FormatError(
            f"it has {place.count} numbers of {place.item} bytes for {' x '.join(map(str, sizes))} pixels",
            path=path,
            next_step="copy the file again from the microscope",
        )
    several = (f"{len(images)} images are in it: the largest is taken",) if len(images) > 1 else ()
    return _Image(at, place, stored, tuple(sizes[::-1])), several


def _order(tree: Tree, image: _Image) -> tuple[bool, tuple[str, ...]]:
    """Whether the detector's axes come first, and what is to be told of it."""
    if len(image.sizes) < 4:
        return False, ()
    swapped = tree.values.get(f"{image.at}/ImageTags/Meta Data/Data Order Swapped")
    if swapped is None:
        return True, (DETECTOR_FIRST, "no tag tells the order of its axes: the detector is taken to be first")
    return (False, ()) if swapped else (True, (DETECTOR_FIRST,))


def _calibration(tree: Tree, image: _Image, axis: int) -> tuple[float, float, str]:
    """Of an axis, fastest first: DigitalMicrograph's position is ``scale * (index - origin)``."""
    at = f"{image.at}/ImageData/Calibrations/Dimension/{axis}"
    scale, origin = (tree.values.get(f"{at}/{name}") for name in ("Scale", "Origin"))
    unit = str(tree.values.get(f"{at}/Units", ""))[:64]
    if not isinstance(scale, float) or not isinstance(origin, float):
        return 1.0, 0.0, "px"
    return scale, 0.0 - origin * scale, _UNITS.get(unit, unit)


def _facts(tree: Tree, image: _Image) -> dict[str, Scalar]:
    facts: dict[str, Scalar] = {}
    for theirs, ours in _FACTS.items():
        value = tree.values.get(f"{image.at}/ImageTags/{theirs}")
        if isinstance(value, str) and value:
            facts[ours] = value[:128]
        elif isinstance(value, (int, float)) and math.isfinite(value):
            facts[ours] = value
    return facts
