"""Brings defocus and twofold astigmatism to zero: a 4D scan, an estimate, a gate, a correction, and again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from emflow.agent.policies import parallax
from emflow.agent.policies.parallax import Estimate
from emflow.agent.policies.reading import distrusted
from emflow.agent.policies.segments import Refused, Segments, read
from emflow.agent.protocol import Decision, History, Result, Verdict
from emflow.microscope.protocol import Action, Count, Scan4d, Set

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

CONTROLS = ("C10_nm", "C12a_nm", "C12b_nm")

MOVED_NM = 0.05
"""Controls that differ by more than this from those of the scan were moved by somebody since."""

ANSWER_NM = 10.0
ANSWER_SHARE = 0.4
"""How far the change from one estimate to the next may be from the change of the controls: this much, and this share
of it.  A first estimate from a small field can be off by a fifth."""

STEP_SHARE = 0.05
"""How far the step of a scan may be from the one that was commanded: instruments round their fields."""

SHIFT_SHARE = 0.15
"""The finer scan is taken once the shifts that are left are below this share of its field."""


class CorrectAberrations(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Correct C10, C12a and C12b from the parallax of segment images.

    Attributes
    ----------
    target_nm : float
        The end point: ``|C10|`` and ``|C12|``, each with its standard error added, are below it.
    shape : (int, int)
        Positions ``(y, x)`` of a scan.
    step_nm, fine_step_nm : float
        Between positions, at first, and once the shifts that are left fit the smaller field.
    exposure_us : float
        Of each position.
    max_step_nm : float
        The most by which a decision moves C10, and the vector (C12a, C12b).
    damping : float
        Share of an estimate that is corrected.
    patience : int
        Results in a row that the gate refused, after which it gives up.
    gate : bool
        False trusts every estimate; only for comparisons.
    min_correlation, min_inliers, min_smoothness : float
        The gate: least `Estimate.correlation`, `Estimate.inliers`, `Estimate.smoothness`.
    max_residual_px : float
        The gate: largest `Estimate.residual_px`.
    min_segments : int
        The gate: fewest bright segments.
    """

    target_nm: Positive = 2.5
    shape: tuple[Count, Count] = (64, 64)
    step_nm: Positive = 1.25
    fine_step_nm: Positive = 0.5
    exposure_us: Positive = 200.0
    max_step_nm: Positive = 300.0
    damping: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    patience: Annotated[int, msgspec.Meta(ge=1)] = 3
    gate: bool = True
    min_correlation: Share = 0.3
    min_inliers: Share = 0.6
    min_smoothness: Share = 0.3
    max_residual_px: Positive = 0.5
    min_segments: Annotated[int, msgspec.Meta(ge=6)] = 12

    recipe: ClassVar[str] = "aberrations"
    controls: ClassVar[tuple[str, ...]] = CONTROLS

    def accepts_partial(self, coverage: float) -> bool:
        """Only whole scans."""
        return coverage >= 1

    def decide(self, result: Result | None, settings: Mapping[str, float], history: History) -> Decision:
        """Scan first; then correct, end, or refuse the result and scan again."""
        if result is None:
            return Decision(reason="the first scan", actions=(self._scan(self.step_nm),))
        try:
            segments = read(result, self.controls)
            _same_steps(segments, history)
            moved = [n for n in self.controls if abs(settings.get(n, math.inf) - segments.settings[n]) > MOVED_NM]
            if moved:
                raise Refused(f"{', '.join(moved)} moved since the scan was made")
            if len(segments.angles) < self.min_segments:
                raise Refused(f"{len(segments.angles)} bright segments, fewer than {self.min_segments}")
            found = parallax.estimate(segments.images, segments.angles, segments.steps_nm)
            if not (np.isfinite(found.coefficients_nm).all() and np.isfinite(found.errors_nm).all()):
                raise Refused("the images can't be aligned")
        except (Refused, np.linalg.LinAlgError) as error:
            return self._refuse(str(error), {}, history)
        measured = _measured(found)
        doubts = self._doubts(found, segments, history) if self.gate else []
        if doubts:
            return self._refuse("; ".join(doubts), measured, history)
        return self._correct(found, segments, measured)

    def _doubts(self, found: Estimate, segments: Segments, history: History) -> list[str]:
        """Why an estimate can't be trusted; empty if it can."""
        limits = (
            ("correlation", found.correlation, self.min_correlation),
            ("share of inliers", found.inliers, self.min_inliers),
            ("smoothness", found.smoothness, self.min_smoothness),
        )
        doubts = [f"{what} {value:.2f} is below {least:g}" for what, value, least in limits if not value >= least]
        if not found.residual_px <= self.max_residual_px:
            doubts.append(f"residual {found.residual_px:.2f} px is above {self.max_residual_px:g}")
        if found.at_bound:
            doubts.append("the aberrations are on the edge of the search")
        return doubts + _no_answer(found, segments, history)

    def _refuse(self, why: str, measured: dict[str, float], history: History) -> Decision:
        """Distrust the result: no control moves; scan again, or give up."""
        refused = distrusted(history) + 1
        if refused >= self.patience:
            reason = f"refused: {why}; {refused} in a row, gives up"
            return Decision(reason=reason, verdict=Verdict.GIVE_UP, measured=measured, trusted=False)
        again = (self._scan(self.step_nm),)
        return Decision(reason=f"refused: {why}; scans again", actions=again, measured=measured, trusted=False)

    def _correct(self, found: Estimate, segments: Segments, measured: dict[str, float]) -> Decision:
        """Correct what was found, within the step limit, and scan again unless the target is reached."""
        aberration, errors = found.coefficients_nm, found.errors_nm
        step = _clipped(self.damping * aberration, self.max_step_nm)
        limited = bool(np.any(step != self.damping * aberration))
        values = {n: round(segments.settings[n] - float(s), 3) + 0.0 for n, s in zip(self.controls, step, strict=True)}
        said = f"C10 {aberration[0]:.1f} nm, C12 ({aberration[1]:.1f}, {aberration[2]:.1f}) nm"
        merit = round(max(abs(float(aberration[0])), math.hypot(*aberration[1:])), 3)
        low = abs(aberration[0]) + errors[0] <= self.target_nm
        if low and math.hypot(*aberration[1:]) + float(errors[1:].max()) <= self.target_nm:
            helps = bool(np.any(np.abs(aberration) > 2 * errors))
            reason = f"{said}: target reached" + (", with a last correction" if helps else "")
            last: tuple[Action, ...] = (Set(values=values),) if helps else ()
            return Decision(
                reason=reason, verdict=Verdict.TARGET, actions=last, measured=measured, merit=merit, merit_unit="nm"
            )
        rest = np.abs(aberration - step) + 0.1 * np.abs(aberration) + 3 * errors
        shift_nm = float(rest[0] + np.hypot(rest[1], rest[2])) * segments.reach_mrad * 1e-3
        fine = shift_nm <= SHIFT_SHARE * self.fine_step_nm * min(self.shape)
        reason = f"{said}: corrected" + (f" within the limit of {self.max_step_nm:g} nm" if limited else "")
        actions = (Set(values=values), self._scan(self.fine_step_nm if fine else self.step_nm))
        return Decision(reason=reason, actions=actions, measured=measured, merit=merit, merit_unit="nm")

    def _scan(self, step_nm: float) -> Scan4d:
        return Scan4d(shape=self.shape, step_nm=step_nm, exposure_us=self.exposure_us)


