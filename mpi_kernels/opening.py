"""The source of a job on every rank: rank 0 opens the file, and tells the others where its frames lie."""

from __future__ import annotations

import json
from dataclasses import asdict

from mpi_kernels import jsonfile
from mpi_kernels.agreement import together
from mpi_kernels.contract import Header, JobSpec, Method
from mpi_kernels.errors import FormatError, KernelError
from mpi_kernels.feed import Feed
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.plugins import make_format
from mpi_kernels.protocols import GrowingFormat, Source
from mpi_kernels.ranks import Ranks


def open_source(job: JobSpec, ranks: Ranks) -> Source:
    """Open a job's file; every rank calls it.

    Where a `Layout` says all, only rank 0 parses the file: others walk no headers over a network share, and can't see
    another version of them.  Where it does not, every rank opens the file, and what it finds must be the same.

    Raises
    ------
    FormatError, Incomplete
        What the format says of the file.
    KernelError
        A rank sees another header than rank 0.

    Notes
    -----
    Where it fails on one rank, every rank raises (`agreement.together`).
    """
    source = together(ranks, lambda: None if ranks.rank else _opened(job))
    if source is None:
        told, where = ranks.broadcast(None), ranks.broadcast(None)
        return together(ranks, lambda: _as_told(job, ranks, told, where))
    layout = source.layout
    ranks.broadcast(_encoded(source.header))
    ranks.broadcast(b"" if layout is None else layout.to_bytes())
    try:
        return together(ranks, lambda: source)
    except Exception:
        source.close()
        raise


def _as_told(job: JobSpec, ranks: Ranks, told: bytes, where: bytes) -> Source:
    """The source of a rank that is told the header, and perhaps where the frames lie."""
    if where:
        found = _from_layout(_decoded(told), Layout.from_bytes(where), job.method)
        if found is not None:
            return found
    source = _opened(job)
    if _encoded(source.header) != told:
        theirs = _decoded(told)
        source.close()
        raise KernelError(
            f"rank {ranks.rank} sees {_told(source.header)}, rank 0 sees {_told(theirs)}",
            path=job.source.path,
            next_step="the file changes, or the nodes see different versions of it",
        )
    return source


def _opened(job: JobSpec) -> Source:
    form = make_format(job.source.format)
    if not job.growing:
        return form.open(job.source.path)
    if not isinstance(form, GrowingFormat):
        raise FormatError(
            f"a {type(form).__name__} file can't be read while it grows",
            path=job.source.path,
            next_step="plan the job when the acquisition is complete",
        )
    return form.open_growing(job.source.path)


def _encoded(header: Header) -> bytes:
    """As JSON that knows NaN: a file's metadata may hold one."""
    return json.dumps(asdict(header)).encode("ascii")


def _decoded(data: bytes) -> Header:
    return jsonfile.from_plain(Header, json.loads(data))


def _from_layout(header: Header, layout: Layout, method: Method) -> Source | None:
    """A source without the file's format; None where only the format can undo the compression."""
    if not layout.codec:
        return LayoutSource(header, layout)
    if Feed.can(header, layout) is not None:  # a record is too large for them, or they are not compiled here
        return None
    return Feed(header, layout, reading="auto" if method.reading == "source" else method.reading)


def _told(header: Header) -> str:
    return f"{list(header.scan_shape)} frames of {list(header.det_shape)} {header.dtype}"
