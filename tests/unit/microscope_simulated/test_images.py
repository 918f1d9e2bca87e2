"""Virtual images lie where the gradient of the aberration function puts them, seen by oracles written another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emflow.microscope.protocol import Camera, Scan, Scan4d
from emflow.microscope.simulated import exposure
from emflow.microscope.simulated.optics import Aberrations, rays
from emflow.microscope.simulated.parameters import parse
from emflow.microscope.simulated.plan import plan
from emflow.microscope.simulated.specimen import Specimen, grow

SIDE, PIXEL = 256, 0.25
BLOBS = np.random.default_rng(7).uniform([0, 0, 1.2, 0.1], [64, 64, 2.5, 0.5], (25, 4))
"""Centre y and x, width, depth of Gaussians, nm, in a period of 64 nm."""


def analytic(y: Any, x: Any) -> Any:
    """Transmission of the Gaussians and of their periodic copies, evaluated at any position, nm."""
    total = np.ones(np.broadcast_shapes(np.shape(y), np.shape(x)))
    for cy, cx, width, depth in BLOBS:
        dy, dx = (np.mod(a - c + 32, 64) - 32 for a, c in ((y, cy), (x, cx)))
        total = total - depth * np.exp(-(dy**2 + dx**2) / (2 * width**2))
    return total


@pytest.fixture(scope="module")
def gaussians() -> Specimen:
    at = np.arange(SIDE) * PIXEL
    return Specimen(analytic(at[:, None], at[None, :]).astype(np.float32), PIXEL)


def chi(a: Aberrations, ay: float, ax: float) -> float:
    """The aberration function itself, in nm."""
    astigmatism = a.C12a_nm / 2 * (ax**2 - ay**2) + a.C12b_nm * ax * ay
    return a.C10_nm / 2 * (ax**2 + ay**2) + astigmatism


def slope(a: Aberrations, ay: float, ax: float) -> tuple[float, float]:
    """Its gradient by differences; exact for a quadratic."""
    h = 1e-3
    return (chi(a, ay + h, ax) - chi(a, ay - h, ax)) / (2 * h), (chi(a, ay, ax + h) - chi(a, ay, ax - h)) / (2 * h)


ALONE = [{name: sign * 300.0} for name in ("C10_nm", "C12a_nm", "C12b_nm") for sign in (1, -1)]
TOGETHER = {"C10_nm": 410.0, "C12a_nm": -73.0, "C12b_nm": 48.0}


@pytest.mark.parametrize("values", [*ALONE, TOGETHER])
def test_gradient_is_that_of_chi(values: dict[str, float]) -> None:
    a = Aberrations(**values)
    for ay, ax in ((0.01, 0.02), (-0.007, 0.015), (0.0, -0.025)):
        gy, gx = a.gradient(np.array([ay]), np.array([ax]))
        assert (gy[0], gx[0]) == pytest.approx(slope(a, ay, ax), rel=1e-9)


@pytest.mark.parametrize("values", [*ALONE, TOGETHER])
def test_every_pixel_of_a_4d_scan_is_the_specimen_at_r_plus_g(gaussians: Specimen, values: dict[str, float]) -> None:
    """Analytic specimen; not square in scan or detector, off centre, moving: every axis and sign shows."""
    action = Scan4d(shape=(5, 7), step_nm=1.3, exposure_us=1000.0, centre_nm=(11.0, -4.0))
    parameters = parse({"detector_shape": [8, 10], "background": 0.02, "hidden": {"C10_nm": 1.0}})
    true, made = Aberrations(**values), plan(action, parameters)
    velocity = (200.0, -90.0)
    blocks = exposure.expected(made, parameters, gaussians, true, lambda s: (3.0 + velocity[0] * s, velocity[1] * s))
    frames = np.concatenate([block for block, _ in blocks]).reshape(5, 7, 8, 10)
    inside = [(i, j) for i in range(8) for j in range(10) if math.hypot((i - 4) * 8, (j - 5) * 6.4) <= 25]
    assert len(inside) > 25
    for i, j in np.ndindex(8, 10):
        if (i, j) not in inside:
            assert frames[:, :, i, j] == pytest.approx(30_000 * 0.02 / (80 - len(inside)))
            continue
        gy, gx = slope(true, (i - 4) * 8e-3, (j - 5) * 6.4e-3)
        for row, column in np.ndindex(5, 7):
            middle_s = (row * 7 + 3.5) * 1e-3  # the specimen stands still for a row
            y = 11.0 + (row - 2.5) * 1.3 + gy - 3.0 - velocity[0] * middle_s
            x = -4.0 + (column - 3.5) * 1.3 + gx - velocity[1] * middle_s
            wanted = analytic(y, x) * 30_000 * 0.98 / len(inside)
            # bilinear interpolation is wrong by at most h^2/8 of both second derivatives, a hundredth here
            assert frames[row, column, i, j] == pytest.approx(wanted, rel=0.015), (i, j, row, column)


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    """One point between four, periodic, in points of the map."""
    n, (iy, ix) = len(image), (math.floor(y), math.floor(x))
    wy, wx = y - iy, x - ix
    rows = [(1 - wx) * image[k % n, ix % n] + wx * image[k % n, (ix + 1) % n] for k in (iy, iy + 1)]
    return float((1 - wy) * rows[0] + wy * rows[1])


def test_a_scan_from_end_to_end(calm: Callable[..., Any]) -> None:
    """Hidden and control add up, stage and drift move the specimen, the file has it all."""
    lab = calm(seed=5, hidden={"C10_nm": 300.0, "C12a_nm": -40.0, "C12b_nm": 25.0}, drift_nm_per_s=[0.5, -0.25])
    lab.microscope.set({"C10_nm": -120.0, "C12b_nm": 10.0, "stage_y_nm": 31.0, "stage_x_nm": -700.0})
    lab.acquire(Scan(shape=(4, 4), step_nm=1.0, dwell_us=1e5))  # 1.6 s of drift
    found = lab.data(lab.acquire(Scan4d(shape=(6, 4), step_nm=2.0, exposure_us=2000.0, centre_nm=(1.0, 2.0))))
    true, image = Aberrations(C10_nm=180.0, C12a_nm=-40.0, C12b_nm=35.0), grow(5).transmission
    for row, column, i, j in np.random.default_rng(0).integers([0, 0, 20, 20], [6, 4, 45, 45], (200, 4)):
        gy, gx = slope(true, (i - 32) * 1e-3, (j - 32) * 1e-3)
        seconds = 1.6 + (row * 4 + 2) * 2e-3
        y = 1.0 + (row - 3) * 2.0 + gy - 31.0 - 0.5 * seconds
        x = 2.0 + (column - 2) * 2.0 + gx + 700.0 + 0.25 * seconds
        wanted = 60_000 * 0.99 / 1961 * bilinear(image, y / 0.25, x / 0.25)
        assert found[row, column, i, j] == pytest.approx(wanted, rel=2e-4)


def lag(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """By how many pixels ``b`` lies further down and right than ``a``."""
    cross = np.fft.ifft2(np.fft.fft2(b - b.mean()) * np.conj(np.fft.fft2(a - a.mean()))).real
    peak = np.unravel_index(int(cross.argmax()), cross.shape)
    return tuple((int(p) + n // 2) % n - n // 2 for p, n in zip(peak, cross.shape, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("hidden", "pixel", "moved"),
    [
        # 500 nm x 20 mrad = 10 nm: I(r) = S(r + g) shows the specimen 10 pixels before where it is without aberration
        ({"C10_nm": 500.0}, (26, 16), (-10, 0)),
        ({"C10_nm": 500.0}, (16, 26), (0, -10)),
        ({"C10_nm": -500.0}, (26, 16), (10, 0)),
        ({"C12a_nm": 500.0}, (26, 16), (10, 0)),
        ({"C12a_nm": 500.0}, (16, 26), (0, -10)),
        ({"C12b_nm": 500.0}, (26, 16), (0, -10)),
        ({"C12b_nm": 500.0}, (16, 26), (-10, 0)),
    ],
)
def test_sign_and_axis_of_each_coefficient(
    calm: Callable[..., Any], hidden: dict[str, float], pixel: tuple[int, int], moved: tuple[int, int]
) -> None:
    zero = dict.fromkeys(("C10_nm", "C12a_nm", "C12b_nm"), 0.0)
    # with dose noise: what a policy would see
    lab = calm(noise=True, dtype="uint16", detector_shape=[32, 32], electrons_per_us=800.0, hidden=zero | hidden)
    scan = lab.data(lab.acquire(Scan4d(shape=(48, 48), step_nm=1.0, exposure_us=1000.0))).astype(float)
    assert lag(scan[:, :, 16, 16], scan[:, :, pixel[0], pixel[1]]) == moved


def test_stage_moves_the_image_with_it(calm: Callable[..., Any]) -> None:
    lab = calm()
    action = Scan(shape=(64, 64), step_nm=1.0, dwell_us=10.0)
    before = lab.data(lab.acquire(action))
    lab.microscope.set({"stage_y_nm": 5.0, "stage_x_nm": -3.0})
    assert lag(before, lab.data(lab.acquire(action))) == (5, -3)


def test_dark_field_is_what_the_probe_does_not_let_pass(gaussians: Specimen) -> None:
    """The Fourier product against the mean over rays, one by one."""
    parameters = parse({"semi_angle_mrad": 20.0, "electrons_per_us": 100.0})
    true = Aberrations(C10_nm=90.0, C12a_nm=30.0, C12b_nm=-20.0)
    made = plan(Scan(shape=(3, 9), step_nm=4.0, dwell_us=2.0), parameters)
    image = np.concatenate([b for b, _ in exposure.expected(made, parameters, gaussians, true, lambda s: (0.0, 0.0))])
    ay, ax = rays(20.0, 2000)
    assert np.hypot(ay, ax).max() == pytest.approx(0.02, rel=1e-3)
    assert np.mean(ay**2 + ax**2) == pytest.approx(0.02**2 / 2, rel=1e-3)  # evenly over the disc
    for row, column in np.ndindex(3, 9):
        y, x = (row - 1.5) * 4.0, (column - 4.5) * 4.0
        steps = [slope(true, float(a), float(b)) for a, b in zip(ay, ax, strict=True)]
        gy, gx = np.array(steps).T
        wanted = 200.0 * (1 - np.mean(analytic(y + gy, x + gx)))
        assert image[row, column] == pytest.approx(wanted, abs=0.5)
    # and it is the probe's size that smooths: in focus, contrast is larger
    focused = [b for b, _ in exposure.expected(made, parameters, gaussians, Aberrations(), lambda s: (0.0, 0.0))]
    assert np.concatenate(focused).std() > image.std()


def test_dark_field_rows_drift_one_by_one(gaussians: Specimen) -> None:
    """A row is exposed in 0.8 s, in whose middle the specimen stands for all of it."""
    parameters = parse({"electrons_per_us": 1.0})
    made = plan(Scan(shape=(4, 8), step_nm=2.0, dwell_us=1e5), parameters)
    moved: list[float] = []

    def where(exposed_s: float) -> tuple[float, float]:
        moved.append(exposed_s)
        return 5.0 * exposed_s, -3.0 * exposed_s

    image = np.concatenate([b for b, _ in exposure.expected(made, parameters, gaussians, Aberrations(), where)])
    assert moved == pytest.approx([0.4, 1.2, 2.0, 2.8])
    for row, column in np.ndindex(4, 8):
        y, x = (row - 2) * 2.0 - 5.0 * moved[row], (column - 4) * 2.0 + 3.0 * moved[row]
        assert image[row, column] == pytest.approx(1e5 * (1 - analytic(y, x)), rel=0.02, abs=1000)


def test_ronchigram_is_a_shadow_image(calm: Callable[..., Any]) -> None:
    """Frame pixel a shows S(g(a)): magnified by 1/C1 on each axis, and moving with the drift."""
    hidden = {"C10_nm": -400.0, "C12a_nm": 100.0, "C12b_nm": 30.0}
    lab = calm(seed=2, hidden=hidden, ronchigram_shape=[40, 60], drift_nm_per_s=[1.0, -2.0])
    found = lab.data(lab.acquire(Camera(frames=3, exposure_us=5e5)))
    true, image = Aberrations(**hidden), grow(2).transmission
    inside = [
        (i, j) for i in range(40) for j in range(60) if math.hypot((i - 20) * 1.6, (j - 30) * 64 / 60) <= 25.0 + 1e-9
    ]
    level = 30 * 5e5 * 0.99 / len(inside)
    for frame in range(3):
        for i, j in inside[::7]:
            gy, gx = slope(true, (i - 20) * 1.6e-3, (j - 30) * 64e-3 / 60)
            seconds = (frame + 0.5) * 0.5
            wanted = level * bilinear(image, (gy - seconds) / 0.25, (gx + 2 * seconds) / 0.25)
            assert found[frame, i, j] == pytest.approx(wanted, rel=2e-3)


def test_grown_specimen_is_the_seeds_and_has_contrast() -> None:
    image = grow(3).transmission
    assert np.array_equal(image, grow(3).transmission)
    assert not np.array_equal(image, grow(4).transmission)
    assert 0.4 <= image.min() < image.max() <= 1.0
    assert 0.12 < image.std() / image.mean() < 0.2
    # periodic: no seam is steeper than the steepest slope inside
    for axis in (0, 1):
        steps = np.abs(np.diff(image, axis=axis))
        seam = np.abs(np.take(image, 0, axis) - np.take(image, -1, axis))
        assert seam.max() <= steps.max() * 1.01


def test_a_map_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Specimen(np.ones((96, 96), np.float32), 0.25)


def test_truth_is_in_no_file_of_the_share(calm: Callable[..., Any], tmp_path: Path) -> None:
    lab = calm(hidden={"C10_nm": 123.456789, "C12a_nm": -98.7654321, "C12b_nm": 45.678912})
    lab.acquire(Scan4d(shape=(2, 2), step_nm=1.0, exposure_us=10.0))
    text = b"".join(p.read_bytes() for p in lab.share.iterdir())
    assert b"123.45" not in text
    assert b"98.76" not in text
    assert set(lab.microscope.read()) == {"C10_nm", "C12a_nm", "C12b_nm", "stage_y_nm", "stage_x_nm"}
    assert not any(lab.microscope.read().values())
