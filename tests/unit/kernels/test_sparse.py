"""Terms from events against the dense pass: equal to the bit for integers, whatever blocks and ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_kernels import sparse
from mpi_kernels.contract import Header, Orientation
from mpi_kernels.errors import RecipeError
from mpi_kernels.fused import Fused
from mpi_kernels.plan import oriented as oriented_frames
from mpi_kernels.plan import oriented_header
from mpi_kernels.protocols import Labels, Masks, Max, Moments, Sum, SumSq, Term
from mpi_kernels.ranks import Ranks
from mpi_kernels.sparse import Events, SparseFused, densify, oriented

SHAPE = (7, 9)


def header(dtype: str = "uint32", frames: int = 20, shape: tuple[int, int] = SHAPE) -> Header:
    return Header(
        format="stempy",
        kind="stack",
        scan_shape=(frames,),
        det_shape=shape,
        dtype=dtype,
        members=(),
        rule="exact",
    )


def events_of(frames: np.ndarray, *, with_counts: bool, shuffle: int | None = None) -> Events:
    """Events of dense frames: a pixel as often as it counted, or once with its count."""
    lists, counts = [], []
    generator = np.random.default_rng(shuffle)
    for frame in frames.reshape(len(frames), -1):
        pixels = np.flatnonzero(frame)
        one = frame[pixels]
        if not with_counts:
            pixels, one = np.repeat(pixels, one), np.ones(int(one.sum()), np.uint32)
        order = np.arange(len(pixels)) if shuffle is None else generator.permutation(len(pixels))
        lists.append(pixels[order])
        counts.append(one[order])
    bounds = np.concatenate(([0], np.cumsum([len(x) for x in lists])))
    joined = np.concatenate(counts).astype(np.uint32) if with_counts else None
    return Events(np.concatenate(lists).astype(np.int64), joined, bounds.astype(np.int64))


def some_terms(shape: tuple[int, int] = SHAPE) -> list[Term]:
    generator = np.random.default_rng(3)
    labels = generator.integers(-1, 5, shape).astype(np.int32)
    mask = generator.integers(0, 2, shape).astype(bool)
    return [
        Sum(),
        SumSq(),
        Max(),
        Masks(generator.integers(0, 2, (3, *shape)).astype(bool)),
        Masks(generator.integers(-5, 9, (2, *shape))),
        Masks(generator.integers(0, 200, (1, *shape)).astype(np.uint8)),
        Labels(labels, 6),
        Moments(),
        Moments(mask),
    ]


def counted(density: float, top: int, frames: int = 20, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    generator = np.random.default_rng(int(density * 100) + top)
    found = generator.integers(1, top + 1, (frames, *shape)) * (generator.random((frames, *shape)) < density)
    found[frames // 2] = 0
    return found.astype(np.uint32)


def merged(terms: list[Term], about: Header, frames: np.ndarray, cuts: list[int], events: Events | None) -> dict:
    fused = Fused(terms, about, len(frames)) if events is None else SparseFused(terms, about, len(frames))
    for a, b in itertools.pairwise(cuts):
        if isinstance(fused, Fused):
            fused.add(frames[a:b], a)
        else:
            assert events is not None
            first, last = events.bounds[a], events.bounds[b]
            counts = None if events.counts is None else events.counts[first:last]
            fused.add(Events(events.indices[first:last], counts, events.bounds[a : b + 1] - first), a)
    found = fused.merge(Ranks())
    assert found is not None
    found |= fused.rows(len(frames))
    assert found is not None
    return {"quality": fused.quality, **found}


@settings(max_examples=40, deadline=None)
@given(
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    top=st.sampled_from([1, 2, 9]),
    with_counts=st.booleans(),
    shuffle=st.one_of(st.none(), st.integers(0, 9)),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    at_once=st.sampled_from([1, 40, 1 << 20]),
)
def test_every_integer_is_that_of_the_dense_frames(
    density: float, top: int, with_counts: bool, shuffle: int | None, cuts: list[int], at_once: int
) -> None:
    frames, terms = counted(density, top), some_terms()
    bounds = sorted({0, 20, *cuts})
    before, sparse.EVENTS_AT_ONCE = sparse.EVENTS_AT_ONCE, at_once
    try:
        found = merged(terms, header(), frames, bounds, events_of(frames, with_counts=with_counts, shuffle=shuffle))
    finally:
        sparse.EVENTS_AT_ONCE = before
    wanted = merged(terms, header(), frames, bounds, None)
    assert found.keys() == wanted.keys()
    assert found.pop("quality") == wanted.pop("quality")
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=str(key))


def test_float_weights_are_within_the_stated_bound() -> None:
    frames = counted(0.3, 9)
    weights = np.random.default_rng(1).normal(size=(3, *SHAPE))
    term = Masks(weights)
    found = merged([term], header(), frames, [0, 20], events_of(frames, with_counts=True))
    other = merged([term], header(), frames, [0, 3, 20], events_of(frames, with_counts=False, shuffle=3))
    key = next(k for k in found if k != "quality")
    np.testing.assert_array_equal(found[key], other[key])
    for i, frame in enumerate(frames):
        for j, weight in enumerate(weights):
            parts = [Fraction(float(w)) * int(v) for w, v in zip(weight.ravel(), frame.ravel(), strict=True) if v]
            error = abs(Fraction(float(found[key][i, j])) - sum(parts))
            assert error <= len(parts) * Fraction(1, 1 << 52) * sum(abs(p) for p in parts)


@pytest.mark.parametrize("top", [(1 << 20) + 7, (1 << 32) - 1])
def test_counts_beyond_float64_stay_exact(top: int) -> None:
    frames = counted(0.9, 3)
    frames[frames == 2] = top
    terms: list[Term] = [Sum(), SumSq(), Max(), Masks(np.full((1, *SHAPE), 1 << 22)), Labels(np.zeros(SHAPE, int), 1)]
    found = merged(terms, header(), frames, [0, 7, 20], events_of(frames, with_counts=True))
    wide = frames.astype(object)
    by_kind = {key[0]: array for key, array in found.items() if key != "quality"}
    assert (by_kind["Sum"].astype(object) == wide.sum(axis=0)).all()
    squares = by_kind["SumSq"].astype(object)
    assert (squares[0] * (1 << 32) + squares[1] == (wide * wide).sum(axis=0)).all()
    assert (by_kind["SumSq"][1] < 1 << 32).all()
    totals = wide.reshape(20, -1).sum(axis=1)
    assert (by_kind["Masks"][:, 0].astype(object) == totals * (1 << 22)).all()
    assert (by_kind["Labels"][:, 0].astype(object) == totals).all()
    assert found["quality"].saturated == (int((frames == top).sum()) if top == (1 << 32) - 1 else 0)


def test_what_cannot_be_exact_is_refused() -> None:
    frames = counted(0.9, 3)
    frames[:] = (1 << 32) - 1
    events = events_of(frames, with_counts=True)
    with pytest.raises(RecipeError, match="more than int64 holds"):
        merged([Masks(np.full((1, *SHAPE), 1 << 40))], header(), frames, [0, 20], events)
    small = Events(np.zeros(300, np.int64), None, np.array([0, 300]))
    with pytest.raises(RecipeError, match="counted 300, more than uint8"):
        SparseFused([Sum()], header("uint8", 1), 1).add(small, 0)
    with pytest.raises(RecipeError, match="no unsigned integer"):
        SparseFused([Sum()], header("float32"), 20)


@pytest.mark.parametrize("turn", [(t, y, x) for t in (False, True) for y in (False, True) for x in (False, True)])
def test_events_turn_as_frames_do(turn: tuple[bool, bool, bool]) -> None:
    frames, orientation = counted(0.2, 3), Orientation(transpose=turn[0], flip_y=turn[1], flip_x=turn[2])
    events = oriented(events_of(frames, with_counts=False), SHAPE, orientation)
    out = np.empty((20, *oriented_header(header(), orientation).det_shape), np.uint32)
    densify(events, out)
    np.testing.assert_array_equal(out, oriented_frames(frames, orientation))


def test_a_count_that_does_not_fit_is_not_wrapped() -> None:
    with pytest.raises(RecipeError, match="300"):
        densify(Events(np.full(300, 5), None, np.array([0, 300])), np.empty((1, 3, 4), np.uint8))


def test_no_frames_at_all() -> None:
    about = replace(header(), scan_shape=(0,))
    found = merged(
        some_terms(), about, counted(0.1, 1)[:0], [0, 0], Events(np.empty(0, np.int64), None, np.zeros(1, int))
    )
    assert all(np.count_nonzero(a) == 0 for k, a in found.items() if k != "quality")
    densify(Events(np.empty(0, np.int64), None, np.zeros(1, int)), np.empty((0, *SHAPE), np.uint32))
