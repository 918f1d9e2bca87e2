"""The fused kernels against the dense oracle: all pixel types, instruction sets, terms, splits and threads."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PIXELS = ("uint8", "uint16", "uint32", "int16", "float32")
SHAPES = ((1, 1), (1, 2), (8, 7), (7, 9), (13, 17), (16, 16), (3, 67), (33, 31), (64, 32), (2, 1100))
EVERY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def pixels(dtype: str, n: int, size: int, flavour: str, rng: np.random.Generator) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        x = (rng.standard_normal((n, size)) * 10.0 ** rng.integers(-3, 6)).astype(kind)
        if flavour == "extreme" and x.size:
            x.reshape(-1)[rng.integers(0, x.size, 4)] = [np.nan, np.inf, -np.inf, np.finfo(kind).max]
        return np.zeros_like(x) if flavour == "empty" else x
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    if flavour == "extreme":
        return rng.choice(np.array([low, high], kind), (n, size))
    if flavour == "full":
        return rng.integers(low, high, (n, size), kind, endpoint=True)
    return np.full((n, size), 0 if flavour == "empty" else high if flavour == "top" else low, kind)


def some_weights(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    k = int(rng.integers(1, 9))
    if kind == "bool":
        return rng.random((k, size)) < rng.random()
    if kind == "float64":
        return np.asarray(rng.standard_normal((k, size)) * (rng.random((k, size)) < 0.7))
    if kind == "whole float64":
        return rng.integers(-3, 4, (k, size)).astype(np.float64)
    info = np.iinfo(kind)
    top = min(info.max, 1 << 17)  # sums of uint32 must stay within 63 bits
    return rng.integers(max(info.min, -top), top, (k, size), kind, endpoint=True)


WEIGHTS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint64", "float64", "whole float64")


def at_byte(x: np.ndarray, offset: int) -> np.ndarray:
    """The same array elsewhere in memory, its pixels at any byte, as the chunks of a file may have them."""
    room = np.empty(x.nbytes + 64, np.uint8)
    start = (offset - room.ctypes.data) % 64
    moved = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


def run(native: ModuleType, terms: Any, kernel: str, threads: int, rng: np.random.Generator) -> dict[str, int]:
    """Add all frames in calls of random length, from any byte of memory, with a flush now and then."""
    dtype = str(terms.x.dtype)
    fused = native.Pass(dtype, terms.shape, len(terms.x), kernel=kernel, **terms.arguments())
    assert fused.kernel == kernel
    row = 0
    while row < len(terms.x):
        n = int(rng.integers(1, len(terms.x) + 1))
        fused.add(at_byte(terms.x[row : row + n], int(rng.integers(0, 64))), row, threads)
        row += n
        if rng.random() < 0.2:
            fused.flush()
    fused.flush()
    return dict(fused.quality())


@given(
    dtype=st.sampled_from(PIXELS),
    shape=st.sampled_from(SHAPES),
    n=st.integers(0, 37),
    flavour=st.sampled_from(("full", "extreme", "empty", "top", "bottom")),
    weights=st.lists(st.sampled_from(WEIGHTS), max_size=3),
    regions=st.lists(st.sampled_from((1, 3, 64, 300)), max_size=2),
    moments=st.lists(st.booleans(), max_size=2),
    levelled=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(EVERY, max_examples=80)
def test_any_terms_equal_the_dense_ones(
    native: ModuleType,
    dense: ModuleType,
    kernel: str,
    dtype: str,
    shape: tuple[int, int],
    n: int,
    flavour: str,
    weights: list[str],
    regions: list[int],
    moments: list[bool],
    levelled: bool,
    threads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    terms = dense.Terms(
        pixels(dtype, n, size, flavour, rng),
        shape,
        [some_weights(w, size, rng) for w in weights],
        [(rng.integers(-1, r, size).astype(np.int32), r) for r in regions],
        [rng.random(size) < 0.5 if masked else None for masked in moments],
        rng.normal(3, 5, size) if levelled and dtype == "float32" else None,
    )
    terms.check(run(native, terms, kernel, threads, rng))


@pytest.mark.parametrize("dtype", PIXELS)
def test_frames_of_several_segments(native: ModuleType, dense: ModuleType, kernel: str, dtype: str) -> None:
    rng = np.random.default_rng(7)
    shape, n = (211, 307), 5
    size = shape[0] * shape[1]
    y, x = np.mgrid[: shape[0], : shape[1]]
    radial = (np.hypot(y - 100, x - 150) / 3).astype(np.int32).reshape(-1)
    terms = dense.Terms(
        pixels(dtype, n, size, "full", rng),
        shape,
        [some_weights("bool", size, rng), some_weights("float64", size, rng)[:2], some_weights("int16", size, rng)[:2]],
        [(np.where(radial < 50, radial, -1).astype(np.int32), 50), (np.zeros(size, np.int32), 1)],
        [None],
        rng.normal(3, 5, size) if dtype == "float32" else None,
    )
    terms.check(run(native, terms, kernel, 2, rng))


@pytest.mark.parametrize("dtype", PIXELS)
def test_a_pass_of_the_total_alone_and_of_each_term(
    native: ModuleType, dense: ModuleType, kernel: str, dtype: str
) -> None:
    rng = np.random.default_rng(3)
    shape, n = (9, 21), 19
    x = pixels(dtype, n, 189, "full", rng)
    terms = dense.Terms(
        x, shape, [some_weights("bool", 189, rng)], [(rng.integers(-1, 5, 189).astype(np.int32), 5)], [None]
    )
    qualities = []
    for name, value in terms.arguments().items():
        only = native.Pass(dtype, shape, n, kernel=kernel, **{name: value})
        only.add(x, 0)
        only.flush()
        qualities.append(only.quality())
    nothing = native.Pass(dtype, shape, n, kernel=kernel)
    nothing.add(x, 0)
    terms.check(nothing.quality())
    assert all(q == nothing.quality() for q in qualities)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_many_columns(native: ModuleType, dense: ModuleType, kernel: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    shape = (24, 24)
    weights = rng.integers(-(2**31), 2**31, (70, 576), np.int64)
    terms = dense.Terms(pixels(dtype, 9, 576, "full", rng), shape, [weights, rng.standard_normal((30, 576))])
    terms.check(run(native, terms, kernel, 1, rng))


@pytest.mark.parametrize("levelled", [False, True])
def test_floats_do_not_depend_on_calls_or_threads(
    native: ModuleType, dense: ModuleType, kernel: str, levelled: bool
) -> None:
    rng = np.random.default_rng(11)
    shape, n = (17, 19), 3000
    x = (rng.standard_normal((n, 323)) * 1e5).astype(np.float32)
    weights = rng.standard_normal((3, 323))
    labels = rng.integers(-1, 9, 323).astype(np.int32)
    found = []
    for threads, step in ((1, n), (2, n), (3, 700), (1, 37)):
        terms = dense.Terms(x, shape, [weights], [(labels, 9)], [None], weights[0] * 9 if levelled else None)
        fused = native.Pass("float32", shape, n, kernel=kernel, **terms.arguments())
        for row in range(0, n, step):
            fused.add(x[row : row + step], row, threads)
        fused.flush()
        found.append([*terms.mask_rows, *terms.label_rows, *terms.moment_rows, terms.sum.sum(0), terms.squares.sum(0)])
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 16), (211, 307)])
@pytest.mark.parametrize(("threads", "step"), [(1, 300), (2, 37), (3, 300)])
def test_a_level_keeps_the_digits_of_what_varies_on_a_pedestal(
    native: ModuleType, kernel: str, shape: tuple[int, int], threads: int, step: int
) -> None:
    rng = np.random.default_rng(8)
    size = shape[0] * shape[1]
    n = 300 if size < 1000 else 20
    x = rng.normal(1e6, 1.0, (n, size)).astype(np.float32)
    level = np.median(x[:3].astype(np.float64), axis=0)
    total, squares = np.zeros((2, size)), np.zeros((2, size))
    fused = native.Pass("float32", shape, n, kernel=kernel, sum=total, squares=squares, level=level)
    level[...] = 0.0  # the pass has its own
    for row in range(0, n, step):
        fused.add(x[row : row + step], row, threads)
    fused.flush()
    exact = x.astype(np.longdouble)
    found = squares.sum(axis=0) / n - (total.sum(axis=0) / n - np.median(x[:3].astype(np.float64), axis=0)) ** 2
    np.testing.assert_allclose(found, exact.var(axis=0).astype(float), rtol=1e-8)


def test_groups_depend_on_the_frame_alone(native: ModuleType) -> None:
    groups = [{native.Pass("float32", (64, 64), 9, kernel=k).group for k in native.kernels()}]
    groups += [{native.Pass("uint16", (128, 64), rows).group for rows in (0, 1, 10**6)}]
    assert groups[0] == groups[1]
    assert len(groups[0]) == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_pixels_at_any_byte_under_the_sanitizers(sanitized: Callable[[str, str, str], Path]) -> None:
    program = sanitized("any_byte.c", "kernels*.c", "-O1")  # more takes minutes to compile
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    assert int(done.stdout) >= 5 * 64
