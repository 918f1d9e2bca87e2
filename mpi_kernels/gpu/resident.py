"""An acquisition that stays in memory: upload once, ask again.

Masks are tried out by the dozen, and a card reads its own memory some sixty times as fast as the host can send frames.
What does not fit is read from the source again for each recipe.  Where there is no card, the frames stay in the memory
of the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mpi_kernels import engine
from mpi_kernels.contract import Header, Kind, Method, Orientation, Recipe
from mpi_kernels.errors import RecipeError
from mpi_kernels.fused import Quality
from mpi_kernels.gpu.card import Card, CardError, open_card
from mpi_kernels.gpu.fused import BLOCK_BYTES, GpuFused, attempt
from mpi_kernels.gpu.program import PIXEL_OPTIONS, group_frames
from mpi_kernels.method import Chosen, choose
from mpi_kernels.plan import Plan, make, oriented, oriented_header
from mpi_kernels.protocols import Source, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import Key

CHUNK_BYTES = 256 << 20
"""Memory is taken in pieces of this size, until there is no more; a launch of the kernels visits one of them."""

HOST_BLOCK_BYTES = 4 << 20
"""Of a block that the CPU reduces; it stays in cache."""

UNTURNED = Orientation()
KINDS: dict[int, Kind] = {2: "image", 3: "stack", 4: "4d"}


class Resident:
    """Frames of one rank's share in the memory of its card, or of the host.

    Parameters
    ----------
    source : Source or ndarray
        An opened acquisition, which stays open (what does not fit is read again), or (det_y, det_x), (n, det_y, det_x)
        or (scan_y, scan_x, det_y, det_x) frames.
    orientation : Orientation
        How the frames are turned, once; every recipe must ask for the same.
    ranks : Ranks, optional
        Every rank holds its share; all of them call ``reduce``.
    card : (Card or None, str), optional
        Where to, and why, as `open_card` returns it; None for what this machine has.
    chunk_bytes : int
        Of one piece of the card's memory.

    Attributes
    ----------
    header : Header
        Oriented.
    held : int
        Frames of the share that stay in memory.
    method : str
        Where they are and why, for the provenance.
    """

    def __init__(
        self,
        source: Source | np.ndarray,
        *,
        orientation: Orientation = UNTURNED,
        ranks: Ranks | None = None,
        card: tuple[Card | None, str] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._source = _Array(source) if isinstance(source, np.ndarray) else source
        self._orientation = orientation
        self.ranks = ranks or Ranks()
        header = oriented_header(self._source.header, orientation)
        self.header: Header = replace(header, dtype="uint8") if header.dtype == "bool" else header
        self.align = self._source.align
        self.share = self.ranks.share(header.frames, self.align)
        self._dtype, self.pixels = np.dtype(self.header.dtype), math.prod(header.det_shape)
        group = group_frames(self.frame_bytes)
        fit, unit = max(group, chunk_bytes // self.frame_bytes), math.lcm(group, self.align)
        unit = unit if unit <= fit else group
        self.chunk = fit // unit * unit
        self._chunks: list[Any] = []
        first, last = self.share
        self.card, why = self._uploaded(*(card or open_card()))
        if self.card is None:
            everything = np.empty((last - first, *self.header.det_shape), self._dtype)
            self._load(first, last, everything)
            self._chunks, self.chunk = [everything], max(1, last - first)
        self.held = min(last - first, len(self._chunks) * self.chunk)
        where = "in the memory of the host" if self.card is None else f"on {self.card.name}"
        self.method = self._where = f"{self.held} of {last - first} frames {where} ({why})"

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame."""
        return self.pixels * self._dtype.itemsize

    def reduce(self, recipe: Recipe) -> engine.Reduced | None:
        """Compute a recipe; rank 0 gets the result, the others None.

        Raises
        ------
        RecipeError
            It does not fit the frames, or asks for another orientation than they were turned to.
        """
        if recipe.orientation != self._orientation:
            raise RecipeError(f"{recipe.orientation} is asked for, but the frames were turned to {self._orientation}")
        plan = make(replace(recipe, orientation=UNTURNED), self.header)
        view = _View(self, looked_at=not all(s.terms for s in plan.steps))
        block = HOST_BLOCK_BYTES if self.card is None else self.chunk * self.frame_bytes
        return engine.reduce(plan, view, self.ranks, block_bytes=block, choosing=view.choose)

    def on_card(self, wanted: Iterable[Term], header: Header, rows: int) -> GpuFused | None:
        """Accumulators on the card; None where there is none, or where it can't do this."""
        if self.card is None:
            return None
        staged = self.held < rows
        block = BLOCK_BYTES if staged else self.chunk * self.frame_bytes
        made = attempt(wanted, header, rows, self.card, "", align=self.align, block_bytes=block, staged=staged)
        self.method = self._where + (f"; the last recipe on the CPU: {made}" if isinstance(made, str) else "")
        return made if isinstance(made, GpuFused) else None

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Any, int, int]]:
        """Frames in order as ``(memory, start, stop)``; the memory is None where they are only in the source."""
        first = self.share[0]
        while start < stop:
            index, at = divmod(start - first, self.chunk)
            end = min(stop, first + (index + 1) * self.chunk)
            held = self._chunks[index] if 0 <= index < len(self._chunks) else None
            if held is not None:
                step = 1 if self.card is None else self.pixels
                held = held[at * step : (at + end - start) * step]
            yield held, start, end
            start = end

    def frames(self, start: int, stop: int, out: np.ndarray, *, looked_at: bool = True) -> None:
        """Fill ``out`` with frames from wherever they are; unless they are looked at, with those that are not held."""
        for held, a, b in self.pieces(start, stop):
            into = out[a - start : b - start]
            if held is None:
                self._load(a, b, into)
            elif not looked_at:
                continue
            elif self.card is None:
                into[...] = held
            else:
                self.card.download(held, into.reshape(-1))
                self.card.wait(self.card.mark())

    def _load(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out`` with oriented frames of the source."""
        header = self._source.header
        if self._orientation == UNTURNED:
            self._source.frames(start, stop, out.view(header.dtype))
            return
        raw = np.empty((stop - start, *header.det_shape), header.dtype)
        self._source.frames(start, stop, raw)
        out[...] = oriented(raw.view(self._dtype), self._orientation)

    def _uploaded(self, card: Card | None, why: str) -> tuple[Card | None, str]:
        """The card with the frames that fit, or None; and why."""
        if card is None:
            return None, why
        if self.header.dtype not in PIXEL_OPTIONS:
            return None, f"no kernel for pixels of type {self.header.dtype}"
        try:
            self._upload(card)
        except (CardError, MemoryError) as error:
            return None, str(error)
        return (card, why) if self._chunks else (None, f"{card.name} has no room")

    def _upload(self, card: Card) -> None:
        first, last = self.share
        most = min(self.chunk, max(1, BLOCK_BYTES // self.frame_bytes))
        buffers = [card.host((most, *self.header.det_shape), self._dtype) for _ in range(2)]
        marks: list[Any] = [None, None]
        for start in range(first, last, self.chunk):
            try:
                chunk = card.full((self.chunk * self.pixels,), self._dtype, 0)
            except MemoryError:
                self._chunks, chunk = self._chunks[:-1], None  # what the kernels need must have room as well
                card.trim()
                break
            card.wait(card.mark())  # filled: the other stream may write
            stop = min(start + self.chunk, last)
            for turn, at in enumerate(range(start, stop, most)):
                buffer, n, here = buffers[turn % 2], min(most, stop - at), (at - start) * self.pixels
                if marks[turn % 2] is not None:
                    card.wait(marks[turn % 2])
                self._load(at, at + n, buffer[:n])
                card.upload(buffer[:n].reshape(-1), chunk[here : here + n * self.pixels])
                marks[turn % 2] = card.mark()
            self._chunks.append(chunk)
        card.wait(card.mark())


class _View:
    """A resident acquisition as the engine's source, and accumulators that know where its frames are."""

    layout = None

    def __init__(self, resident: Resident, *, looked_at: bool) -> None:
        self._resident, self._looked_at = resident, looked_at
        self.header, self.align = resident.header, resident.align
        self._card: GpuFused | None = None

    def choose(self, plan: Plan, source: Source, ranks: Ranks, rows: int, method: Method) -> Chosen:
        """What the engine uses: the card that holds the frames, on all ranks, or the CPU."""
        wanted = [t for step in plan.steps for t in step.terms.values()]
        card = self._resident.on_card(wanted, plan.header, rows)
        if not ranks.all(card is not None):
            return choose(plan, source, ranks, rows, replace(method, device="cpu"))
        assert card is not None
        self._card, terms = card, _OnCard(self._resident, card)
        facts: dict[str, str | int] = {"device": "gpu", "kernel": card.kernel, "reading": "resident", "threads": 1}
        return Chosen(terms, source, terms, facts=facts | {"card": self._resident.method})

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``; but where only the kernels look, what is on the card stays there."""
        self._resident.frames(start, stop, out, looked_at=self._looked_at or self._card is None)

    def complete(self) -> None:
        """Nothing to ask: the frames were read."""

    def close(self) -> None:
        """Nothing to close: the source belongs to whoever opened it."""


class _OnCard:
    """`GpuFused` that takes from the card what is there, whatever the block in the host's memory holds."""

    in_file_order: ClassVar[bool] = False
    group = 1
    """The shares are those that are held."""

    def __init__(self, resident: Resident, fused: GpuFused) -> None:
        self._resident, self._fused, self.kernel = resident, fused, fused.kernel

    @property
    def quality(self) -> Quality:
        """What the frames so far were like."""
        return self._fused.quality

    def add(self, frames: np.ndarray, row: int) -> None:
        """Add the frames that ``frames`` stands for."""
        resident, first = self._resident, self._resident.share[0] + row
        for held, start, stop in resident.pieces(first, first + len(frames)):
            if held is None:
                self._fused.add(frames[start - first : stop - first], row + start - first)
                continue
            for at in range(start, stop, self._fused.frames):
                n = min(self._fused.frames, stop - at)
                self._fused.visit(held[(at - start) * resident.pixels :], n, row + at - first)

    def merge(self, ranks: Ranks) -> dict[Key, np.ndarray] | None:
        """Merge as `GpuFused.merge` does."""
        return self._fused.merge(ranks)

    def rows(self, used: int) -> Mapping[Key, np.ndarray]:
        """Sums of this rank's first ``used`` frames, by term."""
        return self._fused.rows(used)


class _Array:
    """Frames in memory as a source."""

    align = 1
    layout = None

    def __init__(self, frames: np.ndarray) -> None:
        if frames.ndim not in KINDS:
            raise RecipeError(f"an array of shape {frames.shape} is no image, stack or scan of frames")
        self._frames = frames.reshape(-1, *frames.shape[-2:])
        self.header = Header(
            format="memory",
            kind=KINDS[frames.ndim],
            scan_shape=frames.shape[:-2],
            det_shape=(frames.shape[-2], frames.shape[-1]),
            dtype=frames.dtype.name,
            members=(),
            rule="exact",
        )

    def frames(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill ``out``."""
        out[...] = self._frames[start:stop]

    def complete(self) -> None:
        """Nothing to ask: the array is there."""

    def close(self) -> None:
        """Nothing to close."""
