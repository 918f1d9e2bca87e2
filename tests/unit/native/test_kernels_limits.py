"""Where lanes would overflow, buffers lie askew, floats are not finite, or arguments do not fit."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TOP = {"uint8": 255, "uint16": 65535, "uint32": 2**32 - 1, "int16": 32767}


@pytest.mark.parametrize("value", ["top", "bottom", "both in turn"])
@pytest.mark.parametrize("dtype", list(TOP))
def test_more_frames_than_lanes_hold(native: ModuleType, kernel: str, dtype: str, value: str) -> None:
    n = 70_000  # of one value: beyond 2**31 in a lane of 32 bits
    low, high = int(np.iinfo(dtype).min), TOP[dtype]
    x = np.full((n, 3), low if value == "bottom" else high, dtype)
    if value == "both in turn":
        x[::2] = low
    total = np.zeros(3, "int64" if dtype == "int16" else "uint64")
    squares = np.zeros((2, 3), np.uint64)
    fused = native.Pass(dtype, (1, 3), n, kernel=kernel, sum=total, squares=squares)
    fused.add(x, 0)
    fused.flush()
    counts = {"top": (0, n), "bottom": (n, 0), "both in turn": (n // 2, n // 2)}[value]
    assert total.tolist() == [counts[0] * low + counts[1] * high] * 3
    assert int(squares[0, 1]) * 2**32 + int(squares[1, 1]) == counts[0] * low**2 + counts[1] * high**2


@pytest.mark.parametrize("dtype", list(TOP))
@pytest.mark.parametrize("weight", [1, 64, 127, -127, -64, 1000, 4095, -4096])
def test_large_frames_of_the_largest_pixel(native: ModuleType, kernel: str, dtype: str, weight: int) -> None:
    size = 300_001
    x = np.full((5, size), TOP[dtype], dtype)
    masks, labels = np.zeros((5, 1), np.int64), np.zeros((5, 2), "int64" if dtype == "int16" else "uint64")
    where = np.zeros(size, np.int32)
    where[:77] = 1
    terms: dict[str, Any] = {
        "masks": [(np.full((1, size), weight, np.int32), masks)],
        "labels": [(where, 2, labels)],
    }
    fused = native.Pass(dtype, (1, size), 5, kernel=kernel, **terms)
    fused.add(x, 0)
    assert masks[:, 0].tolist() == [TOP[dtype] * weight * size] * 5
    assert labels.tolist() == [[TOP[dtype] * (size - 77), TOP[dtype] * 77]] * 5
    assert fused.quality()["saturated"] == 5 * size


def test_alternating_signs_cancel_exactly(native: ModuleType, kernel: str) -> None:
    size = 65_536
    x = np.tile(np.array([-32768, 32767], np.int16), (6, size // 2))
    weights = np.tile(np.array([[-32768, 32767], [1, 1]], np.int16), (1, size // 2))
    rows, moments = np.zeros((6, 2), np.int64), np.zeros((6, 3), np.int64)
    fused = native.Pass("int16", (256, 256), 6, kernel=kernel, masks=[(weights, rows)], moments=[(None, moments)])
    fused.add(x, 0)
    assert rows.tolist() == [[size // 2 * (32768**2 + 32767**2), -size // 2]] * 6
    assert (
        moments.tolist() == [[-size // 2, -128 * sum(range(256)), 256 * 128 * 32767 + 256 * -sum(range(0, 256, 2))]] * 6
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "float32"])
@pytest.mark.parametrize("offset", [384, 1, 3, 13])
def test_frames_that_lie_askew(native: ModuleType, dense: ModuleType, kernel: str, dtype: str, offset: int) -> None:
    rng = np.random.default_rng(offset)
    item = np.dtype(dtype).itemsize
    buffer = np.zeros(64 + offset * item + 21 * 35 * item, np.uint8)
    start = -buffer.ctypes.data % 64 + offset * item
    x = buffer[start : start + 21 * 35 * item].view(dtype).reshape(21, 35)
    x[...] = rng.integers(0, 100, x.shape)
    terms = dense.Terms(x, (5, 7), [rng.random((3, 35)) < 0.5], [(rng.integers(-1, 4, 35).astype(np.int32), 4)], [None])
    fused = native.Pass(dtype, (5, 7), 21, kernel=kernel, **terms.arguments())
    fused.add(x, 0)
    fused.flush()
    terms.check(fused.quality())


def test_weight_zero_hides_what_is_no_number(native: ModuleType, kernel: str) -> None:
    x = np.ones((3, 4, 5), np.float32)
    x[0, 0, 0], x[1, 0, 3], x[2, 2, 0] = np.nan, np.inf, -np.inf
    weights = np.ones((2, 20))
    weights[0, [0, 3, 10]] = 0.0
    weights[1] = 0.5 * weights[0]
    masks, moments, labels = np.zeros((3, 2)), np.zeros((3, 3)), np.zeros((3, 1))
    pixels = np.where(weights[0] > 0, 0, -1).astype(np.int32)
    high = np.full(20, -np.inf, np.float32)
    fused = native.Pass(
        "float32",
        (4, 5),
        3,
        kernel=kernel,
        max=high,
        masks=[(weights, masks)],
        moments=[(None, moments)],
        labels=[(pixels, 1, labels)],
    )
    fused.add(x, 0)
    fused.flush()
    assert masks.tolist() == [[17.0, 8.5]] * 3
    assert labels.tolist() == [[17.0]] * 3
    assert np.isnan(moments[0, 0])
    assert moments[0, 1:].tolist() == [30.0, 40.0]  # the pixel at 0, 0 has no part in either
    assert moments[1].tolist() == [np.inf, 30.0, np.inf]
    assert moments[2].tolist() == [-np.inf, -np.inf, 40.0]
    np.testing.assert_array_equal(high, x.reshape(3, 20).max(axis=0))
    assert fused.quality() == {"pixels": 60, "not_finite": 3, "saturated": 0, "empty_frames": 0}


def test_float_sums_keep_what_rounding_would_lose(native: ModuleType, kernel: str) -> None:
    n = 100_000
    x = np.full((n, 1), 0.1, np.float32)
    x[0] = 2.0**60
    total = np.zeros((2, 1))
    fused = native.Pass("float32", (1, 1), n, kernel=kernel, sum=total)
    fused.add(x[1:], 1)
    fused.add(x[:1], 0)
    fused.flush()
    assert total[0, 0] == 2.0**60 + 9984  # a multiple of 256
    assert total[0, 0] - 2.0**60 + total[1, 0] == pytest.approx((n - 1) * float(np.float32(0.1)), rel=1e-12)


def test_a_file_that_grows(native: ModuleType, kernel: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (50, 64), np.uint16)
    total, high = np.zeros(64, np.uint64), np.zeros(64, np.uint16)
    fused = native.Pass("uint16", (8, 8), 50, kernel=kernel, sum=total, max=high)
    for row in range(0, 50, 10):
        fused.add(x[row : row + 10], row)
        fused.flush()
        fused.flush()
        np.testing.assert_array_equal(total, x[: row + 10].sum(axis=0, dtype=np.uint64))
        np.testing.assert_array_equal(high, x[: row + 10].max(axis=0))


def test_calls_from_many_threads_wait_for_one_another(native: ModuleType) -> None:
    x = np.random.default_rng(1).integers(0, 60000, (256, 1024), np.uint16)
    total, rows = np.zeros(1024, np.uint64), np.zeros((256, 1), np.uint64)
    fused = native.Pass("uint16", (32, 32), 256, sum=total, masks=[(np.ones((1, 1024), bool), rows)])
    calls = [threading.Thread(target=fused.add, args=(x[i : i + 32], i, 2)) for i in range(0, 256, 32)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    fused.flush()
    np.testing.assert_array_equal(total, x.sum(axis=0, dtype=np.uint64))
    np.testing.assert_array_equal(rows[:, 0], x.sum(axis=1, dtype=np.uint64))


def test_masks_only(native: ModuleType) -> None:
    def is_so(dtype: str, weights: np.ndarray, **more: Any) -> bool:
        rows = np.zeros((1, 1), "float64" if "f" in (np.dtype(dtype).kind, weights.dtype.kind) else "uint64")
        return bool(
            native.Pass(
                dtype, (2, 2), 1, masks=[(weights, rows.astype(more.pop("out", rows.dtype)))], **more
            ).masks_only
        )

    inside = np.ones((1, 4), bool)
    assert is_so("uint8", inside)
    assert is_so("uint32", inside)
    assert not is_so("int16", inside, out="int64")
    assert not is_so("float32", inside)
    assert not is_so("uint8", inside.astype(np.float64))
    assert not is_so("uint8", inside, sum=np.zeros(4, np.uint64))
    assert not native.Pass("uint8", (2, 2), 1).masks_only


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_bits_of_masks(native: ModuleType, kernel: str, dtype: str) -> None:
    weights = np.random.default_rng(2).random((4, 77)) < 0.5
    weights[2] = False
    fused = native.Pass(dtype, (7, 11), 1, kernel=kernel, masks=[(weights, np.zeros((1, 4), np.uint64))])
    whole = np.concatenate([np.ones((1, 77), bool), weights])
    assert fused.mask_bits == tuple(np.packbits(m, bitorder="little").tobytes() for m in whole)
    assert native.Pass(dtype, (7, 11), 1, kernel=kernel).mask_bits == ()


READ_ONLY = np.zeros(4, np.uint64)
READ_ONLY.flags.writeable = False
ROWS, WEIGHTS, LABELS = np.zeros((3, 1), np.uint64), np.ones((1, 4), np.uint64), np.zeros(4, np.int32)


@pytest.mark.parametrize(
    ("error", "dtype", "named"),
    [
        (TypeError, "uint8", {"sum": np.zeros(4, np.int64)}),
        (TypeError, "int16", {"sum": np.zeros(4, np.uint64)}),
        (TypeError, "float32", {"sum": np.zeros((2, 4), np.float32)}),
        (ValueError, "uint8", {"sum": np.zeros(5, np.uint64)}),
        (ValueError, "uint8", {"sum": np.zeros((4, 2), np.uint64)[:, 0]}),
        (ValueError, "uint8", {"sum": READ_ONLY}),
        (TypeError, "uint8", {"sum": [0, 0, 0, 0]}),
        (ValueError, "float32", {"sum": np.zeros(4)}),
        (ValueError, "uint8", {"squares": np.zeros(4, np.uint64)}),
        (ValueError, "uint8", {"squares": np.zeros((2, 4), np.uint64), "level": np.zeros(4)}),
        (ValueError, "float32", {"level": np.zeros(4)}),
        (ValueError, "float32", {"squares": np.zeros((2, 4)), "level": np.zeros(3)}),
        (TypeError, "float32", {"squares": np.zeros((2, 4)), "level": np.zeros(4, np.float32)}),
        (ValueError, "float32", {"squares": np.zeros((2, 4)), "level": np.array([0, 0, 0, np.nan])}),
        (ValueError, "float32", {"squares": np.zeros((2, 4)), "level": np.array([0, -np.inf, 0, 0])}),
        (ValueError, "float32", {"squares": np.zeros((2, 4)), "level": np.zeros(8)[::2]}),
        (TypeError, "uint8", {"max": np.zeros(4, np.uint16)}),
        (ValueError, "uint8", {"masks": [(np.ones((1, 5), bool), ROWS)]}),
        (ValueError, "uint8", {"masks": [(np.ones((4, 1), bool)[:, 0].reshape(1, 4)[:, ::2], ROWS)]}),
        (ValueError, "uint8", {"masks": [(np.ones((2, 4), bool), ROWS)]}),
        (TypeError, "uint8", {"masks": [(np.ones((1, 4), np.int8), ROWS)]}),
        (TypeError, "uint8", {"masks": [(np.ones((1, 4), np.float32), np.zeros((3, 1)))]}),
        (TypeError, "uint8", {"masks": [(np.ones((1, 4), complex), np.zeros((3, 1)))]}),
        (TypeError, "uint8", {"masks": [(WEIGHTS,)]}),
        (ValueError, "uint16", {"masks": [(WEIGHTS << np.uint64(47), ROWS)]}),
        (ValueError, "uint32", {"masks": [(WEIGHTS << np.uint64(30), ROWS)]}),
        (ValueError, "uint8", {"masks": [(WEIGHTS << np.uint64(63), ROWS)]}),
        (ValueError, "uint8", {"labels": [(LABELS + 1, 1, ROWS)]}),
        (ValueError, "uint8", {"labels": [(LABELS, 2, ROWS)]}),
        (ValueError, "uint8", {"labels": [(LABELS, -1, ROWS)]}),
        (TypeError, "uint8", {"labels": [(LABELS.astype(np.int64), 1, ROWS)]}),
        (TypeError, "uint8", {"moments": [(np.ones(4, np.uint8), np.zeros((3, 3), np.uint64))]}),
        (ValueError, "uint8", {"moments": [(np.ones(3, bool), np.zeros((3, 3), np.uint64))]}),
        (ValueError, "uint8", {"moments": [(None, np.zeros((3, 2), np.uint64))]}),
        (ValueError, "float64", {}),
        (ValueError, ">u2", {}),
        (ValueError, "uint8", {"kernel": "best"}),
        (TypeError, "uint8", {"masks": 5}),
    ],
)
def test_what_does_not_fit_is_refused(
    native: ModuleType, error: type[Exception], dtype: str, named: dict[str, Any]
) -> None:
    with pytest.raises(error):
        native.Pass(dtype, (2, 2), 3, **named)


def test_the_largest_weight_that_fits(native: ModuleType, kernel: str) -> None:
    rows = np.zeros((1, 1), np.uint64)
    weights = np.array([[(2**63 - 1) // 65535, 0]], np.uint64)
    native.Pass("uint16", (1, 2), 1, kernel=kernel, masks=[(weights, rows)]).add(np.full(2, 65535, np.uint16), 0)
    assert rows[0, 0] == (2**63 - 1) // 65535 * 65535


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (-1, 2), (2**31, 1), (2**17, 2**17)])
def test_frames_without_pixels_or_with_too_many(native: ModuleType, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="frames of"):
        native.Pass("uint8", shape, 1)


def test_frames_that_do_not_fit_are_refused_and_nothing_is_added(native: ModuleType) -> None:
    total = np.zeros(6, np.uint64)
    fused = native.Pass("uint16", (2, 3), 4, sum=total)
    good = np.ones((2, 6), np.uint16)
    for frames, row, threads in (
        (good, 3, 1),
        (good, -1, 1),
        (good, 0, 0),
        (good, 0, 100_000),
        (good, 2**62, 1),
        (np.ones(7, np.uint16), 0, 1),
        (good[:, ::2], 0, 1),
    ):
        with pytest.raises(ValueError, match=r"fram|row"):
            fused.add(frames, row, threads)
    with pytest.raises(TypeError):
        fused.add(3, 0)
    fused.add(np.empty((0, 6), np.uint16), 4)
    fused.flush()
    assert not total.any()
    assert fused.quality()["pixels"] == 0
    with pytest.raises(RuntimeError, match="once"):
        fused.__init__("uint16", (2, 3), 4)


def test_a_pass_keeps_its_arrays(native: ModuleType) -> None:
    total = np.zeros(4, np.uint64)
    fused = native.Pass("uint8", (2, 2), 1, sum=total)
    with pytest.raises(ValueError, match=r"resize|refer"):
        total.resize(1000)
    fused.add(bytes([1, 2, 3, 4]), 0)
    fused.flush()
    assert total.tolist() == [1, 2, 3, 4]
