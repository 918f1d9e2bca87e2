"""The kernels over blocks on the card: their launches, what they leave there, and what comes back of each block."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpi_kernels.gpu.card import Card
from mpi_kernels.gpu.program import COLUMNS, Program
from mpi_kernels.protocols import Max, Sum, SumSq
from mpi_kernels.terms import Key

WORD = np.dtype(np.uint64)


class Rows:
    """What a block yields for each of its frames, on the card and on its way to the host.

    Parameters
    ----------
    card : Card
    program : Program
    frames : int
        Room.
    """

    def __init__(self, card: Card, program: Program, frames: int) -> None:
        sizes: dict[str | Key, tuple[int, np.dtype]] = {
            k: (len(s.starts) - 1, program.whole) for k, s in program.sorted.items()
        }
        sizes |= {"filled": (1, np.dtype(np.uint8)), "sums": (program.columns, WORD)}
        self._card, self._widths = card, {k: width for k, (width, _) in sizes.items()}
        self.on_card = {k: card.full((max(1, w * frames),), dtype, 0) for k, (w, dtype) in sizes.items()}
        self._host = {k: card.host((max(1, w * frames),), dtype) for k, (w, dtype) in sizes.items()}
        self.row = self.frames = 0
        self._mark: Any = None

    def fetch(self, row: int, n: int) -> None:
        """Begin to copy what the kernels find for ``n`` frames; the first is row ``row`` of the share."""
        for k, width in self._widths.items():
            if width:
                self._card.download(self.on_card[k][: width * n], self._host[k][: width * n])
        self.row, self.frames, self._mark = row, n, self._card.mark()

    def wait(self) -> bool:
        """Wait for what was fetched; whether there is anything that was not seen yet."""
        if self._mark is None:
            return False
        self._card.wait(self._mark)
        self._mark = None
        return True

    def sums(self) -> np.ndarray:
        """(columns, n) words."""
        return self._host["sums"][: self._widths["sums"] * self.frames].reshape(-1, self.frames)

    def regions(self, key: Key) -> np.ndarray:
        """(n, regions) sums."""
        width = self._widths[key]
        return self._host[key][: width * self.frames].reshape(self.frames, width)

    def empty(self) -> int:
        """Frames without any count."""
        return self.frames - int(np.count_nonzero(self._host["filled"][: self.frames]))


class Visitor:
    """The kernels of one program, with their accumulators.

    Parameters
    ----------
    card : Card
    program : Program
    frames : int
        Room of a block, in frames.

    Raises
    ------
    MemoryError
        The card has no room for a block of this size.
    CardError
        The kernels can't be built.
    """

    def __init__(self, card: Card, program: Program, frames: int) -> None:
        self._card, self._program = card, program
        self._built = [card.build(p.options) for p in program.passes]
        self._weights = [
            tuple(card.constant(a if len(a) else np.zeros(1, a.dtype)) for a in (p.integers, p.floats))
            for p in program.passes
        ]
        self._sorted = {k: (card.constant(s.order), card.constant(s.starts)) for k, s in program.sorted.items()}
        self._level = card.constant(np.zeros(1) if program.level is None else np.ascontiguousarray(program.level))
        integer, pixels = program.dtype.kind != "f", program.pixels
        groups = -(-frames // program.group)
        top = np.dtype({"u": np.uint32, "i": np.int32, "f": np.float32}[program.dtype.kind])
        number = WORD if integer else np.dtype(np.float64)
        lowest = np.iinfo(program.dtype).min if integer else -np.inf
        wants = program.wants
        words = 2 if integer else 1

        def room(dtype: np.dtype, size: int, wanted: bool, value: float = 0) -> Any:
            return card.full((size if wanted else 1,), dtype, value)

        self._row_parts = room(WORD, program.tiles * min(COLUMNS, program.columns) * frames, program.columns > 0)
        self._parts = (
            room(number, groups * pixels, Sum in wants),
            room(number, groups * pixels, SumSq in wants),
            room(WORD, groups * pixels, SumSq in wants and program.dtype == np.uint32),
            room(top, groups * pixels, Max in wants),
        )
        self._sum = room(number, pixels, Sum in wants)
        self._squares = room(number, words * pixels, SumSq in wants)
        self._most = room(top, pixels, Max in wants, lowest)
        self._counts = room(WORD, 2, True)

    def visit(self, frames: Any, n: int, rows: Rows) -> None:
        """Begin to reduce ``n`` frames that are on the card, flat; blocks come in the order of their frames."""
        card, program, threads = self._card, self._program, self._program.threads
        pixels, groups = program.pixels, -(-n // program.group)
        card.clear(rows.on_card["filled"])
        for step, built, weights in zip(program.passes, self._built, self._weights, strict=True):
            args = (frames, n, pixels, program.group, *weights, self._level, self._row_parts, *self._parts)
            end = (rows.on_card["filled"], self._counts)
            card.launch(built, "visit", (program.tiles, groups), threads, (*args, *end))
            found = (step.stop - step.start) * n
            if found:
                out = rows.on_card["sums"][step.start * n : step.stop * n]
                args = (self._row_parts, program.tiles, n, out)
                card.launch(built, "finish_rows", (-(-found // threads), 1), threads, args)
            if not step.start and program.wants & {Sum, SumSq, Max}:
                args = (*self._parts, groups, pixels, self._sum, self._squares, self._most)
                card.launch(built, "finish_pixels", (-(-pixels // threads), 1), threads, args)
        for key, (order, starts) in self._sorted.items():
            count = len(program.sorted[key].starts) - 1
            args = (frames, pixels, order, starts, count, rows.on_card[key])
            card.launch(self._built[0], "regions", (n, 1), threads, args)

    def pixels(self) -> dict[type, np.ndarray]:
        """Wait, and return what is known of each pixel by type of term; squares of integers are (2, det_y, det_x)."""
        program, shape = self._program, self._program.shape
        found: dict[type, np.ndarray] = {}
        if Sum in program.wants:
            found[Sum] = self._fetched(self._sum).view(program.whole).reshape(shape)
        if SumSq in program.wants:
            found[SumSq] = self._fetched(self._squares).reshape((2, *shape) if program.dtype.kind != "f" else shape)
        if Max in program.wants:
            found[Max] = self._fetched(self._most).astype(program.dtype).reshape(shape)
        return found

    def counts(self) -> tuple[int, int]:
        """Pixels so far that are not finite, and that are saturated."""
        not_finite, saturated = self._fetched(self._counts).tolist()
        return not_finite, saturated

    def _fetched(self, array: Any) -> np.ndarray:
        host = self._card.host(array.shape, np.dtype(array.dtype))
        self._card.download(array, host)
        self._card.wait(self._card.mark())
        return host.copy()
