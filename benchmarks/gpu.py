"""Rates on this rank's graphics card: the link to it, its memory, and the fused terms against both.

Streamed frames come through page-locked buffers and are to reach the rate of the link; resident ones are to reach that
of the card's memory.  Without a card it says why.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpi_kernels.contract import Header
from mpi_kernels.fused import Fused
from mpi_kernels.gpu.card import Card, open_card
from mpi_kernels.gpu.fused import BLOCK_BYTES, SLOTS, GpuFused
from mpi_kernels.protocols import Masks, Max, Moments, Sum, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.terms import key

CHUNK_BYTES = 256 << 20
Run = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--det", type=int, default=128, help="side of the detector (default %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="frames on the card (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--dtype", nargs="+", default=["uint8", "uint16", "float32"], help="(default %(default)s)")


def main(args: argparse.Namespace) -> dict[str, object]:
    return figures(det=args.det, gigabytes=args.gigabytes, rounds=args.rounds, dtypes=args.dtype)


def figures(
    *, det: int = 128, gigabytes: float = 4.0, rounds: int = 5, dtypes: list[str] | None = None
) -> dict[str, object]:
    """Rates in GB/s (1e9) and their ratios, medians over the rounds; or why there are none."""
    card, why = open_card()
    if card is None:
        return {"device": None, "why": why}
    link = _rate(rounds, *_uploads(card))
    memory = _rate(rounds, *_copies(card))
    found: dict[str, object] = {
        "device": card.name,
        "why": why,
        "host_to_device": round(link, 2),
        "device_memory": round(memory, 1),
    }
    for dtype in dtypes or ["uint16"]:
        frames = some_frames(det, dtype)
        for name, terms in recipes(det).items():
            streamed = _rate(rounds, *streaming(card, frames, terms))
            resident = _rate(rounds, *residing(card, frames, terms, int(gigabytes * 1e9)))
            found[f"{name}, {dtype}"] = {
                "streamed": round(streamed, 2),
                "of_the_link": round(streamed / link, 3),
                "resident": round(resident, 1),
                "of_the_memory": round(resident / memory, 3),
            }
    return found


def _rate(rounds: int, run: Run, size: int) -> float:
    """Median of GB/s, after one round that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[1:]) / 1e9


def some_frames(det: int, dtype: str) -> np.ndarray:
    """About one block of frames, (n, det, det)."""
    size = det * det * np.dtype(dtype).itemsize
    n = max(64, BLOCK_BYTES // size // 64 * 64)
    return np.random.default_rng(1).poisson(0.8, (n, det, det)).astype(dtype)


def recipes(det: int) -> dict[str, tuple[Term, ...]]:
    y, x = np.indices((det, det)) - (det - 1) / 2
    radius = np.hypot(y, x)
    masks = np.stack([radius < det / 8, (radius >= det / 8) & (radius < det / 4), radius >= det / 4])
    return {
        "sum": (Sum(),),
        "one mask": (Masks(masks[:1]),),
        "fused": (Sum(), Max(), Masks(masks), Moments()),
    }


def _uploads(card: Card) -> tuple[Run, int]:
    host = card.host((BLOCK_BYTES,), np.dtype(np.uint8))
    host[...] = 1
    target = card.full((BLOCK_BYTES,), np.dtype(np.uint8), 0)

    def run() -> None:
        for _ in range(CHUNK_BYTES // BLOCK_BYTES):
            card.upload(host, target)
        card.wait(card.mark())

    return run, CHUNK_BYTES


def _copies(card: Card) -> tuple[Run, int]:
    """Of the card's memory to itself, which reads and writes every byte."""
    import cupy

    source, target = (card.full((CHUNK_BYTES // 8,), np.dtype(np.uint64), 1) for _ in range(2))
    card.wait(card.mark())

    def run() -> None:
        cupy.copyto(target, source)
        cupy.cuda.Device().synchronize()

    return run, 2 * CHUNK_BYTES


def streaming(card: Card, frames: np.ndarray, terms: tuple[Term, ...], blocks: int = 16) -> tuple[Run, int]:
    """Blocks from buffers that are full already: the link and the kernels alone."""
    n = len(frames)
    fused = GpuFused(terms, _header(frames, blocks * n), blocks * n, card, block_bytes=frames.nbytes)
    for _ in range(SLOTS):  # its buffers, each of which stays as it is
        fused.buffer()[...] = frames
        fused.submit(n, 0)
    _check(fused, frames, SLOTS, terms)

    def run() -> None:
        for i in range(blocks):
            fused.buffer()
            fused.submit(n, i * n)
        card.wait(card.mark())

    return run, blocks * frames.nbytes


def residing(card: Card, frames: np.ndarray, terms: tuple[Term, ...], size: int) -> tuple[Run, int]:
    """About ``size`` bytes of frames on the card."""
    flat = np.concatenate([frames] * max(1, CHUNK_BYTES // frames.nbytes)).reshape(-1)
    pixels = frames[0].size
    n = len(flat) // pixels
    chunks: list[Any] = [card.constant(flat) for _ in range(max(1, size // flat.nbytes))]
    header = _header(frames, n * len(chunks))
    fused = GpuFused(terms, header, header.frames, card, block_bytes=flat.nbytes, staged=False)
    fused.visit(chunks[0], n, 0)
    _check(fused, flat.reshape(n, *frames.shape[1:]), 1, terms)

    def run() -> None:
        for i, chunk in enumerate(chunks):
            fused.visit(chunk, n, i * n)
        card.wait(card.mark())

    return run, flat.nbytes * len(chunks)


def _header(frames: np.ndarray, n: int) -> Header:
    return Header(
        format="memory",
        kind="stack",
        scan_shape=(n,),
        det_shape=frames.shape[1:],
        dtype=frames.dtype.name,
        members=(),
        rule="exact",
    )


def _check(fused: GpuFused, frames: np.ndarray, times: int, terms: tuple[Term, ...]) -> None:
    """Raise `RuntimeError` unless the card has found what the CPU finds in the frames, summed so many times."""
    if fused.frames != len(frames):
        raise RuntimeError(fused.method)
    cpu = Fused(terms, _header(frames, len(frames)), len(frames))
    cpu.add(frames, 0)
    found, expected = ({**(f.merge(Ranks()) or {}), **f.rows(len(frames))} for f in (fused, cpu))
    for term in terms:
        whole = expected[key(term)] * (times if isinstance(term, Sum) else 1)
        if not np.allclose(found[key(term)], whole, rtol=1e-9 if whole.dtype.kind == "f" else 0, atol=0):
            raise RuntimeError(f"{type(term).__name__}: the card and the CPU differ")
