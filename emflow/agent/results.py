"""A result as a policy sees it: read once, checked, and from memory from then on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emflow.agent.records import Seen
from emflow.errors import EmflowError, printable
from mpi_kernels.contract import Axis, Quality, Scalar

if TYPE_CHECKING:
    import numpy as np

LARGEST = 4 << 30
"""Bytes of a result file that the agent takes into memory; a map of a scan is some MB."""


class ResultError(EmflowError):
    """A result file is gone, was changed, or is none."""


class LoadedResult:
    """A result file in memory; what was checked is what is read.

    Parameters
    ----------
    seen : Seen
        The facts of the log.
    data : bytes
        The result file.

    Raises
    ------
    ResultError
        It is no HDF5 file.
    """

    def __init__(self, seen: Seen, data: bytes) -> None:
        import h5py

        self._seen = seen
        try:
            self._file: Any = h5py.File(io.BytesIO(data), "r")
        except OSError as error:
            raise ResultError(f"{seen.path}: no result file: {printable(str(error))}") from error

    @property
    def job(self) -> str:
        """Name of the job."""
        return self._seen.job

    @property
    def coverage(self) -> float:
        """Share of the scan that it covers, 0 to 1."""
        return self._seen.coverage

    @property
    def quality(self) -> Quality:
        """The kernels' own verdict."""
        return self._seen.quality

    @property
    def settings(self) -> Mapping[str, float]:
        """All controls of the microscope when the scan was made."""
        return dict(self._seen.settings)

    @property
    def scalars(self) -> Mapping[str, Mapping[str, Scalar]]:
        """``{reduction: {name: value}}``."""
        return self._seen.scalars

    def array(self, name: str) -> np.ndarray:
        """The map ``<reduction>/<output>``; KeyError names what there is."""
        array: np.ndarray = self._group(name)["data"][()]
        return array

    def axes(self, name: str) -> tuple[Axis, ...]:
        """Calibration of a map, one axis per dimension.

        The positions of ``dim<i>`` are always two at least, so that a step can be read from them.
        """
        group = self._group(name)
        found = []
        for i in range(group["data"].ndim):
            positions = group[f"dim{i}"]
            first, second = (float(p) for p in positions[:2])
            label = positions.attrs
            found.append(Axis(name=str(label["name"]), scale=second - first, offset=first, unit=str(label["units"])))
        return tuple(found)

    def close(self) -> None:
        """Give the memory back."""
        self._file.close()

    def _group(self, name: str) -> Any:
        plain = name.strip("/")
        if f"/{plain}" not in self._seen.outputs:
            there = ", ".join(output.strip("/") for output in self._seen.outputs)
            raise KeyError(f"no map {name!r} in this result; there are: {there}")
        return self._file[f"entry/{plain}"]


def read_once(path: Path) -> tuple[bytes, str]:
    """A result file's bytes and their SHA-256.

    Raises
    ------
    ResultError
        It is not there, or too large.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ResultError(f"{printable(str(path))}: {size} bytes are too many for a result")
        data = path.read_bytes()
    except OSError as error:
        raise ResultError(f"{printable(str(path))}: {error.strerror}") from error
    return data, hashlib.sha256(data).hexdigest()


def reload(root: Path, seen: Seen) -> LoadedResult:
    """The result that a log names, below the folder of runs.

    Raises
    ------
    ResultError
        It is gone, or no longer the one that was decided on.
    """
    data, digest = read_once(root / seen.path)
    if digest != seen.result_sha256:
        raise ResultError(
            f"{printable(str(root / seen.path))}: changed since it was decided on "
            f"(SHA-256 {digest[:12]}…, the log says {seen.result_sha256[:12]}…)"
        )
    return LoadedResult(seen, data)
