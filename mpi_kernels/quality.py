"""A verdict on a result, for whoever would act on it."""

from __future__ import annotations

import numpy as np

from mpi_kernels.contract import Quality as Verdict
from mpi_kernels.engine import Reduced
from mpi_kernels.plan import Plan


def judge(plan: Plan, reduced: Reduced) -> tuple[Verdict, tuple[str, ...]]:
    """OK, DOUBTFUL or INVALID, with the reasons in plain words.

    INVALID: no pixel is finite, no frame has any count, or a map holds no finite number at all in every output.
    DOUBTFUL: some pixels are not finite or at the top of their integer type, or some frames have no counts.
    """
    seen, frames = reduced.quality, int(reduced.covered.sum())
    arrays = [a for outputs in reduced.arrays.values() for a in outputs.values()]
    if seen.not_finite == seen.pixels:
        return "INVALID", ("no pixel is finite",)
    if seen.empty_frames == frames:
        return "INVALID", ("no frame has any count",)
    if not any(np.isfinite(a).any() for a in arrays):
        return "INVALID", ("no output holds a finite number",)
    counted = {
        f"{seen.not_finite} of {seen.pixels} pixels are not finite": seen.not_finite,
        f"{seen.empty_frames} of {frames} frames have no counts": seen.empty_frames,
        f"{seen.saturated} of {seen.pixels} pixels are at the top of {plan.header.dtype}": seen.saturated,
    }
    reasons = tuple(text for text, count in counted.items() if count)
    return ("DOUBTFUL" if reasons else "OK"), reasons
