"""Where programs put the frames in HDF5: one finder per convention, asked in turn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpi_kernels.contract import Axis, Scalar
from mpi_kernels.errors import FormatError, NotThisFormat
from mpi_kernels.formats import nion
from mpi_kernels.formats.hdf5_axes import array_axes, dimension, number, scalar
from mpi_kernels.formats.hdf5_open import MAX_DEPTH, Contents, attribute, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The dataset of frames and what the convention says about it.

    ``scan_shape`` is None where the array's own shape is right.
    """

    layout: str
    name: str
    scan_shape: tuple[int, ...] | None = None
    scan_axes: tuple[Axis, ...] = ()
    det_axes: tuple[Axis, ...] = ()
    unit: str = "counts"
    metadata: dict[str, Scalar] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def find(contents: Contents, path: str) -> Found:
    """The frames of a file.

    Raises
    ------
    FormatError
        No convention fits, or several datasets could be meant; the text names them.
    """
    for finder in _FINDERS:
        found = finder(contents, path)
        if found is not None:
            return found
    return _plain(contents, path)


def _nion(contents: Contents, path: str) -> Found | None:
    """Nion Swift: ``data`` (.h5), or ``data/0``, ``data/1`` ... (.nhdf), with a JSON attribute ``properties``."""
    names = [n for n in contents.datasets if re.fullmatch(r"/data(/[0-9]+)?", n)]
    candidates = [(n, d, 0) for n in names if text_of(attribute(d := contents.datasets[n], "properties"))]
    if not candidates:
        return None
    name, data, _ = _largest(candidates)
    text = text_of(attribute(data, "properties"))
    try:
        properties = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("its properties are not JSON", path=path, next_step="export it again from Swift") from error
    if not isinstance(properties, dict):
        raise FormatError("its properties are no JSON object", path=path, next_step="export it again from Swift")
    facts = nion.facts(properties, data.shape, path)
    return Found(
        layout="Nion Swift",
        name=name,
        scan_axes=facts.scan_axes,
        det_axes=facts.det_axes,
        unit=facts.unit,
        metadata=facts.metadata,
        warnings=(*facts.warnings, *_others(name, [n for n, _, _ in candidates])),
    )


def _emd(contents: Contents, path: str) -> Found | None:
    """EMD 1.0 (py4DSTEM: ``data``, ``dim0``...) and 0.x (Prismatic, fpd: ``data`` or ``datacube``, ``dim1``...)."""
    candidates: list[tuple[str, Any, int]] = []
    for name, group in contents.groups.items():
        kind = text_of(attribute(group, "emd_group_type"))
        for leaf in ("data", "datacube"):
            array = contents.datasets.get(f"{name}/{leaf}")
            if array is not None and kind in ("array", "1") and _is_frames(array):
                candidates.append((f"{name}/{leaf}", array, 0 if kind == "array" else 1))
    if not candidates:
        return None
    name, array, first = _largest(candidates)
    group = name.rsplit("/", 1)[0]
    dims = [dimension(contents, f"{group}/dim{first + i}") for i in range(array.ndim)]
    scan_axes, det_axes = array_axes(array.shape, dims, path)
    return Found(
        layout="EMD 1.0" if first == 0 else "EMD 0.x",
        name=name,
        scan_axes=scan_axes,
        det_axes=det_axes,
        warnings=_others(name, [n for n, _, _ in candidates if _peer(n, name, contents)]),
    )


def _hyperspy(contents: Contents, path: str) -> Found | None:
    """HyperSpy .hspy: ``Experiments/<title>/data`` beside ``axis-<n>`` groups."""
    if not text_of(attribute(contents.groups["/"], "file_format")).lower().startswith("hyperspy"):
        return None
    frames = [n for n, d in contents.datasets.items() if _is_frames(d)]
    names = [n for n in frames if re.fullmatch(r"/Experiments/[^/]+/data", n)]
    if not names:
        return None
    group = names[0].rsplit("/", 1)[0]
    array = contents.datasets[names[0]]
    found = [contents.groups.get(f"{group}/axis-{i}") for i in range(array.ndim)]
    dims = [
        (number(attribute(a, "scale")), number(attribute(a, "offset"), 0.0), text_of(attribute(a, "units")))
        for a in found
        if a is not None
    ]
    scan_axes, det_axes = array_axes(array.shape, dims, path)
    _navigation_first(found, path)
    return Found(
        layout="HyperSpy",
        name=names[0],
        scan_axes=scan_axes,
        det_axes=det_axes,
        warnings=_others(names[0], names),
    )


