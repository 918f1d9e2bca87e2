"""The long tail of formats, through rosettasciio where it is installed: the one file that imports it.

rosettasciio is under the GPL; emflow works without it and is not built on it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.access import check_caps, member, read_sidecar, sibling, size_of
from mpi_kernels.formats.pixels import axes, delivered_dtype, kind_of, stored_dtype
from mpi_kernels.formats.plan import check_request
from mpi_kernels.layout import Layout
from mpi_kernels.protocols import Source

_AGAIN = "check the file with HyperSpy, or convert it to .hspy"
_RIPPLE = ("width", "height", "depth", "offset", "data-length", "data-type", "byte-order", "record-by")


class Rsciio:
    """What rosettasciio reads and emflow does not: Lispix's Ripple, .rpl with .raw.

    Frames are taken from the lazy array in pieces of whole frames, which it is asked for; it is never reshaped.
    A file must keep its size while it is read: the reader maps it into memory.  Source: rosettasciio's documentation
    of ``rsciio.ripple``; NIST's Lispix.

    Complete when every key is there and the .raw file has the size that they give; the rule is stability.

    Panta Rhei (.prz) is left out on purpose: the order of its axes stands in a pickle, which is not read, and without
    it frames come out transposed.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".rpl",)

    def probe(self, path: str) -> Header:
        """Let rosettasciio read the header; no pixels are read."""
        return _probe(path)[0]

    def open(self, path: str) -> Source:
        """Open for reading frames; raises what ``probe`` raises."""
        return RsciioSource(*_probe(path))


def _probe(path: str) -> tuple[Header, Any]:
    if not path.lower().endswith(Rsciio.suffixes):
        raise NotThisFormat(f"files that rosettasciio is asked for end in {', '.join(Rsciio.suffixes)}", path=path)
    size_of(path)
    members = (member(path, ".rpl"), member(_check_ripple(path), ".raw"))
    data, described = _lazy(path)
    signal = [a for a in described if not a.get("navigate")]
    if len(signal) != 2 or any(a.get("navigate") for a in described[-2:]) or not 2 <= data.ndim <= 4:
        raise FormatError(
            f"its data are no frames: {data.ndim} axes, {len(signal)} of the detector",
            path=path,
            next_step=_AGAIN,
        )
    stored = stored_dtype(np.dtype(data.dtype).str, path)
    shape = tuple(int(n) for n in data.shape)
    scan_shape, det_shape = shape[:-2], (shape[-2], shape[-1])
    check_caps(path, int(np.prod(scan_shape, dtype=object)), stored.itemsize * det_shape[0] * det_shape[1])
    scan_axes, det_axes = axes(scan_shape, _calibrations(described))
    header = Header(
        format="rsciio",
        kind=kind_of(scan_shape),
        scan_shape=scan_shape,
        det_shape=det_shape,
        dtype=delivered_dtype(stored).name,
        members=members,
        rule="stability",
        scan_axes=scan_axes,
        det_axes=det_axes,
        metadata={"reader": f"rosettasciio {_version()}"},
    )
    return header, data


def _lazy(path: str) -> tuple[Any, Sequence[Mapping[str, Any]]]:
    """The lazy array in chunks of one frame, and its axes."""
    read = _reader(path)
    with _errors(path):
        first = read(path, lazy=True)[0]["data"]
        one = read(path, lazy=True, chunks=(1,) * (first.ndim - 2) + tuple(first.shape[-2:]))[0]
    return one["data"], one["axes"]


def _reader(path: str) -> Callable[..., Any]:
    try:
        from rsciio.ripple import file_reader
    except ImportError as error:
        raise FormatError(
            "Ripple files are read through rosettasciio, which is not installed",
            path=path,
            next_step="pip install 'emflow[formats]'",
        ) from error
    reader: Callable[..., Any] = file_reader
    return reader


