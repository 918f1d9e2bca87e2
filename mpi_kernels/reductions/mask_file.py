"""Arrays that a recipe names by file: read once, bounded, and known by the digest of their bytes."""

from __future__ import annotations

import functools
import hashlib
import io
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpi_kernels.errors import RecipeError

MOST_BYTES = 1 << 30
"""A larger file is no mask: 16k x 16k pixels of float32."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskFile:
    """What a ``.npy`` file held.

    Attributes
    ----------
    path : str
        Where it was.
    values : ndarray
        Native byte order, read-only.
    sha256 : str
        Of the file's bytes, so that a result says which mask it was made with, whatever is at the path by now.
    """

    path: str
    values: np.ndarray
    sha256: str

    def fitting(self, shape: tuple[int, ...], what: str) -> np.ndarray:
        """The values, if they have this shape; ``what`` has it, as in "the frames"."""
        if self.values.shape != shape:
            verb = "have" if what.endswith("s") else "has"
            raise RecipeError(f"the mask has {self.values.shape}, {what} {verb} {shape}", path=self.path)
        return self.values


def read(path: str) -> MaskFile:
    """Read a ``.npy`` file of bools, integers or floats; the same unchanged file is read once per process.

    Raises
    ------
    RecipeError
        There is no such file, or it is no array of real numbers.
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        raise RecipeError(f"the mask can't be read: {error}", path=path) from error
    return _read(path, found.st_size, found.st_mtime_ns, found.st_ino, stat.S_ISREG(found.st_mode))


@functools.lru_cache(maxsize=8)
def _read(path: str, size: int, _changed_ns: int, _inode: int, regular: bool) -> MaskFile:
    if not regular or size > MOST_BYTES:
        raise RecipeError(f"the mask is no file of at most {MOST_BYTES} bytes", path=path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise RecipeError(f"the mask can't be read: {error}", path=path) from error
    if not isinstance(values, np.ndarray):
        raise RecipeError("the mask is several arrays", path=path, next_step="save one with numpy.save")
    if values.dtype.kind not in "biuf":
        raise RecipeError(f"the mask's weights are {values.dtype}, not numbers", path=path)
    values = values.astype(values.dtype.newbyteorder("="))
    values.flags.writeable = False
    return MaskFile(path, values, hashlib.sha256(data).hexdigest())
