"""Shifts between many pairs of images, to a fraction of a pixel."""

from __future__ import annotations

import numpy as np
import pytest

from emflow.agent.policies import registration


def texture(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Fourier transform of a smooth periodic image."""
    ky, kx = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])[None, :]
    noise = np.random.default_rng(seed).normal(size=shape)
    return np.fft.fft2(noise) * np.exp(-(ky**2 + kx**2) / (2 * 0.08**2))


def at(spectrum: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """The image at ``r + d``."""
    ky, kx = np.fft.fftfreq(spectrum.shape[0])[:, None], np.fft.fftfreq(spectrum.shape[1])[None, :]
    return np.fft.ifft2(spectrum * np.exp(2j * np.pi * (ky * dy + kx * dx))).real


@pytest.mark.parametrize("shape", [(64, 64), (47, 64), (64, 33), (32, 48)])
def test_known_shifts_are_found(shape: tuple[int, int]) -> None:
    wanted = np.array([(0.0, 0.0), (0.31, -0.47), (-2.2, 1.6), (3.4, -3.8)])
    big = texture((2 * shape[0], 2 * shape[1]))  # a window on something larger, as a scan is
    images = np.stack([at(big, *d)[: shape[0], : shape[1]] for d in wanted])
    reference = np.repeat(at(big, 0, 0)[None, : shape[0], : shape[1]], len(wanted), axis=0)
    found = registration.register(registration.spectra(images), registration.spectra(reference), shape, 6)
    np.testing.assert_allclose(found.shifts[:2], wanted[:2], atol=0.06)
    np.testing.assert_allclose(found.shifts, wanted, atol=0.6)  # windows that share less agree less
    assert found.correlations[0] == pytest.approx(1.0)
    assert (found.correlations > 0.5).all()
    assert not found.at_limit.any()


def test_a_periodic_image_is_found_to_a_hundredth_of_a_pixel() -> None:
    spectrum = texture((64, 64))
    wanted = np.array([(0.123, -0.456), (1.987, 3.012)])
    images = np.fft.rfft2(np.stack([at(spectrum, *d) for d in wanted]))
    references = np.repeat(np.fft.rfft2(at(spectrum, 0, 0))[None], 2, axis=0)
    found = registration.register(images, references, (64, 64), 5)
    np.testing.assert_allclose(found.shifts, wanted, atol=0.01)
    np.testing.assert_allclose(found.correlations, 1.0, atol=1e-3)


def test_beyond_the_limit_it_says_so() -> None:
    spectrum = texture((64, 64))
    images = np.fft.rfft2(at(spectrum, 9.0, 0.0))[None]
    found = registration.register(images, np.fft.rfft2(at(spectrum, 0, 0))[None], (64, 64), 4)
    assert found.at_limit.all() or (found.correlations < 0.8).all()


def test_flat_images_correlate_with_nothing() -> None:
    flat = registration.spectra(np.ones((1, 32, 32)))
    found = registration.register(flat, flat, (32, 32), 4)
    assert np.isfinite(found.shifts).all()
    assert abs(found.correlations[0]) <= 1
