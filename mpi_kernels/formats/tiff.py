"""TIFF and BigTIFF stacks of plain pixels: one file of many pages, or a folder of numbered files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats import tiff_packed
from mpi_kernels.formats.access import check_caps, check_table, member, os_errors, size_of
from mpi_kernels.formats.parts import numbered
from mpi_kernels.formats.pixels import delivered_dtype, kind_of
from mpi_kernels.formats.plan import LayoutSource, evenly
from mpi_kernels.formats.tiff_packed import PackedSource
from mpi_kernels.formats.tiff_pages import PackedError, Page, pages
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

_RULE = re.compile(r"(?P<stem>.*?)(?P<number>\d{1,9})(?P<end>\.tiff?)", re.IGNORECASE | re.DOTALL)
_IMAGEJ = re.compile(r"^images=(\d{1,9})$", re.MULTILINE)


class Tiff:
    """TIFF 6.0 and BigTIFF with uncompressed grey pixels.

    Layout: a directory for each page, each with the place of the next; a page's strips must follow one another.
    Smaller copies of a page (NewSubfileType 1) are left out, and all others must be alike.  ImageJ writes one
    directory for many images where the file has more than 4 GiB.  Compressed and tiled pages are undone by tifffile,
    frame by frame; colours are refused.  Source: Adobe TIFF 6.0; BigTIFF as of libtiff; ImageJ's TiffEncoder;
    tifffile's ``shape``.

    A folder is a series of one plain page a file, ``<stem><number>.tif``, in order of the numbers (img_10 after img_9).

    Complete when all pages lie within the file.  Only ImageJ and tifffile say in the description how many pages
    there shall be: then that is held against the file, and the rule is exact; else it is stability.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".tif", ".tiff")
    folders: ClassVar[bool] = True

    def probe(self, path: str) -> Header:
        """Walk along the directories."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        header, layout = _probe(path)
        return PackedSource(header, path) if layout is None else LayoutSource(header, layout)


def _probe(path: str) -> tuple[Header, Layout | None]:
    """What the file holds, and where; no layout where tifffile has to undo the pages."""
    if os.path.isdir(path):  # noqa: PTH112
        return _series(path)
    size = size_of(path)
    try:
        return _plain(path, size, _alike(path, list(pages(path))))
    except PackedError:
        return _packed(path, size), None


def _packed(path: str, size: int) -> Header:
    count, shape, stored, description = tiff_packed.described(path, size)
    scan_shape, stated = _stated(path, Page(shape, stored.str, 0, description), count)
    if stated > count:
        raise Incomplete(f"{count} of {stated} frames are there", path=path, frame=count, next_step="wait")
    return _header(path, scan_shape, shape, stored, stated)


def _header(path: str, scan_shape: tuple[int, ...], shape: tuple[int, int], stored: np.dtype, stated: int) -> Header:
    suffix = ".tiff" if path.lower().endswith(".tiff") else ".tif"
    return Header(
        format="tiff",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=shape,
        dtype=delivered_dtype(stored).name,
        members=(member(path, suffix),),
        rule="exact" if stated else "stability",
    )


def _plain(path: str, size: int, found: Sequence[Page]) -> tuple[Header, Layout]:
    first = found[0]
    scan_shape, stated = _stated(path, first, len(found))
    check_caps(path, max(stated, len(found)), first.size)
    offsets = np.array([p.offset for p in found], np.int64)
    if stated > len(found) == 1:
        check_table(path, stated)
        offsets = first.offset + first.size * np.arange(stated, dtype=np.int64)
    late = np.flatnonzero(offsets + first.size > size)
    if late.size or len(offsets) < stated:
        whole = int(late[0]) if late.size else len(offsets)
        raise Incomplete(
            f"{whole} of {max(stated, len(offsets))} frames are there",
            path=path,
            frame=whole,
            next_step="wait for the writer, or copy the file again",
        )
    header = _header(path, scan_shape, first.shape, np.dtype(first.dtype), stated)
    return header, evenly(Layout(files=(path,), dtype=first.dtype, payload=first.size, offsets=offsets))


def _alike(path: str, found: Sequence[Page]) -> Sequence[Page]:
    if not found:
        raise Incomplete("no page is in it yet", path=path, frame=0, next_step="wait for the writer")
    odd = next((i for i, p in enumerate(found) if (p.shape, p.dtype) != (found[0].shape, found[0].dtype)), None)
    if odd is not None:
        raise FormatError(
            f"page {odd} is {found[odd].shape} {found[odd].dtype}, the first is {found[0].shape} {found[0].dtype}",
            path=path,
            frame=odd,
            next_step="save images of one size and type",
        )
    return found


def _stated(path: str, page: Page, count: int) -> tuple[tuple[int, ...], int]:
    """Scan shape, and the number of frames that the description promises; 0 where it does not."""
    told = _IMAGEJ.search(page.description) if page.description.startswith("ImageJ=") else None
    if told:
        stated = max(1, int(told[1]))
        return (stated,) if stated > 1 or count > 1 else (1,), stated
    shape = _shape(page.description)
    if len(shape) > 2 and shape[-2:] == page.shape:
        check_caps(path, math.prod(shape[:-2]), page.size)
        scan = tuple(n for n in shape[:-2] if n > 1) or (1,)
        return scan if len(scan) == 2 else (math.prod(scan),), math.prod(shape[:-2])
    return (count,), 0


def _shape(description: str) -> tuple[int, ...]:
    """What tifffile writes as ``{"shape": [...]}``; () where it is something else."""
    if not description.startswith('{"shape"'):
        return ()
    try:
        shape = json.loads(description).get("shape")
    except (ValueError, RecursionError, AttributeError):
        return ()
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        return ()
    return tuple(shape)


def _series(path: str) -> tuple[Header, Layout]:
    """A folder of numbered files, one page each."""
    with os_errors(path):
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(Tiff.suffixes) and n[0] != ".")  # noqa: PTH208
    rules = [_RULE.fullmatch(n) for n in names]
    stems = {(r["stem"], r["end"].lower()) for r in rules if r}
    if not names or None in rules or len(stems) != 1:
        raise NotThisFormat("the folder is no series: its TIFF files are not named <stem><number>.tif", path=path)
    lowest = min((r for r in rules if r), key=lambda r: int(r["number"]))
    if int(lowest["number"]) > 1:
        raise NotThisFormat("the folder is no series: its numbers do not begin with 0 or 1", path=path)
    files = numbered(os.path.join(path, lowest.string), _RULE)  # noqa: PTH118
    check_table(path, len(files))
    found = [_only_page(f, i) for i, f in enumerate(files)]
    _alike(path, found)
    first = found[0]
    check_caps(path, len(found), first.size)
    header = Header(
        format="tiff",
        kind="stack",
        scan_shape=(len(found),),
        det_shape=first.shape,
        dtype=delivered_dtype(np.dtype(first.dtype)).name,
        members=tuple(member(f, f"_{i}.tif") for i, f in enumerate(files)),
        rule="stability",
    )
    layout = Layout(files=files, dtype=first.dtype, payload=first.size, offsets=np.array([p.offset for p in found]))
    return header, replace(layout, file_of=np.arange(len(files), dtype=np.int32))


def _only_page(path: str, frame: int) -> Page:
    size = size_of(path)
    found = list(pages(path))
    if len(found) != 1:
        raise FormatError(f"it has {len(found)} pages, not one", path=path, next_step="name the file alone")
    if found[0].offset + found[0].size > size:
        raise Incomplete("its pixels are not whole", path=path, frame=frame, next_step="wait for the writer")
    return found[0]
