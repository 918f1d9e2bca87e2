"""TVIPS recorder streams, .tvips: frames behind headers of their own, in one file or in numbered parts."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import replace
from typing import ClassVar

import numpy as np

from mpi_kernels.contract import Axis, Header, Scalar
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats.access import check_caps, check_table, member, read_at, read_exactly, size_of
from mpi_kernels.formats.parts import numbered
from mpi_kernels.formats.pixels import IMAGE_AXES
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

HEADER_BYTES = 256
_HEADER = struct.Struct("<13I")
_RULE = re.compile(r"(?P<stem>.*_)(?P<number>\d{3})(?P<end>\.tvips)", re.IGNORECASE | re.DOTALL)
VERSION_1_LEAD = 12
FRAME_HEADER_LIMIT = 1 << 16
DIFFRACTION = 2
"""Mode of a frame header: 1 is an image, 2 a diffraction pattern."""

_MODE_AT = 24
"""Byte of the mode in a frame header: number, time, ms, LUT, Faraday cup, magnification are before it."""


class Tvips:
    """The .tvips of TVIPS cameras (EMplified recorder).

    Layout, little-endian: ``<stem>_000.tvips`` begins with 256 bytes, as uint32 its own length, version (1 or 2),
    width, height, bits of a pixel (8 or 16), offsets, binning, pixel size, voltage, magnification or camera length,
    and bytes of a frame header (version 1 has 12 always).  Frames follow, each behind its header; ``_001``, ``_002``
    and so on go on without any file header.  Source: rosettasciio's ``tvips`` reader (read, not copied).

    No part says how many frames there will be, so the rule is stability; each part must end with a whole frame, no
    part between others may be missing, nor may frames between parts by their numbers.  It is a stack: the recipe's
    ``scan_shape`` makes it a scan.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".tvips",)

    def probe(self, path: str) -> Header:
        """Read the header of the first part, and the sizes of all."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return LayoutSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Layout]:
    if not path.lower().endswith(".tvips"):
        raise NotThisFormat("TVIPS streams end in .tvips", path=path)
    sizes = [size_of(path)]
    parts = numbered(path, _RULE, 0)
    first, width, height, bits, lead = _sizes(path)
    payload = width * height * bits // 8
    sizes += [size_of(p) for p in parts[1:]]
    counts = _frames(parts, sizes, first, lead + payload)
    check_caps(path, sum(counts), payload)
    layout = Layout(files=parts, dtype="|u1" if bits == 8 else "<u2", payload=payload, lead=lead, first=first)
    if len(parts) > 1:
        _check_numbers(parts, counts, first, layout.record)
        check_table(path, sum(counts))
        starts = [layout.record * np.arange(n, dtype=np.int64) + (0 if i else first) for i, n in enumerate(counts)]
        file_of = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        layout = replace(layout, offsets=np.concatenate(starts), file_of=file_of)
    det_axes, facts = _described(path, first)
    header = Header(
        format="tvips",
        kind="stack",
        scan_shape=(sum(counts),),
        det_shape=(height, width),
        dtype=f"uint{bits}",
        members=tuple(member(p, _suffix(p)) for p in parts),
        rule="stability",
        det_axes=det_axes,
        metadata=facts,
    )
    return header, layout


def _suffix(part: str) -> str:
    """What of a part's name tells which part it is, and so must stay when it is copied."""
    found = _RULE.fullmatch(os.path.basename(part))  # noqa: PTH119
    return f"_{found['number']}.tvips" if found else ".tvips"


def _sizes(path: str) -> tuple[int, int, int, int, int]:
    head = read_at(path, 0, HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise Incomplete(f"only {len(head)} bytes of its header are there", path=path, next_step="wait")
    length, version, width, height, bits, *_, lead = _HEADER.unpack_from(head)
    if version == 1:
        lead = VERSION_1_LEAD
    if length != HEADER_BYTES or version not in (1, 2) or bits not in (8, 16) or not 12 <= lead <= FRAME_HEADER_LIMIT:
        raise FormatError(
            f"a header of {length} bytes, version {version}, {bits} bits a pixel and {lead} bytes a frame header",
            path=path,
            next_step="known are headers of 256 bytes, versions 1 and 2, 8 or 16 bits; copy it again",
        )
    check_caps(path, 1, width * height * bits // 8)
    return length, width, height, bits, lead


def _frames(parts: tuple[str, ...], sizes: list[int], first: int, record: int) -> list[int]:
    """Whole frames of each part; `Incomplete` if one does not end with a whole frame."""
    counts: list[int] = []
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        whole, rest = divmod(size - (0 if i else first), record)
        counts.append(whole)
        if rest or not whole:
            raise Incomplete(
                f"{rest} of {record} bytes of a frame are there", path=part, frame=sum(counts), next_step="wait"
            )
    return counts


def _check_numbers(parts: tuple[str, ...], counts: list[int], first: int, record: int) -> None:
    """Frames are missing at the end of a part that counts up by ones if the next part's number is beyond the next one.

    Numbers begin anew now and then, so a smaller one is no fault, and neither are headers without numbers.
    """

    def number(part: int, frame: int) -> int:
        at = (0 if part else first) + frame * record
        return int.from_bytes(read_exactly(parts[part], at, 4, "a frame header"), "little")

    for i, count in enumerate(counts[:-1]):
        begin, end, after = number(i, 0), number(i, count - 1), number(i + 1, 0)
        if end == begin + count - 1 and after > end + 1:
            frame = sum(counts[: i + 1])
            told = f"it ends with frame number {end}, and the next part begins with {after}"
            raise Incomplete(told, path=parts[i], frame=frame, next_step="copy the parts again")


def _described(path: str, first: int) -> tuple[tuple[Axis, ...], dict[str, Scalar]]:
    head = _HEADER.unpack(read_at(path, 0, _HEADER.size))
    pixel, volts, magnification = head[9:12]
    mode = read_at(path, first + _MODE_AT, 4)
    diffraction = head[1] == 2 and mode == DIFFRACTION.to_bytes(4, "little")
    facts: dict[str, Scalar] = {"high_tension": volts, "binning": head[7]}
    facts["camera_length" if diffraction else "magnification"] = magnification
    unit = "1/nm" if diffraction else "nm"
    axes = tuple(Axis(name=n, scale=float(pixel), unit=unit) for n in IMAGE_AXES) if pixel else ()
    return axes, facts
