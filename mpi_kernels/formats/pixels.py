"""Pixel types and shapes as files state them, and as sources deliver them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from mpi_kernels.contract import Axis, Kind
from mpi_kernels.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TYPE = re.compile(r"[<>=|]?([biuf])([1248])")
_SUPPORTED = {("b", 1), *((k, n) for k in "iu" for n in (1, 2, 4, 8)), *(("f", n) for n in (2, 4, 8))}

IMAGE_AXES = ("det_y", "det_x")
SCAN_AXES = ("scan_y", "scan_x")


def stored_dtype(text: object, path: str) -> np.dtype:
    """The numpy type that a header names, such as ``"<u2"``; never objects, text, complex or records.

    Raises
    ------
    FormatError
        The type is none of bool, 8 to 64 bit integers, 16 to 64 bit floats.
    """
    found = _TYPE.fullmatch(text) if isinstance(text, str) else None
    if found is None or (found[1], int(found[2])) not in _SUPPORTED:
        raise FormatError(
            f"pixels of type {text!r:.80} are not counts",
            path=path,
            next_step="emflow reads bool, integers of 8 to 64 bits and floats of 16 to 64 bits",
        )
    return np.dtype(found[0])


def delivered_dtype(stored: np.dtype) -> np.dtype:
    """What a source hands on: native byte order; bool as uint8 and float16 as float32, both without loss."""
    if stored.kind == "b":
        return np.dtype(np.uint8)
    if stored == np.dtype(np.float16).newbyteorder(stored.byteorder):
        return np.dtype(np.float32)
    return stored.newbyteorder("=")


def split_shape(shape: Sequence[int], path: str) -> tuple[Kind, tuple[int, ...], tuple[int, int]]:
    """Kind, scan shape and detector shape of an array in the order scan before detector, y before x.

    More than four axes are accepted when the extra ones have length 1 (the colour axis of FPD files).
    """
    axes = [int(n) for n in shape]
    while len(axes) > 4 and 1 in axes[:-2]:
        del axes[len(axes) - 3 - axes[:-2][::-1].index(1)]
    if not 2 <= len(axes) <= 4 or min(axes) < 1:
        raise FormatError(
            f"an array of shape {tuple(shape)} is no image, stack or 4D scan",
            path=path,
            next_step="arrays have 2 axes (image), 3 (stack) or 4 (scan), none of them empty",
        )
    scan = tuple(axes[:-2])
    return kind_of(scan), scan, (axes[-2], axes[-1])


def kind_of(scan_shape: tuple[int, ...]) -> Kind:
    """``image``, ``stack`` or ``4d`` by the number of scan axes."""
    kinds: tuple[Kind, ...] = ("image", "stack", "4d")
    return kinds[len(scan_shape)]


def axis_names(scan_shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, str]]:
    """Names of the scan's and the detector's axes."""
    scan: tuple[tuple[str, ...], ...] = ((), ("frame",), SCAN_AXES)
    return scan[len(scan_shape)], IMAGE_AXES


def axes(
    scan_shape: tuple[int, ...], calibrations: Sequence[tuple[float, float, str]]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Scan and detector axes from ``(scale, offset, unit)`` of each; empty if any of them is not usable."""
    scan, detector = axis_names(scan_shape)
    names = (*scan, *detector)
    if len(calibrations) != len(names):
        return (), ()
    if not all(np.isfinite(s) and np.isfinite(o) and s != 0 for s, o, _ in calibrations):
        return (), ()
    made = tuple(
        Axis(name=n, scale=float(s), offset=float(o), unit=u or "px")
        for n, (s, o, u) in zip(names, calibrations, strict=True)
    )
    return made[: len(scan)], made[len(scan) :]
