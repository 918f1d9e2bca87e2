"""Which format knows a file: suffix first, then every format; what the formats say decides."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats.access import size_of
from mpi_kernels.protocols import Format


def choose(path: str, formats: Mapping[str, Format]) -> tuple[str, Header]:
    """Name of the format that knows the file, and its header.

    Formats whose suffix the file has are asked; if it has nobody's suffix, all are.

    Parameters
    ----------
    path : str
        The main file of an acquisition, or the folder that is one (Zarr, a series of TIFF files).
    formats : mapping of str to Format
        Formats by name, asked in this order.

    Raises
    ------
    Incomplete
        Empty, or a format knows the file and the writer is not done.  Wins over all refusals.
    FormatError
        A format knows the file, and it will never be valid; or it is a folder, a broken link, can't be read.
    NotThisFormat
        No format knows it; the text names all formats and their suffixes.
    """
    folder = os.path.isdir(path)  # noqa: PTH112 - a str path keeps names that are not UTF-8 as they are
    if not folder:
        size_of(path)
    lower = path.lower()
    asked = {n: f for n, f in formats.items() if any(lower.endswith(s) for s in f.suffixes)} or formats
    later: Incomplete | None = None
    never: FormatError | None = None
    for name, candidate in asked.items():
        if folder and not getattr(candidate, "folders", False):
            continue
        try:
            return name, candidate.probe(path)
        except Incomplete as error:
            later = later or error
        except NotThisFormat:
            continue
        except FormatError as error:
            never = never or error
    if later is not None:
        raise later
    if never is not None:
        raise never
    if folder:
        size_of(path)  # says that it is one
    known = "; ".join(f"{n} ({', '.join(f.suffixes)})" for n, f in formats.items())
    raise NotThisFormat("no format knows this file", path=path, next_step=f"known formats: {known}")
