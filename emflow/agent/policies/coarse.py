"""Where the search for aberrations begins: the coefficients that align neighbouring segments best."""

from __future__ import annotations

import numpy as np

from emflow.agent.policies import registration

REACH_PITCHES = 2.3
"""Segments that many typical distances apart are neighbours: far enough for precision, near for one peak."""

COARSE_STEPS = 10
"""Steps of the first search from 0 to its bound, along each coefficient."""

UPSAMPLING = 2
"""The correlations are read at the nearest point of a grid this much finer than the scan: a quarter of a pixel off."""

FINEST_PX = 0.5
"""Step of the last search, as the shift between the farthest neighbours; what is left, the alignment finds."""


def coarse(stack: np.ndarray, design: np.ndarray, weight: np.ndarray, bound: float) -> np.ndarray:
    """Coefficients, (3,) in nm, that align neighbouring segments best.

    Parameters
    ----------
    stack : (k, ny, nx) ndarray of float64
        Images of mean 0.
    design : (k, 2, 3) ndarray of float64
        Shift in pixels per nm.
    weight : (k,) ndarray of float64
        Trust in each image.
    bound : float
        Search over ``|C10| + |C12| <= bound``, in nm.

    Notes
    -----
    The power of the aligned sum is the sum over all pairs of segments of their cross-correlation at the shift between
    them.  That shift depends only on the difference of their angles, so pairs of equal difference are added before
    anything is searched; and it is small for neighbours, which therefore show the same specimen and have one peak.
    """
    difference, cross = _neighbours(stack, design, weight)
    correlation = _upsampled(cross, stack.shape[1:])
    finest = FINEST_PX / float(np.abs(difference).max())
    centre, reach, step = np.zeros(3), bound, max(bound / COARSE_STEPS, finest)
    while True:
        axis = np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1) * step
        grid = centre + np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        grid = grid[np.abs(grid[:, 0]) + np.hypot(grid[:, 1], grid[:, 2]) <= bound]
        merit = np.zeros(len(grid))
        for one, delta in zip(correlation, UPSAMPLING * difference, strict=True):
            merit += _nearest(one, grid @ delta.T)
        centre = np.array(grid[int(merit.argmax())])
        if step <= finest:
            return centre
        reach, step = step, max(step / 4, finest)


def _neighbours(stack: np.ndarray, design: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences of `design` between neighbouring segments, (p, 2, 3), and the sums of their cross-spectra.

    Pairs whose differences agree within a tenth of the distance share a sum.
    """
    place = design[:, :, 0]
    apart = place[:, None, :] - place[None, :, :]
    distance = np.hypot(apart[..., 0], apart[..., 1])
    pitch = float(np.median(np.where(distance > 0, distance, np.inf).min(axis=1)))
    forward = (apart[..., 0] > 0.1 * pitch) | ((np.abs(apart[..., 0]) <= 0.1 * pitch) & (apart[..., 1] > 0))
    first, second = np.nonzero(forward & (distance < REACH_PITCHES * pitch))
    kinds, which = np.unique(np.rint(apart[first, second] / (0.2 * pitch)), axis=0, return_inverse=True)
    transforms = registration.spectra(stack)
    total = np.zeros((len(kinds), *transforms.shape[1:]), np.complex128)
    trust = np.zeros(len(kinds))
    steps = np.zeros((len(kinds), 2, 3))
    for i, j, kind in zip(first, second, which.reshape(-1), strict=True):
        w = weight[i] * weight[j]
        total[kind] += w * np.conj(transforms[i]) * transforms[j]
        steps[kind] += w * (design[i] - design[j])
        trust[kind] += w
    return steps / trust[:, None, None], total * registration.weights(stack.shape[1:]) / 2


def _upsampled(cross: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Correlations on a grid `UPSAMPLING` times finer than the scan, (p, fine_y, fine_x) float64."""
    ny, nx = shape
    fine = np.zeros((len(cross), UPSAMPLING * ny, cross.shape[2]), np.complex128)
    low = (ny + 1) // 2
    fine[:, :low] = cross[:, :low]
    if ny > low:
        fine[:, low - ny :] = cross[:, low:]
    found: np.ndarray = np.fft.irfft2(fine, s=(UPSAMPLING * ny, UPSAMPLING * nx))
    return found


def _nearest(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values of a periodic image at the pixels nearest to positions (n, 2)."""
    y, x = np.rint(at).astype(np.intp).T
    found: np.ndarray = image[y % image.shape[0], x % image.shape[1]]
    return found