def _version() -> str:
    from importlib.metadata import version

    return version("rosettasciio")


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """Whatever a reader of others raises or warns is one of our errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except KernelError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error!s:.200}"
        raise FormatError(f"rosettasciio can't read it: {why}", path=path, next_step=_AGAIN) from error


def _check_ripple(path: str) -> str:
    """The .raw file of a Ripple header that is whole, and has its size."""
    text = read_sidecar(path).decode("latin-1")
    if not text.endswith("\n"):
        raise Incomplete("its last line is not whole", path=path, next_step="wait for the writer")
    said = {}
    for line in text.lower().splitlines():
        name, _, value = line.partition(";")[0].partition("\t")
        said[name.strip()] = value.strip()
    lacking = [key for key in _RIPPLE if key not in said]
    if lacking:
        raise Incomplete(f"it does not say {', '.join(lacking)}", path=path, next_step="wait for the writer")
    numbers = [said[k] for k in _RIPPLE[:5]]
    if not all(n.isdecimal() and len(n) < 13 for n in numbers) or said["record-by"] not in ("image", "dont-care"):
        told = f"sizes {', '.join(numbers)}, record-by {said['record-by']}"
        raise FormatError(f"it is no stack of frames: {told:.160}", path=path, next_step=_AGAIN)
    width, height, depth, offset, item = map(int, numbers)
    raw = sibling(path, ".raw")
    if raw is None:
        raise Incomplete("its .raw file is not there", path=path, next_step="wait for the writer")
    check_caps(path, depth, width * height * item)
    whole, size = max(0, size_of(raw) - offset) // (width * height * item), size_of(raw)
    if whole < depth:
        raise Incomplete(f"{whole} of {depth} frames are there ({size} bytes)", path=raw, frame=whole, next_step="wait")
    return raw


def _calibrations(described: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    found = []
    for axis in described:
        unit = axis.get("units")
        named = isinstance(unit, str) and not unit.startswith("<")
        found.append((float(axis.get("scale", 1.0)), float(axis.get("offset", 0.0)), str(unit)[:64] if named else ""))
    return found


class RsciioSource:
    """Frames of a lazy array, a piece of whole frames at a time.

    Parameters
    ----------
    header : Header
        What the format found.
    data : dask.array.Array
        Of the header's shape, in chunks of whole frames.
    """

    align = 1
    layout: Layout | None = None

    def __init__(self, header: Header, data: Any) -> None:
        self.header = header
        self._data = data

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``, (stop - start, det_y, det_x) in ``header.dtype``; `MissingData` names the frame not there."""
        check_request(self.header, start, stop, out)
        self._check_sizes(start)
        scan_shape, frame = self.header.scan_shape, start
        while frame < stop:
            row = scan_shape[-1] if scan_shape else 1
            end = min(stop, (frame // row + 1) * row)
            at = (slice(frame % row, frame % row + end - frame),) if scan_shape else ()
            try:
                with _errors(self.header.members[0].path):
                    piece = self._data[(frame // row, *at) if len(scan_shape) == 2 else at]
                    out[frame - start : end - start] = piece.compute(scheduler="synchronous")
            except FormatError as error:
                raise self._gone(error.message, frame) from error
            frame = end

    def _check_sizes(self, frame: int) -> None:
        """Reading behind the end of a file that is mapped into memory kills the process, so none may have shrunk."""
        for one in self.header.members:
            try:
                size = os.stat(one.path).st_size  # noqa: PTH116
            except OSError as error:
                raise self._gone(f"{one.suffix} can't be read: {error.strerror}", frame) from error
            if size < one.size:
                raise self._gone(f"{one.suffix} was cut off: it had {one.size} bytes, it has {size}", frame)

    def _gone(self, why: str, frame: int) -> MissingData:
        return MissingData(why, path=self.header.members[0].path, frame=frame, next_step="copy the files again")

    def complete(self) -> None:
        """Raise `MissingData` if a file is shorter than it was."""
        self._check_sizes(0)

    def close(self) -> None:
        """Forget the array, and with it the file; more than once does no harm."""
        self._data = None
