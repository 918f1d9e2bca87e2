"""Phases from centres of mass and from segments, against a simulated specimen and fields that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_kernels.contract import Axis
from mpi_kernels.errors import RecipeError
from mpi_kernels.reductions import calibration, fields

ICOM = "mpi_kernels.reductions.integrated_centre_of_mass:IntegratedCentreOfMass"
DPC = "mpi_kernels.reductions.differential_phase:DifferentialPhase"


def axes(unit: str, y: float, x: float, names: str, offset: float = 0.0) -> tuple[Axis, Axis]:
    first, second = names.split()
    return Axis(name=first, scale=y, unit=unit, offset=offset), Axis(name=second, scale=x, unit=unit, offset=-offset)


def waves(shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    """A periodic phase of a few low frequencies, in rad."""
    rng = np.random.default_rng(seed)
    y, x = (2 * np.pi * np.arange(n) / n for n in shape)
    found = np.zeros(shape)
    for ky, kx in ((1, 0), (0, 1), (1, 1), (2, -1), (1, -2)):
        found += rng.normal(0, 0.2) * np.cos(ky * y[:, None] + kx * x[None, :] + rng.uniform(0, 6))
    return found - found.mean()


def gradient(phase: np.ndarray, steps: tuple[float, float] = (1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """By Fourier transform, so that it is exact for periodic waves."""
    whole = np.fft.fft2(phase)
    ky, kx = (np.fft.fftfreq(n, s) for n, s in zip(phase.shape, steps, strict=True))
    return tuple(np.fft.ifft2(2j * np.pi * k * whole).real for k in (ky[:, None], kx[None, :]))


def spots(y: np.ndarray, x: np.ndarray, det_shape: tuple[int, int]) -> np.ndarray:
    """Frames of four pixels each whose centre of mass is exactly ``(y, x)``."""
    found = np.zeros((*y.shape, *det_shape))
    for at in np.ndindex(y.shape):
        (i, u), (j, v) = ((int(np.floor(c[at])), c[at] % 1) for c in (y, x))
        found[(*at, slice(i, i + 2), slice(j, j + 2))] = 100 * np.outer([1 - u, u], [1 - v, v])
    return found


@pytest.fixture(scope="module")
def specimen() -> SimpleNamespace:
    """A pure phase object seen by a focused probe: a pattern for each position; nothing is alike along y and x."""
    shape, pixel, every = (48, 40), (0.02, 0.025), (4, 2)  # nm
    ky, kx = (np.fft.fftfreq(n, p) for n, p in zip(shape, pixel, strict=True))
    aperture = np.hypot(ky[:, None], kx[None, :]) < 8.0  # 1/nm
    probe = np.fft.ifft2(aperture)
    probe /= np.sqrt((np.abs(probe) ** 2).sum())
    phase = waves(shape)
    scan = tuple(n // e for n, e in zip(shape, every, strict=True))
    frames = np.empty((*scan, *shape))
    for i, j in np.ndindex(scan):
        moved = np.roll(probe, (i * every[0], j * every[1]), (0, 1))
        frames[i, j] = np.abs(np.fft.fftshift(np.fft.fft2(moved * np.exp(1j * phase)))) ** 2
    # the theorem: the gradient of the phase blurred with the probe's intensity (which is even)
    blurred = np.fft.ifft2(np.fft.fft2(phase) * np.fft.fft2(np.abs(probe) ** 2)).real[:: every[0], :: every[1]]
    steps = tuple(p * e for p, e in zip(pixel, every, strict=True))
    facts = {
        "det_axes": axes("1/nm", *(1 / (n * p) for n, p in zip(shape, pixel, strict=True)), "qy qx", offset=-3.0),
        "scan_axes": axes("nm", *steps, "scan_y scan_x", offset=5.0),
    }
    return SimpleNamespace(frames=frames, blurred=blurred - blurred.mean(), steps=steps, facts=facts)


def test_phase_of_a_pure_phase_object_in_rad(kernel: SimpleNamespace, specimen: SimpleNamespace) -> None:
    found = kernel.reduce(specimen.frames, kernel.spec(ICOM, "icom"), **specimen.facts)
    maps, scalars = found.arrays["icom"], found.scalars["icom"]
    np.testing.assert_allclose(maps["phase"], specimen.blurred, atol=1e-9)
    assert np.ptp(specimen.blurred) > 0.5  # the sign and the size are seen
    gy, gx = gradient(specimen.blurred, specimen.steps)
    np.testing.assert_allclose(maps["y"] - maps["y"].mean(), gy, atol=1e-8)
    np.testing.assert_allclose(maps["x"] - maps["x"].mean(), gx, atol=1e-8)
    assert scalars["uncalibrated"] == ""
    assert scalars["rotation_deg"] == 0.0
    assert abs(scalars["rotation_estimate_deg"]) < 1.0
    assert scalars["rotation_quality"] > 0.99 > scalars["rotation_quality_transposed"]


def test_turned_frames_give_the_same_phase_once_turned_back(kernel: SimpleNamespace, specimen: SimpleNamespace) -> None:
    """The detector turned by a quarter: what pointed along +x points along +y on it, so it is turned by -90."""
    turned = np.ascontiguousarray(np.rot90(specimen.frames, -1, axes=(2, 3)))
    y, x = specimen.facts["det_axes"]
    facts = specimen.facts | {"det_axes": (x, y)}
    for rotation in (-90, 270.0, "estimate"):
        found = kernel.reduce(turned, kernel.spec(ICOM, "icom", rotation=rotation), **facts)
        tolerance = 1e-9 if rotation != "estimate" else 0.02
        sign = 1 if rotation != "estimate" or found.scalars["icom"]["rotation_deg"] < 0 else -1
        np.testing.assert_allclose(sign * found.arrays["icom"]["phase"], specimen.blurred, atol=tolerance)
        assert abs(abs(found.scalars["icom"]["rotation_estimate_deg"]) - 90) < 1.0


def test_transposed_frames_are_told_and_left_alone(kernel: SimpleNamespace, specimen: SimpleNamespace) -> None:
    transposed = np.ascontiguousarray(specimen.frames.swapaxes(2, 3))
    y, x = specimen.facts["det_axes"]
    found = kernel.reduce(transposed, kernel.spec(ICOM, "icom"), **(specimen.facts | {"det_axes": (x, y)}))
    scalars = found.scalars["icom"]
    assert scalars["rotation_quality_transposed"] > 0.99 > scalars["rotation_quality"]
    back = {"orientation": kernel.Orientation(transpose=True)}
    right = kernel.reduce(transposed, kernel.spec(ICOM, "icom"), **back, **(specimen.facts | {"det_axes": (x, y)}))
    np.testing.assert_allclose(right.arrays["icom"]["phase"], specimen.blurred, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.floats(-89.5, 89.5), st.integers(0, 99), st.floats(0.2, 5.0))
def test_any_rotation_is_found_and_undone(degrees: float, seed: int, step: float) -> None:
    steps = (step, 1.0)
    truth = gradient(waves((40, 36), seed), steps)
    radians = np.radians(degrees)  # the oracle is complex multiplication: x + iy turned by exp(i t)
    seen = (truth[1] + 1j * truth[0]) * np.exp(-1j * radians)
    found = fields.rotation((seen.imag, seen.real), steps)
    # differences of waves of one and two periods are wrong by different shares, so the curl is not quite 0
    assert abs((found.degrees - degrees + 90) % 180 - 90) < 0.3
    assert found.quality > 0.9999
    y, x = fields.rotated((seen.imag, seen.real), degrees)
    np.testing.assert_allclose(y, truth[0], atol=1e-12)
    np.testing.assert_allclose(x, truth[1], atol=1e-12)


@pytest.mark.parametrize("quarter", range(-5, 6))
def test_quarter_turns_are_exact(quarter: int) -> None:
    rng = np.random.default_rng(2)
    y, x = rng.normal(size=(2, 3, 4))
    got = fields.rotated((y, x), 90.0 * quarter)
    whole = (x + 1j * y) * 1j ** (quarter % 4)
    np.testing.assert_array_equal(got, (whole.imag, whole.real))


def test_divergence_and_curl_of_known_fields(kernel: SimpleNamespace) -> None:
    i, j = np.indices((7, 5), dtype=float)
    y, x = 0.25 * i - 0.5 * j + 9, 0.125 * j + 0.375 * i + 9
    data = spots(y, x, (20, 20))
    found = kernel.reduce(data, kernel.spec(ICOM, "icom"))
    np.testing.assert_allclose(found.arrays["icom"]["divergence"], 0.25 + 0.125, atol=1e-12)
    np.testing.assert_allclose(found.arrays["icom"]["curl"], -0.5 - 0.375, atol=1e-12)  # dFy/dx - dFx/dy
    # a plane is de-scan: it is told, kept, and no rotation is read from it
    scalars = found.scalars["icom"]
    slopes = [scalars[f"descan_{c}_per_scan_{a}"] for c in "yx" for a in "yx"]
    assert slopes == pytest.approx([0.25, -0.5, 0.375, 0.125], abs=1e-9)
    left = kernel.reduce(data, kernel.spec(ICOM, "icom", remove_descan=True)).arrays["icom"]
    np.testing.assert_allclose(left["divergence"], 0, atol=1e-12)
    np.testing.assert_allclose(left["curl"], 0, atol=1e-12)


def test_steps_and_pixels_that_differ_along_y_and_x(kernel: SimpleNamespace) -> None:
    """In mrad with the voltage: one pixel is 2 pi / wavelength * angle."""
    steps, pixels, volts = (0.5, 2.0), (0.3, 0.7), 80e3
    truth = 3 * waves((24, 18))
    gy, gx = gradient(truth, steps)
    wavelength = 4.1757e-3  # nm at 80 kV, from tables
    y, x = (g * wavelength / (2 * np.pi) * 1e3 / p for g, p in zip((gy, gx), pixels, strict=True))
    facts = {
        "det_axes": axes("mrad", *pixels, "qy qx", offset=7.0),
        "scan_axes": axes("Å", *(10 * s for s in steps), "scan_y scan_x", offset=-4.0),
        "metadata": {"high_tension_v": volts},
    }
    data = spots(y + 15.5, x + 16.25, (32, 32))
    found = kernel.reduce(data, kernel.spec(ICOM, "icom"), **facts)
    np.testing.assert_allclose(found.arrays["icom"]["phase"], truth, atol=1e-4 * np.abs(truth).max())
    other = kernel.reduce(data, kernel.spec(ICOM, "icom", voltage_kv=300), **facts)  # the recipe's wins
    ratio = calibration.wavelength_nm(volts) / calibration.wavelength_nm(300e3)
    np.testing.assert_allclose(other.arrays["icom"]["phase"], truth * ratio, atol=1e-3)


@pytest.mark.parametrize(("kv", "pm"), [(60, 4.8661), (80, 4.1757), (100, 3.7014), (200, 2.5079), (300, 1.9687)])
def test_wavelengths_are_those_of_the_tables(kv: float, pm: float) -> None:
    """Three digits are in Williams and Carter 2009, Transmission Electron Microscopy, table 1.2."""
    assert calibration.wavelength_nm(kv * 1e3) * 1e3 == pytest.approx(pm, abs=6e-5)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, "not calibrated"),
        ({"det_axes": axes("mrad", 1, 1, "a b"), "scan_axes": axes("nm", 1, 1, "c d")}, "voltage is unknown"),
        ({"det_axes": axes("1/nm", 1, 1, "a b"), "scan_axes": axes("V", 1, 1, "c d")}, "scan is in V"),
        ({"det_axes": axes("eV", 1, 1, "a b"), "scan_axes": axes("nm", 1, 1, "c d")}, "unit is no angle"),
        ({"det_axes": axes("1/nm", 1, -1, "a b"), "scan_axes": axes("nm", 1, 1, "c d")}, "runs backwards"),
    ],
)
def test_without_calibration_it_says_px_and_why(kernel: SimpleNamespace, facts: dict, why: str) -> None:
    truth = waves((12, 10))
    gy, gx = gradient(truth)
    found = kernel.reduce(spots(gy + 4, gx + 5, (10, 10)), kernel.spec(ICOM, "icom"), **facts)
    np.testing.assert_allclose(found.arrays["icom"]["phase"], truth, atol=1e-12)
    assert why in found.scalars["icom"]["uncalibrated"]


def test_constant_field_has_no_rotation(kernel: SimpleNamespace) -> None:
    data = np.zeros((3, 4, 6, 6), np.uint8)
    data[..., 2, 3] = 9
    found = kernel.reduce(data, kernel.spec(ICOM, "icom", rotation="estimate"))
    assert found.scalars["icom"]["rotation_deg"] == 0.0
    assert math.isnan(found.scalars["icom"]["rotation_estimate_deg"])
    np.testing.assert_allclose(found.arrays["icom"]["phase"], 0.0, atol=1e-12)


# --- differential phase contrast


def discs(y: np.ndarray, x: np.ndarray, radius: float, size: int) -> np.ndarray:
    """An even disc at each position, its rim shared between pixels."""
    i = np.arange(size) - (size - 1) / 2
    found = np.empty((*y.shape, size, size))
    for at in np.ndindex(y.shape):
        found[at] = np.clip(radius + 0.5 - np.hypot(i[:, None] - y[at], i[None, :] - x[at]), 0, 1)
    return 100 * found


@pytest.mark.parametrize(("segments", "turn", "inner"), [(4, 0.0, 0.0), (4, 45.0, 0.0), (8, 10.0, 0.0), (4, 0.0, 20.0)])
def test_a_shifted_disc_gives_its_shift(kernel: SimpleNamespace, segments: int, turn: float, inner: float) -> None:
    truth = 3.0 * waves((8, 9))
    y, x = gradient(truth)
    parameters = {"segments": segments, "turn": turn, "inner": inner, "outer": 46.0, "disc_radius": 36.0}
    found = kernel.reduce(discs(y, x, 36.0, 96), kernel.spec(DPC, "dpc", **parameters)).arrays["dpc"]
    size = max(np.abs(y).max(), np.abs(x).max())
    assert size > 1.0
    np.testing.assert_allclose(found["y"], y, atol=0.04 * size)
    np.testing.assert_allclose(found["x"], x, atol=0.04 * size)
    np.testing.assert_allclose(found["phase"], truth, atol=0.04 * np.abs(truth).max())


def test_quadrants_are_a_minus_c_over_the_total(kernel: SimpleNamespace) -> None:
    data = np.random.default_rng(5).integers(0, 900, (3, 4, 9, 9)).astype(np.uint16)
    data[2, 1] = 0
    found = kernel.reduce(data, kernel.spec(DPC, "dpc", inner=1.0, outer=4.0))
    i, j = np.indices((9, 9)) - 4
    ring = (i**2 + j**2 > 1) & (i**2 + j**2 <= 16)
    # quadrants by comparing whole numbers: the ray at -45 degrees belongs to the first
    a, c = ring & (j > i) & (j >= -i), ring & (j < i) & (j <= -i)
    b, d = ring & (i >= j) & (i > -j), ring & (i <= j) & (i < -j)
    sums = [data[..., q].astype(float).sum(axis=-1) for q in (a, b, c, d)]
    total = sum(sums)
    np.testing.assert_array_equal(found.arrays["dpc"]["total"], total)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.arrays["dpc"]["x"], (sums[0] - sums[2]) / total, atol=1e-15)
        np.testing.assert_allclose(found.arrays["dpc"]["y"], (sums[1] - sums[3]) / total, atol=1e-15)
    assert found.scalars["dpc"]["frames_without_counts"] == 1
    assert found.scalars["dpc"]["uncalibrated"] == "disc_radius is not given"


def test_segments_of_the_simulated_specimen_agree_with_its_centre_of_mass(
    kernel: SimpleNamespace, specimen: SimpleNamespace
) -> None:
    """A weak phase, sign and size: segments pass a little less contrast than the centre of mass does."""
    found = kernel.reduce(
        specimen.frames,
        kernel.spec(DPC, "dpc", unit="1/nm", outer=12.0, disc_radius=8.0, centre=[24.0, 20.0]),
        **specimen.facts,
    )
    got, want = found.arrays["dpc"]["phase"], specimen.blurred
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.97
    assert 0.7 < (got * want).sum() / (want * want).sum() < 1.3


@pytest.mark.parametrize(
    ("use", "parameters", "message"),
    [
        (ICOM, {"rotation": float("inf")}, "no angle"),
        (ICOM, {"rotation": "curl"}, "rotation"),
        (ICOM, {"centre": [1.0, 1.0]}, "radius"),
        (ICOM, {"voltage_kv": -1.0}, "no voltage"),
        (DPC, {"segments": 5}, "even number"),
        (DPC, {"inner": 4.0, "outer": 3.0}, "no ring"),
        (DPC, {"turn": float("nan")}, "no angle"),
        (DPC, {"disc_radius": 9.0}, "beyond the outer"),
        (DPC, {"disc_radius": 2.0, "inner": 3.0}, "not beyond the inner"),
        (DPC, {"inner": 0.1, "outer": 0.2}, "hold no pixel"),
    ],
)
def test_phases_that_cannot_be(kernel: SimpleNamespace, use: str, parameters: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kernel.reduce(np.ones((2, 2, 8, 8), np.uint8), kernel.spec(use, "p", **parameters))


@pytest.mark.parametrize("use", [ICOM, DPC])
def test_ranks_and_blocks_do_not_matter(kernel: SimpleNamespace, use: str) -> None:
    data = np.random.default_rng(3).integers(0, 4000, (5, 7, 12, 10)).astype(np.uint16)
    one = kernel.reduce(data, kernel.spec(use, "p"))
    three = kernel.reduce(data, kernel.spec(use, "p"), ranks=3, block_bytes=1)
    for name, array in one.arrays["p"].items():
        np.testing.assert_array_equal(array, three.arrays["p"][name])
