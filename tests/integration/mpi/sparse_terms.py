"""Terms of a stempy file from its events, on every rank its share: ``python sparse_terms.py FILE RESULT.npz``."""

from __future__ import annotations

import sys

import numpy as np

from mpi_kernels.formats.stempy import Stempy
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq, Term
from mpi_kernels.ranks import world
from mpi_kernels.sparse import SparseFused, SparseSource


def terms(shape: tuple[int, int]) -> list[Term]:
    """One of each kind."""
    y, x = np.indices(shape)
    return [
        Sum(),
        SumSq(),
        Max(),
        Moments(),
        Masks(np.stack([y > x, y * 3 - x])),
        Labels(((y + x) % 4 - 1).astype(int), 3),
    ]


def main(path: str, result: str) -> None:
    """Reduce a share in blocks of two frames; rank 0 writes what all have, the sums of frames in rank order."""
    ranks = world()
    source = Stempy().open(path)
    assert isinstance(source, SparseSource)
    start, stop = ranks.share(source.header.frames, source.align)
    fused = SparseFused(terms(source.header.det_shape), source.header, stop - start)
    for first in range(start, stop, 2):
        fused.add(source.events(first, min(first + 2, stop)), first - start)
    merged = fused.merge(ranks)
    rows = {key: ranks.gather_rows(sums) for key, sums in fused.rows(stop - start).items()}
    source.close()
    if merged is not None:
        np.savez(result, **{key[0]: array for key, array in {**merged, **rows}.items() if array is not None})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
