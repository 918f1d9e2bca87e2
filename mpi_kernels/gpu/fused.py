"""All terms of a recipe in one visit of each frame, on a graphics card; the interface of `mpi_kernels.fused.Fused`.

Frames go through page-locked buffers, so that one is filled, one is on its way and one is reduced at the same time.
Everything is allocated before the first frame: a card that has too little memory gets smaller blocks, and one that has
none at all leaves the work to the CPU, with the reason.  Results do not depend on the size of a block: integers are
exact, and floats are added in groups of frames that the size of a frame alone decides.  The bounds of
`mpi_kernels.fused` hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.fused import Quality
from mpi_kernels.gpu.card import Card, CardError
from mpi_kernels.gpu.program import Program, Unsuited
from mpi_kernels.gpu.visit import Rows, Visitor
from mpi_kernels.merging import over_frames
from mpi_kernels.protocols import Labels, Masks, Moments, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key, unique

BLOCK_BYTES = 64 << 20
"""A copy of this size takes about a millisecond on PCIe 5: long against what it costs to begin one."""

SLOTS = 3
"""One is filled, one is on its way, one is reduced."""

MOST_GROUPS = 65535
"""Largest second dimension of a grid (CUDA C++ Programming Guide, compute capabilities)."""


class GpuFused:
    """Accumulators of one rank on a card.

    Parameters
    ----------
    wanted : iterable of Term
        Equal ones are computed once.
    header : Header
        Oriented.
    rows : int
        Frames in this rank's share.
    card : Card
    align : int
        Frames per chunk of the file; blocks hold whole ones where they fit.
    block_bytes : int
        Of a buffer at most, unless one group of frames is larger.
    slots : int
        Blocks that are under way at a time.
    staged : bool
        False: the frames are on the card already (`visit`), and there are no buffers to fill.

    Attributes
    ----------
    frames : int
        Of a block.
    method : str
        What computes and how, for the provenance.

    Raises
    ------
    MemoryError
        Not even one group of frames has room.
    Unsuited
        The kernels can't do this exactly.
    CardError
        The card refuses.
    """

    in_file_order: ClassVar[bool] = False
    kernel = "cuda"

    def __init__(
        self,
        wanted: Iterable[Term],
        header: Header,
        rows: int,
        card: Card,
        *,
        align: int = 1,
        block_bytes: int = BLOCK_BYTES,
        slots: int = SLOTS,
        staged: bool = True,
    ) -> None:
        self.terms = unique(wanted)
        self.dtype = np.dtype(header.dtype)
        self.quality = Quality()
        self._card = card
        self._program = Program(self.terms, header, card.threads)
        self._sums = np.zeros((self._program.columns, rows), np.uint64)
        self._regions = {
            k: np.zeros((rows, t.regions), self._program.whole) for k, t in self.terms.items() if isinstance(t, Labels)
        }
        self.group = self._program.group
        self.frames = first = self._block(rows, align, block_bytes)
        while (made := self._allocated(slots, staged)) is None:
            card.trim()
            if self.frames == self._program.group:
                raise MemoryError(f"{card.name}: no room for {self.frames} frames")
            self.frames = max(self._program.group, self.frames // 2 // self._program.group * self._program.group)
        self._visitor, self._slots = made
        card.wait(card.mark())  # the other stream may use what this one has filled
        smaller = f" instead of {first}: out of memory" if self.frames < first else ""
        self.method = f"{card.name}, blocks of {self.frames} frames{smaller}"
        self._next = self._held = self._row = 0

    def _block(self, rows: int, align: int, block_bytes: int) -> int:
        group = self._program.group
        fit = min(block_bytes // (self._program.pixels * self.dtype.itemsize), -(-rows // group) * group)
        unit = math.lcm(group, align)
        unit = unit if unit <= fit else group
        return min(max(group, fit // unit * unit), MOST_GROUPS * group)

    def _allocated(self, slots: int, staged: bool) -> tuple[Visitor, list[_Slot]] | None:
        """Everything for blocks of ``frames``; None where there is no room."""
        try:
            made = [_Slot(self._card, self._program, self.frames, staged) for _ in range(slots)]
            return Visitor(self._card, self._program, self.frames), made
        except MemoryError:
            return None

    def buffer(self) -> np.ndarray:
        """Page-locked (frames, det_y, det_x) for the next block; to be filled, and then `submit`-ted or added."""
        self._flush()
        return self._free()

    def _free(self) -> np.ndarray:
        """The buffer that is filled next, once its last block is done with."""
        slot = self._slots[self._next]
        self._collect(slot)
        assert slot.host is not None
        return slot.host

    def submit(self, n: int, row: int) -> None:
        """Send the first ``n`` frames of `buffer` on their way; the first one is row ``row`` of this rank's share."""
        slot = self._slots[self._next]
        assert slot.host is not None
        assert slot.frames is not None
        self._card.upload(slot.host[:n].reshape(-1), slot.frames[: n * self._program.pixels])
        self._begin(slot, slot.frames, n, row)

    def visit(self, frames: Any, n: int, row: int) -> None:
        """Reduce ``n`` frames, at most a block, that are on the card, flat."""
        self._flush()
        slot = self._slots[self._next]
        self._collect(slot)
        self._begin(slot, frames, n, row)

    def _begin(self, slot: _Slot, frames: Any, n: int, row: int) -> None:
        self._visitor.visit(frames, n, slot.rows)
        slot.rows.fetch(row, n)
        self.quality.pixels += n * self._program.pixels
        self._next = (self._next + 1) % len(self._slots)

    def _collect(self, slot: _Slot) -> None:
        """Take over what the slot's last block has yielded."""
        rows = slot.rows
        if not rows.wait():
            return
        at = slice(rows.row, rows.row + rows.frames)
        if self._program.columns:
            self._sums[:, at] = rows.sums()
        for key, array in self._regions.items():
            array[at] = rows.regions(key)
        self.quality.empty_frames += rows.empty()

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add (n, det_y, det_x) oriented frames; the first one is row ``row`` of this rank's share."""
        if self._held and row != self._row + self._held:
            self._flush()
        if not self._held and frames.ctypes.data == self._free().ctypes.data:  # filled where it is wanted
            self.submit(len(frames), row)
            return
        while len(frames):
            host = self._free()
            if not self._held:
                self._row = row
            n = min(len(frames), self.frames - self._held)
            host[self._held : self._held + n] = frames[:n]
            self._held += n
            frames, row = frames[n:], row + n
            if self._held == self.frames:
                self._flush()

    def _flush(self) -> None:
        if self._held:
            self.submit(self._held, self._row)
            self._held = 0

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Arrays per pixel by term on rank 0, None elsewhere; more frames may be added afterwards."""
        self._finish()
        self.quality.not_finite, self.quality.saturated = self._visitor.counts()
        pixels = self._visitor.pixels()
        return over_frames(ranks, self.terms, lambda key: pixels[type(self.terms[key])])

    def rows(self, used: int) -> dict[Key, np.ndarray]:
        """Sums of this rank's first ``used`` frames, by term."""
        self._finish()
        found = {k: regions[:used] for k, regions in self._regions.items()}
        for key, term in self.terms.items():
            if isinstance(term, Masks | Moments):
                sums = self._sums[self._program.at[key], :used].view(self._program.dtypes[key])
                found[key] = np.ascontiguousarray(sums.T)
        return found

    def _finish(self) -> None:
        """Wait for all blocks under way."""
        self._flush()
        for slot in self._slots:
            self._collect(slot)


def attempt(
    wanted: Iterable[Term], header: Header, rows: int, card: Card | None, why: str, **how: Any
) -> GpuFused | str:
    """Accumulators on a card, or why there are none: the CPU does it then.

    Parameters
    ----------
    wanted, header, rows, **how
        As `GpuFused` takes them.
    card : Card or None
    why : str
        What is returned where there is no card, as `mpi_kernels.gpu.card.open_card` says it.
    """
    if card is None:
        return why
    try:
        return GpuFused(wanted, header, rows, card, **how)
    except (Unsuited, CardError, MemoryError) as error:
        return str(error)


class _Slot:
    """One block under way."""

    def __init__(self, card: Card, program: Program, frames: int, staged: bool) -> None:
        self.host = card.host((frames, *program.shape), program.dtype) if staged else None
        self.frames = card.full((frames * program.pixels,), program.dtype, 0) if staged else None
        self.rows = Rows(card, program, frames)
