"""The master file of a Dectris detector, read through hard links alone."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_kernels.contract import Scalar
from mpi_kernels.errors import FormatError, NotThisFormat
from mpi_kernels.formats.hdf5_open import attribute, text_of

MAX_FILES = 100_000
MASK_BYTES = 1 << 20
"""Largest pixel mask that is looked at; ARINA's has 147,456 bytes."""

_DETECTOR = "entry/instrument/detector"
_FACTS = (
    ("camera", f"{_DETECTOR}/description"),
    ("detector_number", f"{_DETECTOR}/detector_number"),
    ("exposure_s", f"{_DETECTOR}/count_time"),
    ("frame_time_s", f"{_DETECTOR}/frame_time"),
    ("threshold_energy_ev", f"{_DETECTOR}/threshold_energy"),
    ("saturation_value", f"{_DETECTOR}/saturation_value"),
    ("date", f"{_DETECTOR}/detectorSpecific/data_collection_date"),
    ("photon_energy_ev", f"{_DETECTOR}/detectorSpecific/photon_energy"),
    ("detector_software", f"{_DETECTOR}/detectorSpecific/software_version"),
)


@dataclass(frozen=True, slots=True)
class Master:
    """What the master says.

    Attributes
    ----------
    links : dict
        Data files by number: file name and path of the dataset in it.
    frames : int
        Announced: ``nimages * ntrigger``.
    facts : dict
        Metadata worth keeping.
    masked : int or None
        Pixels that the detector masks; None where there is no mask.
    scan : tuple or None
        Scan shape and step in nm (empty if unknown), if the scan generator's program has noted them down here.
    """

    links: dict[int, tuple[str, str]]
    frames: int
    facts: dict[str, Scalar]
    masked: int | None
    scan: tuple[tuple[int, ...], tuple[float, ...]] | None


def read_master(file: Any, path: str) -> Master:
    """Read the opened master; `NotThisFormat` if it is none."""
    import h5py

    group = inside(file, "entry/data")
    if not isinstance(group, h5py.Group):
        raise NotThisFormat("not a Dectris master: it has no group /entry/data", path=path)
    links: dict[int, tuple[str, str]] = {}
    for name in group:
        found = re.fullmatch(r"data_(\d{6})", name)
        link = group.get(name, getlink=True)
        if found and isinstance(link, h5py.ExternalLink):
            links[int(found[1])] = (_text(link.filename), _text(link.path))
        if len(links) > MAX_FILES:
            raise FormatError(f"it links more than {MAX_FILES} files", path=path, next_step="record fewer files")
    specific = f"{_DETECTOR}/detectorSpecific"
    images, triggers = _number(file, f"{specific}/nimages"), _number(file, f"{specific}/ntrigger")
    if images is None or triggers is None:
        raise NotThisFormat(f"not a Dectris master: no nimages and ntrigger in /{specific}", path=path)
    facts: dict[str, Scalar] = {ours: value for ours, theirs in _FACTS if (value := _fact(file, theirs)) is not None}
    mask = inside(file, f"{specific}/pixel_mask")
    masked = None
    if isinstance(mask, h5py.Dataset) and mask.dtype.kind in "iu" and 0 < mask.size * mask.dtype.itemsize <= MASK_BYTES:
        masked = int(np.count_nonzero(mask[()]))
    return Master(links, int(images) * int(triggers), facts, masked, scan_of(file))


def scan_of(file: Any) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Scan shape and step in nm that the scan generator's program noted down; None if there are none."""
    group = inside(file, "STEM Metadata")
    if group is None:
        return None
    counts = [_first(attribute(group, f"NumPixels{axis}")) for axis in "YX"]
    if None in counts or not all(1 <= float(c or 0) < 1 << 31 for c in counts):
        return None
    step = _first(attribute(group, "Pixel Size"))  # in nm: rosettasciio's arina reader turns it into Å by 10
    shape = tuple(int(c or 0) for c in counts)
    return shape, ((step,) if step is not None and step > 0 else ())


def inside(file: Any, name: str) -> Any:
    """An object reached by hard links alone; None otherwise."""
    import h5py

    here = file
    for part in name.strip("/").split("/"):
        if not isinstance(here, h5py.Group) or not isinstance(here.get(part, getlink=True), h5py.HardLink):
            return None
        here = here[part]
    return here


def _fact(file: Any, name: str) -> Scalar:
    import h5py

    dataset = inside(file, name)
    if not isinstance(dataset, h5py.Dataset) or dataset.size != 1:
        return None
    value = dataset[()]
    if dataset.dtype.kind in "iuf":
        number = np.asarray(value).reshape(-1)[0].item()
        return number if np.isfinite(number) else None
    return text_of(value)[:256] or None


def _number(file: Any, name: str) -> int | None:
    value = _fact(file, name)
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else None


def _first(value: Any) -> float | None:
    """The first number of an attribute."""
    flat = np.asarray(value).reshape(-1) if value is not None else np.empty(0)
    if flat.size == 0 or flat.dtype.kind not in "iuf" or not np.isfinite(flat[0]):
        return None
    return float(flat[0])


def _text(name: str | bytes) -> str:
    return os.fsdecode(name)
