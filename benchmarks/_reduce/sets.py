"""Sets of frames whose sums are known, and the containers they are written in.

A set repeats groups of 32 frames in a random order: its sums follow from those of the groups, by numpy, while a frame
that is read twice or from the wrong place changes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._reduce import recipes
from benchmarks._reduce.checks import Check, digest

GROUP = 32
WRITE_BYTES = 8 << 20

COUNTS = {"A": 13_000, "C": 13_000, "D": 13_000, "S": 200}
"""Counts of a frame: A has some 78 % of zeros, as a pixel detector's frames do; S is what events are counted from."""

DTYPES = {"A": "uint16", "C": "float32", "D": "uint8", "S": "uint16"}
DETECTORS = {"A": (128, 128), "C": (130, 128), "D": (128, 128), "S": (128, 128)}


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A set of frames.

    Attributes
    ----------
    groups : ndarray
        (g, 32, det_y, det_x), the frames that are repeated.
    order : ndarray of int
        Which group comes at each place.
    """

    name: str
    groups: np.ndarray
    order: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Scan rows and columns, detector rows and columns."""
        frames = len(self.order) * GROUP
        columns = max(GROUP, 1 << int(math.log2(math.sqrt(frames))))
        return frames // columns, columns, *self.groups.shape[2:]

    @property
    def nbytes(self) -> int:
        """Of all frames, uncompressed."""
        return math.prod(self.shape) * self.groups.itemsize

    def pieces(self) -> Iterator[np.ndarray]:
        """All frames in order, group by group."""
        return (self.groups[g] for g in self.order)