def _no_answer(found: Estimate, segments: Segments, history: History) -> list[str]:
    """Doubt, if the aberrations did not follow the controls since the last result that was trusted.

    It finds what one scan can't show: a sign, an axis or a calibration that is wrong, and results that only look good.
    """
    before = next((s for s in reversed(history) if s.settings and s.decision.trusted and s.decision.measured), None)
    if before is None or not all(n in before.settings and n in before.decision.measured for n in CONTROLS):
        return []
    moved = np.array([segments.settings[n] - before.settings[n] for n in CONTROLS])
    expected = np.array([before.decision.measured[n] for n in CONTROLS]) + moved
    off = float(np.linalg.norm(found.coefficients_nm - expected))
    allowed = ANSWER_NM + ANSWER_SHARE * float(np.linalg.norm(moved))
    if off <= allowed:
        return []
    return [f"the aberrations did not follow the controls: {off:.0f} nm off, {allowed:.0f} allowed"]


def _same_steps(segments: Segments, history: History) -> None:
    """`Refused` if the result is not of a scan with the step that the newest decision had executed."""
    newest = history[-1] if history and any(r.acquired for r in history[-1].receipts) else None
    wanted = [a.step_nm for a in newest.decision.actions if isinstance(a, Scan4d)] if newest else []
    off = [s for s in segments.steps_nm for w in wanted[-1:] if not abs(abs(s) - w) <= STEP_SHARE * w]
    if off:
        raise Refused(f"the scan has a step of {off[0]:.4g} nm, and {wanted[-1]:g} nm was commanded")


def _clipped(step: np.ndarray, limit: float) -> np.ndarray:
    """C10 within the limit, and the vector (C12a, C12b) within it in length: (3,) ndarray, nm."""
    length = math.hypot(step[1], step[2])
    shorter = min(1.0, limit / length) if length > 0 else 1.0
    return np.array([min(max(step[0], -limit), limit), step[1] * shorter, step[2] * shorter])


def _measured(found: Estimate) -> dict[str, float]:
    """What goes into the log, rounded so that another machine's last digits do not matter."""
    numbers = dict(zip(CONTROLS, map(float, found.coefficients_nm), strict=True))
    numbers |= {f"{n.removesuffix('_nm')}_error_nm": float(e) for n, e in zip(CONTROLS, found.errors_nm, strict=True)}
    numbers |= {"residual_nm": found.residual_nm, "residual_px": found.residual_px}
    numbers |= {"correlation": found.correlation, "inliers": found.inliers, "smoothness": found.smoothness}
    numbers["segments"] = float(found.segments)
    return {name: round(value, 3) + 0.0 for name, value in numbers.items() if math.isfinite(value)}
