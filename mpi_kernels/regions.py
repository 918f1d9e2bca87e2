"""Sums of frames over disjoint regions, at a cost that does not depend on how many regions there are."""

from __future__ import annotations

import numpy as np

from mpi_kernels.errors import RecipeError
from mpi_kernels.protocols import Labels


class Regions:
    """Rows of sums for one `Labels` term.

    Parameters
    ----------
    term : Labels
    whole : dtype
        Of the sums.
    rows : int
        Frames in this rank's share.
    """

    def __init__(self, term: Labels, whole: np.dtype, rows: int) -> None:
        labels = term.labels.reshape(-1)
        counted = np.flatnonzero(labels >= 0)
        # stable: pixels of a region keep their order, so the sums of floats do not depend on the sort
        self._order = counted[np.argsort(labels[counted], kind="stable")]
        self._present, self._starts, sizes = np.unique(labels[self._order], return_index=True, return_counts=True)
        self._most = int(sizes.max()) if len(sizes) else 0
        self._whole = whole
        self.rows = np.zeros((rows, term.regions), whole)

    def add(self, flat: np.ndarray, row: int, top: int | None) -> None:
        """Add frames (n, pixels) from row ``row`` on; ``top`` is their largest magnitude, None for floats."""
        if not len(self._present):
            return
        if top is not None and top * self._most > np.iinfo(self._whole).max:
            raise RecipeError(f"the sum of a region can reach {top * self._most}, more than {self._whole} holds")
        for i, frame in enumerate(flat):
            sums = np.add.reduceat(frame[self._order], self._starts, dtype=self._whole)
            self.rows[row + i, self._present] = sums
