"""A policy for tests: it sets C10_nm to a number made of the data, and is at its end after some results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from emflow.agent.protocol import Decision, History, Result, Verdict
from emflow.microscope.protocol import Action, Scan4d, Set


class Stepping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scan, then set and scan ``results`` times."""

    recipe: ClassVar[str] = "quick"
    controls: ClassVar[tuple[str, ...]] = ("C10_nm",)

    results: int = 3
    pixels: int = 4
    exposure_us: float = 100.0
    far: float = 1.0
    fails: bool = False
    nan: bool = False
    hangs: bool = False

    def accepts_partial(self, coverage: float) -> bool:
        """Never."""
        return coverage < 0

    def decide(self, result: Result | None, settings: Mapping[str, float], history: History) -> Decision:
        """Set C10_nm to the sum of the virtual image, made small."""
        scan = Scan4d(shape=(self.pixels, self.pixels), step_nm=1.0, exposure_us=self.exposure_us)
        if result is None:
            return Decision(reason="begin", actions=(scan,))
        if self.fails:
            raise RuntimeError("as told")
        while self.hangs:
            time.sleep(0.1)
        image = result.array("bright_field/image")
        (scalar,) = (v for k, v in result.scalars["pattern"].items() if k == "total")
        seen = sum(1 for step in history if step.decision.merit is not None) + 1
        value = round(float(image.sum() % 97) + seen, 3) * self.far + settings["C10_nm"] * 0.0
        actions: tuple[Action, ...] = (Set(values={"C10_nm": float("nan") if self.nan else value}), scan)
        assert result.axes("bright_field/image")[0].name
        return Decision(
            reason=f"result {seen}: total {scalar}",
            verdict=Verdict.TARGET if seen >= self.results else Verdict.GO_ON,
            actions=() if seen >= self.results else actions,
            measured={"value_nm": value},
            merit=float(self.results - seen),
            merit_unit="results",
        )