def make(name: str, gigabytes: float) -> Scan:
    """A set of about so many gigabytes (1e9); the same one each time."""
    det, dtype = DETECTORS[name], np.dtype(DTYPES[name])
    frame = math.prod(det) * dtype.itemsize
    columns = max(GROUP, 1 << int(math.log2(math.sqrt(gigabytes * 1e9 / frame))))
    wanted = max(1, round(gigabytes * 1e9 / frame / columns)) * columns // GROUP
    rng = np.random.default_rng(1)
    groups = np.stack([_group(rng, det, COUNTS[name]) for _ in range(min(64, wanted))]).astype(dtype)
    if dtype.kind == "f":
        groups += rng.random(groups.shape, np.float32) / 64  # fractions, as gain correction leaves them
    order = np.concatenate([rng.permutation(len(groups)) for _ in range(-(-wanted // len(groups)))])[:wanted]
    return Scan(name, groups, order)


def _group(rng: np.random.Generator, det: tuple[int, int], counts: float) -> np.ndarray:
    """Poisson counts of a disc that moves, over a faint halo."""
    mean = np.where(recipes.distances(det) <= (det[0] * 0.23) ** 2, 1.0, 0.018)
    mean *= counts / mean.sum()
    frames = rng.poisson(mean, (GROUP, *det))
    for frame, (y, x) in zip(frames, rng.integers(-4, 5, (GROUP, 2)), strict=True):
        frame[...] = np.roll(frame, (y, x), (0, 1))
    return frames


def npy(scan: Scan, path: Path) -> None:
    """Write as .npy, in large pieces as a copying program does: how pages lie in the cache depends on it."""
    each = max(1, WRITE_BYTES // scan.groups[0].nbytes)
    with path.open("wb", buffering=0) as file:
        header = {"descr": scan.groups.dtype.str, "fortran_order": False, "shape": scan.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for at in range(0, len(scan.order), each):
            file.write(scan.groups[scan.order[at : at + each]].data)


def sparse(path: Path, gib: float) -> Path:
    """A .npy file of uint16 zeros that are nowhere on the disk."""
    columns, det = 256, DETECTORS["A"]
    rows = max(1, round(gib * 2**30 / (2 * math.prod(det) * columns)))
    with path.open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (rows, columns, *det)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * rows * columns * math.prod(det))
    return path


def hdf5(scan: Scan, path: Path, *, chunk: int, codec: str = "") -> None:
    """Write as HDF5: dataset ``data`` (4-D), contiguous where ``chunk`` is 0, else in chunks of 1 or 32 frames.

    Each chunk is compressed once and written as often as it occurs.
    """
    import h5py

    rows, columns, *det = scan.shape
    with h5py.File(path, "w", libver="latest") as file:
        if not chunk:
            data = file.create_dataset("data", scan.shape, scan.groups.dtype)
            per_row = columns // GROUP
            for row in range(rows):
                groups = scan.groups[scan.order[row * per_row : (row + 1) * per_row]]
                data[row] = groups.reshape(columns, *det)
            return
        chunks = (1, chunk, *det)
        stored = _stored(scan, chunk, codec)
        data = file.create_dataset("data", scan.shape, scan.groups.dtype, chunks=chunks, **_filters(codec))
        at = 0
        for group in scan.order:
            for payload in stored[group]:
                data.id.write_direct_chunk((at // columns, at % columns, 0, 0), payload)
                at += chunk


def _stored(scan: Scan, chunk: int, codec: str) -> list[list[bytes]]:
    """Bytes of the chunks of each group."""
    import h5py

    per_group = GROUP // chunk
    shape = (len(scan.groups) * GROUP, *scan.groups.shape[2:])
    if not codec:
        return [[g[i * chunk : (i + 1) * chunk].tobytes() for i in range(per_group)] for g in scan.groups]
    with h5py.File("compressed", "w", driver="core", backing_store=False) as file:
        data = file.create_dataset("data", shape, scan.groups.dtype, chunks=(chunk, *shape[1:]), **_filters(codec))
        data[...] = scan.groups.reshape(shape)
        chunks = [data.id.read_direct_chunk((at, 0, 0))[1] for at in range(0, shape[0], chunk)]
    return [chunks[g * per_group : (g + 1) * per_group] for g in range(len(scan.groups))]


def _filters(codec: str) -> dict[str, object]:
    if codec == "bitshuffle-lz4":
        import hdf5plugin

        return dict(hdf5plugin.Bitshuffle())
    return {"compression": "gzip", "compression_opts": 4} if codec == "gzip" else {}


def truth(scan: Scan) -> dict[str, Check]:
    """Digests of what each output of each recipe must be, from numpy sums over the groups that are repeated."""
    det = scan.groups.shape[2:]
    flat = scan.groups.reshape(-1, math.prod(det))
    exact = np.dtype(np.int64) if flat.dtype.kind in "iu" else np.dtype(np.float64)
    times = np.bincount(scan.order, minlength=len(scan.groups))
    y, x = np.indices(det, dtype=np.float64).reshape(2, -1)
    ring = recipes.rings(det).ravel()
    weights = np.stack([*recipes.masks(det).reshape(4, -1), *(ring == k for k in range(recipes.BINS)), y, x])
    sums = flat.astype(np.float64) @ weights.T.astype(np.float64)  # below 2**53, so exact for integers
    rows = sums.reshape(len(scan.groups), GROUP, -1)[scan.order].reshape(*scan.shape[:2], -1)
    pattern = np.einsum("g,gyx->yx", times, scan.groups.sum(axis=1, dtype=exact))
    total = rows[..., 3]
    pixels = np.bincount(ring[ring >= 0], minlength=recipes.BINS)
    found = {
        "sum": pattern,
        "max": scan.groups.reshape(-1, *det).max(axis=0),
        **{f"masks {k}": rows[..., :k].astype(exact) for k in (1, 3, 4)},
        "total": total,
        "com": np.stack([rows[..., -2] / total, rows[..., -1] / total], axis=-1),
        "radial": rows[..., 4 : 4 + recipes.BINS] / pixels,
    }
    return {name: digest(array) for name, array in found.items()}
