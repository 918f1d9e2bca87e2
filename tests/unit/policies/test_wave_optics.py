"""Sign, axes and scale of the estimate against wave optics, which know nothing of the geometry that it rests on."""

from __future__ import annotations

import numpy as np
import pytest

from emflow.agent.policies import parallax

WAVELENGTH_NM = 0.00197  # of 300 kV electrons
SEMI_RAD, REACH_RAD, SIDE, ACROSS = 0.022, 0.032, 24, 8
PIXELS, PIXEL_NM = (192, 224), (0.030, 0.027)


def diffraction(coefficients: tuple[float, float, float], shape: tuple[int, int], steps: tuple[float, float]):
    """Far-field intensities (ny, nx, det_y, det_x) of a probe on soft absorbing discs.

    The probe is the Fourier integral of ``exp(-2 pi i chi / wavelength)`` over the aperture (Krivanek, Dellby, Lupini
    1999, doi:10.1016/S0304-3991(99)00013-3), put at each scan position by a phase ramp; the detector sees the power
    of the Fourier transform of probe times object.
    """
    random = np.random.default_rng(3)
    extent = [n * p for n, p in zip(PIXELS, PIXEL_NM, strict=True)]
    place = [np.arange(n) * p for n, p in zip(PIXELS, PIXEL_NM, strict=True)]
    k = [np.fft.fftfreq(n, p) for n, p in zip(PIXELS, PIXEL_NM, strict=True)]
    thickness = np.zeros(PIXELS)
    for _ in range(40):
        centre = [random.uniform(0, e) for e in extent]
        dy, dx = ((r - c + e / 2) % e - e / 2 for r, c, e in zip(place, centre, extent, strict=True))
        thickness += random.uniform(0.5, 1) * np.exp(-(dy[:, None] ** 2 + dx**2) / (2 * 0.22**2))
    specimen = np.exp(-0.15 * thickness)
    ay, ax = np.meshgrid(k[0] * WAVELENGTH_NM, k[1] * WAVELENGTH_NM, indexing="ij")
    c10, c12a, c12b = coefficients
    chi = c10 / 2 * (ax**2 + ay**2) + c12a / 2 * (ax**2 - ay**2) + c12b * ax * ay
    aperture = (np.hypot(ay, ax) <= SEMI_RAD) * np.exp(-2j * np.pi * chi / WAVELENGTH_NM)
    row, column = (np.floor((a + REACH_RAD) / (2 * REACH_RAD) * SIDE).astype(int) for a in (ay, ax))
    seen = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    pixel = np.where(seen, row * SIDE + column, SIDE * SIDE).ravel()
    found = np.empty((*shape, SIDE * SIDE))
    for i, j in np.ndindex(shape):
        ramp = np.exp(-2j * np.pi * (k[0][:, None] * i * steps[0] + k[1] * j * steps[1]))
        power = np.abs(np.fft.fft2(np.fft.ifft2(aperture * ramp) * specimen)) ** 2
        found[i, j] = np.bincount(pixel, power.ravel(), SIDE * SIDE + 1)[:-1]
    return found.reshape(*shape, SIDE, SIDE)


@pytest.mark.parametrize("coefficients", [(60.0, 25.0, -15.0), (-50.0, -10.0, 30.0)])
def test_coefficients_of_a_wave_optical_scan(coefficients: tuple[float, float, float]) -> None:
    """Neither scan nor steps are square, and the detector's origin is not its middle."""
    shape, steps, n = (24, 20), (0.22, 0.28), SIDE // ACROSS
    data = diffraction(coefficients, shape, steps)
    angle = ((np.arange(SIDE) + 0.5) / SIDE * 2 - 1) * REACH_RAD * 1e3
    total = data.sum((0, 1))

    def segmented(frame: np.ndarray) -> np.ndarray:
        return frame.reshape(ACROSS, n, ACROSS, n).sum((1, 3)).ravel()

    centroids = [segmented(total * a) / segmented(total) for a in (angle[:, None], angle[None, :])]
    images = data.reshape(*shape, ACROSS, n, ACROSS, n).sum((3, 5)).reshape(*shape, -1)
    bright = parallax.bright(images, np.full(ACROSS**2, n * n))
    angles = np.stack(centroids, axis=1) + np.array([7.0, -11.0])
    found = parallax.estimate(images[..., bright], angles[bright], steps)
    np.testing.assert_allclose(found.coefficients_nm, coefficients, atol=1.5)
    assert found.correlation > 0.9