def _navigation_first(found: Sequence[Any], path: str) -> None:
    """A HyperSpy file can hold spectra: its last two axes, and only they, must be the signal's."""
    flags = [attribute(a, "navigate") for a in found if a is not None]
    if len(flags) <= 2 or any(f is None for f in flags):
        return
    if [bool(f) for f in flags] != [True] * (len(flags) - 2) + [False, False]:
        raise FormatError(
            "its signal is not the last two axes of the array, so it holds no frames",
            path=path,
            next_step="set the signal axes with signal.transpose(signal_axes=2) and save again",
        )


def _nxdata(contents: Contents, path: str) -> Found | None:
    """NeXus: the ``signal`` of an NXdata group; of the default one, if the file names it and it is no mere image."""
    names: list[tuple[str, Any, int]] = []
    for group_name, group in contents.groups.items():
        if text_of(attribute(group, "NX_class")) != "NXdata":
            continue
        signal = f"{group_name.rstrip('/')}/{text_of(attribute(group, 'signal')) or 'data'}"
        if signal in contents.links:
            raise _behind_links(contents, path)
        array = contents.datasets.get(signal)
        if array is not None and _is_frames(array):
            names.append((signal, array, 0))
    if not names:
        return None
    default = _default_group(contents)
    stated_first = [c for c in names if default is not None and (c[0].rsplit("/", 1)[0] or "/") == default]
    # a default that is a single image is a preview of the scan where there is one
    name, array, _ = next((c for c in stated_first if c[1].ndim > 2), None) or _largest(names)
    group_name = name.rsplit("/", 1)[0]
    stated = attribute(contents.groups[group_name or "/"], "axes")
    listed = [text_of(a) for a in stated] if stated is not None and getattr(stated, "ndim", 0) == 1 else []
    dims = [dimension(contents, f"{group_name}/{a}") for a in listed] if len(listed) == array.ndim else []
    scan_axes, det_axes = array_axes(array.shape, dims, path)
    return Found(
        layout="NXdata",
        name=name,
        scan_axes=scan_axes,
        det_axes=det_axes,
        unit=text_of(attribute(array, "units")) or "counts",
        warnings=_others(name, [n for n, a, _ in names if a.ndim == array.ndim]),
    )


def _default_group(contents: Contents) -> str | None:
    """The NXdata group to which the attributes ``default`` lead from the root; None where they lead nowhere.

    Source: https://manual.nexusformat.org/datarules.html, "Find the default plottable data".
    """
    here = "/"
    for _ in range(MAX_DEPTH):
        group = contents.groups.get(here)
        if group is None:
            return None
        if text_of(attribute(group, "NX_class")) == "NXdata":
            return here
        named = text_of(attribute(group, "default"))
        if not named:
            return None
        here = named if named.startswith("/") else f"{here.rstrip('/')}/{named}"
    return None


def _h5ebsd(contents: Contents, path: str) -> Found | None:  # noqa: ARG001 - the finders have one signature
    """EBSD patterns (kikuchipy, EDAX, Bruker): a stack under ``<scan>/EBSD``, its grid in the header."""
    leaves = ("EBSD/Data/patterns", "EBSD/Data/Pattern", "EBSD/Data/RawPatterns")
    names = [n for n in contents.datasets if n.endswith(leaves) and _is_frames(contents.datasets[n])]
    if not names:
        return None
    array = contents.datasets[names[0]]
    header = names[0].rsplit("/", 2)[0] + "/Header"
    rows = scalar(contents, header, ("n_rows", "nRows", "NROWS"))
    columns = scalar(contents, header, ("n_columns", "nColumns", "NCOLS"))
    grid = (int(rows), int(columns)) if rows > 0 and columns > 0 else (0, 0)
    scan = grid if array.ndim == 3 and math.prod(grid) == array.shape[0] else None
    return Found(layout="h5ebsd", name=names[0], scan_shape=scan, warnings=_others(names[0], names))


