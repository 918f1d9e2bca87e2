"""The simplest policy, to be read first: look at one field after the other until one has enough signal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec

from emflow.agent.policies.reading import distrusted, scalar
from emflow.agent.protocol import Decision, History, Result, Verdict
from emflow.microscope.protocol import Count, Scan, Set

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Threshold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scan field after field until a number of the result reaches a threshold.

    Attributes
    ----------
    watch : str
        ``<reduction>.<scalar>`` of the result.
    at_least : float
        The threshold, in the unit of that number; the mean of a dark field image is in counts.
    fields : (int, int)
        Rows and columns of fields that are looked at, the first one where the stage stands; every second row runs
        back, so that the stage never goes far.
    pitch_nm : float
        From one field to the next.
    shape : (int, int)
        Scan positions ``(y, x)``.
    step_nm, dwell_us : float
        Of the scan.
    patience : int
        Results without that number, in a row, after which it gives up.
    """

    watch: str = "image.mean"
    at_least: float = 50.0
    fields: tuple[Count, Count] = (3, 3)
    pitch_nm: Positive = 100.0
    shape: tuple[Count, Count] = (128, 128)
    step_nm: Positive = 0.5
    dwell_us: Positive = 10.0
    patience: Annotated[int, msgspec.Meta(ge=1)] = 3

    recipe: ClassVar[str] = "quick"
    controls: ClassVar[tuple[str, ...]] = ("stage_y_nm", "stage_x_nm")

    def accepts_partial(self, coverage: float) -> bool:
        """Never: the mean of a part says little of the field."""
        return coverage >= 1

    def decide(self, result: Result | None, settings: Mapping[str, float], history: History) -> Decision:  # noqa: ARG002
        """Scan here first; then stop, go to the next field, or give up."""
        scan = Scan(shape=self.shape, step_nm=self.step_nm, dwell_us=self.dwell_us)
        if result is None:
            return Decision(reason="the first field, where the stage stands", actions=(scan,))
        value = scalar(result, self.watch)
        if value is None or result.quality == "INVALID":
            why = f"no finite {self.watch} in result {result.job} ({result.quality})"
            if distrusted(history) + 1 >= self.patience:
                return Decision(reason=f"{why}; gives up", verdict=Verdict.GIVE_UP, trusted=False)
            return Decision(reason=f"{why}; scans the same field again", actions=(scan,), trusted=False)
        said = f"{self.watch} is {value:.4g}"
        measured = {self.watch: value}
        if value >= self.at_least:
            return Decision(reason=f"{said}: enough", verdict=Verdict.TARGET, measured=measured)
        # the first step had no result, and a distrusted one did not move
        seen = sum(step.decision.trusted for step in history)
        if seen >= math.prod(self.fields):
            reason = f"{said}, and none of {seen} fields reached {self.at_least:g}"
            return Decision(reason=reason, verdict=Verdict.GIVE_UP, measured=measured)
        stage = self._place(history[1].settings if len(history) > 1 else result.settings, seen)
        reason = f"{said}, less than {self.at_least:g}: field {seen + 1} of {math.prod(self.fields)}"
        return Decision(reason=reason, actions=(Set(values=stage), scan), measured=measured)

    def _place(self, first: Mapping[str, float], number: int) -> dict[str, float]:
        """Stage position of a field, the first being number 0."""
        row, column = divmod(number, self.fields[1])
        if row % 2:
            column = self.fields[1] - 1 - column
        return {
            name: round(first[name] + self.pitch_nm * n, 3)
            for name, n in zip(self.controls, (row, column), strict=True)
        }
