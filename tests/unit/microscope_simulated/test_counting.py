"""Dose and its noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from emflow.microscope.protocol import Camera, Scan, Scan4d
from emflow.microscope.simulated.detector import Counting

FRAMES = 400
SERIES = Camera(frames=FRAMES, exposure_us=300.0)


def test_counts_are_poisson_pixel_by_pixel(calm: Callable[..., Any]) -> None:
    """Mean and variance of many frames of the same expectation; also with what no noise gives."""
    small = {"ronchigram_shape": [24, 24], "seed": 1}
    counted = calm("counted", noise=True, dtype="uint16", **small)
    frames = counted.data(counted.acquire(SERIES)).astype(float)
    lab = calm("exact", **small)
    wanted = lab.data(lab.acquire(Camera(frames=1, exposure_us=300.0)))[0].astype(float)
    mean, variance = frames.mean(0), frames.var(0, ddof=1)
    # the mean of n Poisson counts has variance wanted / n; 5 sigma for each of 576 pixels
    assert np.all(np.abs(mean - wanted) <= 5 * np.sqrt(wanted / FRAMES))
    assert np.mean((mean - wanted) ** 2 * FRAMES / wanted) == pytest.approx(1, abs=0.3)
    bright = wanted > 5
    # index of dispersion is 1 +- sqrt(2 / n) for each pixel
    dispersion = (variance / mean)[bright]
    assert dispersion.mean() == pytest.approx(1, abs=5 * np.sqrt(2 / FRAMES / bright.sum()))
    assert frames.sum(axis=(1, 2)).mean() == pytest.approx(wanted.sum(), rel=2e-3)
    # the frames know nothing of each other
    flat = (frames - mean)[:, bright]
    assert abs(np.mean(flat[1:] * flat[:-1]) / np.mean(flat**2)) < 5 / np.sqrt(flat.size)


def test_dose_is_what_reaches_the_specimen(calm: Callable[..., Any]) -> None:
    lab = calm(electrons_per_us=20.0)
    action = Scan4d(shape=(3, 5), step_nm=1.0, exposure_us=100.0)
    assert lab.microscope.dose_e(action) == pytest.approx(3 * 5 * 100 * 20)
    made = lab.acquire(action)
    assert made.dose_e == lab.microscope.dose_e(action)
    # what is not on the detector was deflected further: 1 - transmission of the disc
    assert 0.5 * made.dose_e < lab.data(made).sum() < made.dose_e
    assert lab.microscope.dose_e(Camera(frames=7, exposure_us=50.0)) == pytest.approx(7 * 50 * 20)
    assert lab.microscope.dose_e(Scan(shape=(4, 8), step_nm=1.0, dwell_us=3.0)) == pytest.approx(32 * 3 * 20)


def test_default_frame_has_a_few_ten_thousand_electrons(lab: Callable[..., Any]) -> None:
    found = lab()
    made = found.acquire(Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=1000.0))
    assert made.dose_e / 16 == pytest.approx(30_000)
    assert 15_000 < found.data(made).sum() / 16 < 30_000


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
def test_what_does_not_fit_saturates(dtype: str) -> None:
    most = np.iinfo(dtype).max if dtype != "float32" else None
    expected = np.array([0.0, 3.2, 254.0, 300.0, 7e4, 5e9])
    counts = Counting(dtype, None).count(expected)
    assert counts.dtype == dtype
    wanted = expected if most is None else np.minimum(np.rint(expected), most)
    assert counts.tolist() == wanted.astype(dtype).tolist()
    noisy = Counting(dtype, (1,)).count(np.full(1000, 5e9))
    if most is not None:
        assert set(noisy.tolist()) <= {most} or dtype == "uint32"


@pytest.mark.parametrize(
    "action",
    [
        Scan4d(shape=(65536, 65536), step_nm=1.0, exposure_us=1.0),
        Scan4d(shape=(1024, 1024), step_nm=1.0, exposure_us=1.0),
        Scan(shape=(65536, 65536), step_nm=1.0, dwell_us=1.0),
        Scan4d(shape=(4, 4), step_nm=0.0, exposure_us=1.0),
        Scan4d(shape=(4, 4), step_nm=float("nan"), exposure_us=1.0),
        Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=-1.0),
        Scan(shape=(4, 4), step_nm=1.0, dwell_us=float("inf")),
        Scan(shape=(4, 4), step_nm=1.0, dwell_us=1.0, centre_nm=(1e9, 0.0)),
        Camera(frames=4, exposure_us=0.0),
    ],
)
def test_what_cannot_be_made_has_no_dose(lab: Callable[..., Any], action: Any) -> None:
    found = lab()
    with pytest.raises(ValueError, match=r"GiB|must be|out of reach"):
        found.microscope.dose_e(action)
    assert found.files() == []


def test_noise_is_another_in_each_acquisition_and_of_each_seed(calm: Callable[..., Any]) -> None:
    """Nothing moves: the differences are noise, of twice the variance of one."""
    action = Camera(frames=1, exposure_us=1e5)
    found = [calm(f"seed{seed}", noise=True, dtype="uint16", seed=seed, hidden={"C10_nm": 0.0}) for seed in (1, 2)]
    first, second = (found[0].data(found[0].acquire(action)).astype(float) for _ in range(2))
    bright = first > 15
    assert np.var((first - second)[bright]) == pytest.approx(2 * first[bright].mean(), rel=0.1)
    assert not np.array_equal(first, found[1].data(found[1].acquire(action)))