def _plain(contents: Contents, path: str) -> Found:
    """No convention: fine if only one dataset has the most axes."""
    names = [n for n, d in contents.datasets.items() if _is_frames(d)]
    most = max((contents.datasets[n].ndim for n in names), default=0)
    names = [n for n in names if contents.datasets[n].ndim == most]
    if len(names) == 1:
        return Found(layout="plain", name=names[0])
    if names:
        raise FormatError(
            f"several datasets could be meant: {', '.join(sorted(names)[:8])}",
            path=path,
            next_step="export one dataset per file, or mark it as NXdata",
        )
    if contents.links:
        raise _behind_links(contents, path)
    raise FormatError(
        "it holds no dataset with two or more axes of numbers", path=path, next_step="name a file that holds images"
    )


def _behind_links(contents: Contents, path: str) -> FormatError:
    return FormatError(
        f"its data lie behind links, which are not followed: {', '.join(contents.links[:4])}",
        path=path,
        next_step="name the file that holds the frames, or copy them into one with h5repack",
    )


def _other_order(contents: Contents, path: str) -> Found | None:
    """Files that look plain and are not: Velox stores ``(y, x, frame)``, TopSpin one dataset for each frame."""
    if any(re.fullmatch(r"/Data/Image/[0-9a-f]{32}/Data", n) for n in contents.datasets):
        program = "Velox, which puts the frames last"
    elif sum(n.endswith("/Data") and f"{n[:-5]}/Metadata" in contents.datasets for n in contents.datasets) > 1:
        program = "TopSpin, one dataset for each frame"
    else:
        return None
    raise FormatError(
        f"it was written by {program}: another format reads it, by its suffix",
        path=path,
        next_step="give it the suffix again that it was written with: .emd or .app5",
    )


def _counted(contents: Contents, path: str) -> Found | None:
    """Lists of events as stempy writes them, beside which images and raw frames may lie: another format reads them."""
    if "/electron_events" in contents.groups and "/electron_events/frames" in contents.datasets:
        raise NotThisFormat("it holds electron events: the format stempy reads them", path=path)
    return None


def _master(contents: Contents, path: str) -> Found | None:
    """Masters of Dectris detectors: what they hold themselves is a flat field and a mask, never frames."""
    if any(re.fullmatch(r"/entry/data/data_\d{6}", n) for n in contents.links):
        raise FormatError(
            "its data lie behind links to the data files of a Dectris detector",
            path=path,
            next_step="give it a name that ends with _master.h5 again, or name a data file",
        )
    return None


_FINDERS: tuple[Callable[[Contents, str], Found | None], ...] = (
    _counted,
    _master,
    _other_order,
    _nion,
    _emd,
    _hyperspy,
    _nxdata,
    _h5ebsd,
)


def _is_frames(dataset: Any) -> bool:
    return dataset.ndim >= 2 and dataset.dtype.kind in "biuf"


def _largest(candidates: list[tuple[str, Any, int]]) -> tuple[str, Any, int]:
    """The one with the most axes; the first in the file among equals, the largest of these if they differ."""
    return max(candidates, key=lambda c: (min(c[1].ndim, 4), math.prod(c[1].shape)))


def _peer(name: str, chosen: str, contents: Contents) -> bool:
    return bool(contents.datasets[name].shape == contents.datasets[chosen].shape)


def _others(chosen: str, names: Sequence[str]) -> tuple[str, ...]:
    rest = [n for n in names if n != chosen]
    return (f"the file also holds {', '.join(rest[:8])}; {chosen} was taken",) if rest else ()
