"""Aberrations from segment images: right where they can be known, and modest where they can't."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from emflow.agent.policies import parallax


def estimated(made: SimpleNamespace, *coefficients: float, **facts: float) -> parallax.Estimate:
    images, angles, pixels = made.scan(*coefficients, **facts)
    bright = parallax.bright(images, pixels)
    step = facts.get("step_nm", 1.5)
    return parallax.estimate(images[..., bright], angles[bright], (step, step))


@pytest.mark.parametrize(
    "coefficients", [(600, 100, -80), (-600, 0, 150), (-100, -100, 100), (120, 0, 0), (0, 0, 150), (250, 20, 30)]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_starts_of_any_size_sign_and_axis(
    made: SimpleNamespace, coefficients: tuple[float, float, float], seed: int
) -> None:
    found = estimated(made, *coefficients, seed=seed)
    np.testing.assert_allclose(found.coefficients_nm, coefficients, atol=5.0)
    assert found.correlation > 0.6
    assert found.inliers > 0.7
    assert found.residual_px < 0.3
    assert not found.at_bound


@pytest.mark.parametrize("coefficients", [(0, 0, 0), (3, -2, 1), (-8, 5, -5)])
def test_small_ones_within_a_few_errors(made: SimpleNamespace, coefficients: tuple[float, float, float]) -> None:
    found = estimated(made, *coefficients, step_nm=0.6)
    assert (found.errors_nm < 1.0).all()
    np.testing.assert_allclose(found.coefficients_nm, coefficients, atol=5 * float(found.errors_nm.max()))


def test_errors_say_how_far_estimates_scatter(made: SimpleNamespace) -> None:
    found = [estimated(made, 20, 5, -3, seed=s, step_nm=0.6, counts=500.0) for s in range(1, 9)]
    off = np.array([e.coefficients_nm - (20, 5, -3) for e in found])
    said = np.sqrt(np.mean([e.errors_nm**2 for e in found]))
    assert 0.3 * said < np.sqrt((off**2).mean()) < 3 * said


def test_shifts_of_half_the_field(made: SimpleNamespace) -> None:
    """A field of 32 nm, where the outermost images are shifted by 13 nm."""
    found = estimated(made, 400, 60, -40, shape=(32, 32), step_nm=1.0, disc_mrad=32.0, reach_mrad=25.0)
    np.testing.assert_allclose(found.coefficients_nm, (400, 60, -40), atol=12.0)


def test_steps_may_differ_by_axis_and_the_origin_of_angles_is_free(made: SimpleNamespace) -> None:
    images, angles, pixels = made.scan(200, 30, 10, step_nm=1.0)
    bright = parallax.bright(images, pixels)
    found = parallax.estimate(images[::2, :, bright], angles[bright] + (40.0, -7.0), (2.0, 1.0))
    np.testing.assert_allclose(found.coefficients_nm, (200, 30, 10), atol=5.0)


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_known_by_its_quality(made: SimpleNamespace, seed: int) -> None:
    found = estimated(made, 300, contrast=0.0, seed=seed)
    assert found.correlation < 0.25
    assert found.smoothness < 0.2
    assert found.residual_px > 0.5


def test_what_lies_beyond_the_search_is_not_passed_off_as_found(made: SimpleNamespace) -> None:
    found = estimated(made, 4000, shape=(32, 32), step_nm=0.5)
    assert found.at_bound or found.correlation < 0.3 or found.residual_px > 0.5


def test_a_few_broken_segments_pull_nothing(made: SimpleNamespace) -> None:
    images, angles, pixels = made.scan(150, 40, -20)
    bright = np.flatnonzero(parallax.bright(images, pixels))
    images = images.copy()
    images[..., bright[3]] = images[::-1, ::-1, bright[3]]
    images[..., bright[17]] = np.roll(images[..., bright[17]], 7, axis=0)
    found = parallax.estimate(images[..., bright], angles[bright], (1.5, 1.5))
    np.testing.assert_allclose(found.coefficients_nm, (150, 40, -20), atol=5.0)
    assert found.inliers < 1.0


def test_bright_segments_are_those_in_the_disc(made: SimpleNamespace) -> None:
    images, angles, pixels = made.scan(0)
    bright = parallax.bright(images, pixels)
    assert bright.sum() >= 24
    assert (np.hypot(*angles[bright].T) <= 25.0).all()
    hot = images.copy()
    hot[..., 0] = 10**6
    np.testing.assert_array_equal(np.flatnonzero(parallax.bright(hot, pixels))[1:], np.flatnonzero(bright))
    assert not parallax.bright(np.zeros_like(images), pixels).any()


def test_gradients_are_those_of_the_aberration_function() -> None:
    c, a, d = np.array([3.0, -2.0, 5.0]), np.array([[0.011, -0.007]]), 1e-6

    def chi(y: float, x: float) -> float:
        return float(c[0] / 2 * (x * x + y * y) + c[1] / 2 * (x * x - y * y) + c[2] * x * y)

    y, x = a[0]
    numeric = [(chi(y + d, x) - chi(y - d, x)) / (2 * d), (chi(y, x + d) - chi(y, x - d)) / (2 * d)]
    np.testing.assert_allclose(parallax.gradients(a)[0] @ c, numeric, rtol=1e-6)


@pytest.mark.parametrize("c10", [300, 1500])
def test_both_axes_bound_the_search(made: SimpleNamespace, c10: float) -> None:
    """With y and x exchanged, C12a changes its sign and nothing else does, whichever axis has the smaller field."""
    images, angles, pixels = made.scan(c10, 60, step_nm=0.5, shape=(256, 64))
    bright = parallax.bright(images, pixels)
    images, angles = images[::4, :, bright], angles[bright]
    found = parallax.estimate(images, angles, (2.0, 0.5))
    turned = parallax.estimate(images.swapaxes(0, 1), angles[:, ::-1], (0.5, 2.0))
    np.testing.assert_allclose(turned.coefficients_nm * (1, -1, 1), found.coefficients_nm, atol=1.0)
    assert (found.at_bound, turned.at_bound) == (c10 > 768, c10 > 768)  # 60 % of 32 nm at 25 mrad
