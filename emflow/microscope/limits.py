"""The envelope: what may be asked of the microscope at all; refused by name, never clipped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from emflow.microscope.protocol import Acquire, Action, Batch, Camera, Refusal, Scan, Scan4d, Set, Single
from emflow.microscope.settings import Limits, Range

MINUTE_S = 60.0


def actions_of(action: Action) -> tuple[Single, ...]:
    """The actions of a batch, or the one that it is."""
    return action.actions if isinstance(action, Batch) else (action,)


def acquisitions_of(action: Action) -> list[Acquire]:
    """Those that make a file."""
    return [one for one in actions_of(action) if not isinstance(one, Set)]


class Envelope:
    """Checks actions against the limits, and counts moves.

    Parameters
    ----------
    limits : Limits
        What is allowed.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._moves: dict[str, deque[float]] = {name: deque() for name in limits.controls}

    def outside(self, action: Action) -> Refusal | None:
        """What is beyond the absolute limits, whatever the microscope does now; None: nothing."""
        for one in actions_of(action):
            found = self._values(one) if isinstance(one, Set) else self._acquisition(one)
            if found:
                return Refusal(code="limits", reason=found)
        return None

    def refused(
        self, actions: Sequence[Single], current: Mapping[str, float], doses_e: Sequence[float], spent_e: float
    ) -> Refusal | None:
        """What is wrong with doing ``actions`` now, in order; None: nothing.

        Parameters
        ----------
        actions : sequence of Set, Scan, Camera or Scan4d
            Each is judged as if those before it were done.
        current : mapping
            Controls as they are.
        doses_e : sequence of float
            Electrons of each action, 0 for a Set.
        spent_e : float
            Electrons of all commands so far, for the total budget.
        """
        values = dict(current)
        moves = {name: self._recent(name) for name in self.limits.controls}
        for one in actions:
            found = self._values(one) if isinstance(one, Set) else self._acquisition(one)
            found = found or (self._steps(one, values, moves) if isinstance(one, Set) else None)
            if found:
                return Refusal(code="limits", reason=found)
        found = self._dose(doses_e, spent_e)
        return Refusal(code="limits", reason=found) if found else None

    def moved(self, action: Set, before: Mapping[str, float]) -> None:
        """Count the moves of a Set that is about to be made."""
        for name, value in action.values.items():
            if value != before.get(name):
                self._moves[name].append(self._clock())

    def earlier(self, action: Action, before: Mapping[str, float], ago_s: float) -> None:
        """Count the moves of a command from before a restart: all of them, since how far it came isn't known."""
        values, at_s = dict(before), self._clock() - max(ago_s, 0.0)
        for one in actions_of(action):
            targets = one.values if isinstance(one, Set) else {}
            for name, value in targets.items():
                if name in self._moves and value != values.get(name):
                    self._moves[name].append(at_s)
            values |= targets

    def differs(self, expects: Mapping[str, float], current: Mapping[str, float]) -> str | None:
        """The first control that is not where a command believes it, as text; None: all are."""
        for name, value in expects.items():
            now = current.get(name)
            if now is None:
                return f"{name}: no control of this microscope is called so"
            tolerance = self.limits.controls[name].tolerance if name in self.limits.controls else 0.0
            if not abs(now - value) <= tolerance:
                return f"{name} is {now!r}, not {value!r} as the command expects (tolerance {tolerance:g})"
        return None

    def holds(self, values: Mapping[str, float], current: Mapping[str, float]) -> bool:
        """Whether controls have values, within their tolerance."""
        return self.differs(values, current) is None

    def _recent(self, name: str) -> int:
        moves = self._moves[name]
        while moves and moves[0] <= self._clock() - MINUTE_S:
            moves.popleft()
        return len(moves)

    def _values(self, action: Set) -> str | None:
        if not action.values:
            return "set: no control is named"
        for name, value in action.values.items():
            control = self.limits.controls.get(name)
            if control is None:
                known = ", ".join(self.limits.controls) or "none"
                return f"{name}: may not be set here; what may: {known}"
            if found := _beyond(name, value, control.min, control.max):
                return found
        return None

    def _steps(self, action: Set, values: dict[str, float], moves: dict[str, int]) -> str | None:
        """Check the changes of a Set, and note them in ``values`` and ``moves``."""
        for name, value in action.values.items():
            control, now = self.limits.controls[name], values.get(name)
            if now is None:
                return f"{name}: no control of this microscope is called so"
            if not abs(value - now) <= control.max_step:
                return (
                    f"{name}: {value!r} is {abs(value - now):g} from {now!r}; one step is at most {control.max_step:g}"
                )
            moves[name] += value != now
            if moves[name] > control.per_minute:
                return (
                    f"{name}: {value!r} would be move {moves[name]} within a minute; {control.per_minute} are allowed"
                )
            values[name] = value
        return None

    def _acquisition(self, action: Acquire) -> str | None:
        limits = self.limits
        numbers: list[tuple[str, float, Range | None]] = []
        if isinstance(action, (Scan, Scan4d)):
            numbers.append(("step_nm", action.step_nm, limits.step_nm))
            numbers += [("centre_nm", value, limits.centre_nm) for value in action.centre_nm]
        if isinstance(action, (Camera, Scan4d)):
            numbers.append(("exposure_us", action.exposure_us, limits.exposure_us))
        if isinstance(action, Scan):
            numbers.append(("dwell_us", action.dwell_us, limits.dwell_us))
        for name, value, allowed in numbers:
            lowest, highest = (allowed.min, allowed.max) if allowed else (-math.inf, math.inf)
            if found := _beyond(name, value, lowest, highest):
                return found
            if name != "centre_nm" and value <= 0:
                return f"{name}: {value!r} must be above 0"
        frames = action.frames if isinstance(action, Camera) else math.prod(action.shape)
        if limits.max_frames is not None and frames > limits.max_frames:
            return f"frames: {frames} are more than {limits.max_frames}"
        return None

    def _dose(self, doses_e: Iterable[float], spent_e: float) -> str | None:
        total = 0.0
        for dose_e in doses_e:
            if not (math.isfinite(dose_e) and dose_e >= 0):
                return f"dose_e: {dose_e!r} is no dose"
            total += dose_e
        if self.limits.max_dose_e is not None and total > self.limits.max_dose_e:
            return f"dose_e: {total:.4g} electrons are more than {self.limits.max_dose_e:.4g} for one command"
        if total and self.limits.max_total_dose_e is not None and spent_e + total > self.limits.max_total_dose_e:
            left = max(0.0, self.limits.max_total_dose_e - spent_e)
            return (
                f"dose_e: {total:.4g} electrons are more than the {left:.4g} left of {self.limits.max_total_dose_e:.4g}"
            )
        return None


def _beyond(name: str, value: float, lowest: float, highest: float) -> str | None:
    if not math.isfinite(value):
        return f"{name}: {value!r} is not a finite number"
    if not lowest <= value <= highest:
        return f"{name}: {value!r} is outside {lowest:g} to {highest:g}"
    return None
