"""Waits for the result of a commanded scan, and looks at what comes instead."""

from __future__ import annotations

import os
import time
from pathlib import Path

from emflow.agent import evidence, judging, resting
from emflow.agent.control import Finished
from emflow.agent.opening import Experiment
from emflow.agent.protocol import Ending
from emflow.agent.records import Planned, Seen
from emflow.agent.results import LoadedResult
from emflow.microscope.protocol import Acquired, Receipt
from emflow.records import acquisition_id

POLL_S = 0.01
"""How often a result is looked for: a few stats each time."""

STRAYS_S = 1.0
"""How often results are looked for that nothing waits for."""


class Waiting:
    """Looks for results of an experiment's own scans."""

    def __init__(self, experiment: Experiment) -> None:
        self._x = experiment
        self._finder = evidence.Finder(experiment.config.service.runs)
        self._strays_at = 0.0

    def wait(self, acquired: Acquired) -> Path:
        """Run folder of the first complete attempt at a scan.

        Raises
        ------
        Finished
            It did not come in time, or somebody asked to stop.
        """
        x = self._x
        acquisition = self._id(acquired)
        timeout_s, limit_s = x.config.agent.result_timeout_s, x.started.rules.max_time_s
        until = x.clock.seconds + timeout_s
        while (folder := self._finder.complete(acquisition)) is None:
            resting.checkpoint(x)
            if x.clock.seconds > until:
                said = self._finder.said(acquisition)
                raise Finished(Ending.FAILED, f"no result of {acquired.path} within {timeout_s:g} s: {said}")
            if limit_s and x.clock.seconds > limit_s:
                raise Finished(Ending.TIME, f"{x.clock.seconds:.0f} s of {limit_s:g} s")
            self._strays()
            x.control.nap(POLL_S)
        return folder

    def examine(self, folder: Path, command: Planned, receipt: Receipt) -> tuple[Seen, LoadedResult | None]:
        """Read the result that was waited for, and check it."""
        x = self._x
        x.events.write("found", subject=f"{folder.parent.name}-{folder.name}", trace=command.trace)
        wanted = evidence.Wanted(
            acquisition=folder.parent.name,
            command=command.id,
            settings=x.progress.scan_settings(command.action, receipt),
            changed=_changed(x.started.controls, command, receipt),
            used=frozenset(x.progress.used),
            made_by=x.recipe.reductions,
        )
        return evidence.examine(self._finder.root, folder, wanted, x.policy, x.started.reductions)

    def _strays(self) -> None:
        """Log results of this experiment's own scans that no decision waits for; nothing follows from them."""
        if time.monotonic() - self._strays_at < STRAYS_S:
            return
        self._strays_at = time.monotonic()
        known = {seen.acquisition for seen in self._x.progress.seen}
        for command, acquired in self._x.progress.strays():
            acquisition = self._id(acquired)
            folder = None if acquisition in known else self._finder.complete(acquisition)
            if folder:
                self._x.record(evidence.stale(self._finder.root, folder, command))

    def _id(self, acquired: Acquired) -> str:
        return acquisition_id(self._x.started.share, os.fsencode(acquired.path), 0)


def _changed(controls: tuple[str, ...], command: Planned, receipt: Receipt) -> tuple[str, ...]:
    """Controls of the policy that somebody turned while a scan was made; a batch turns them itself."""
    if hasattr(command.action, "actions"):
        return ()
    before, after = receipt.before, receipt.after
    return tuple(c for c in controls if c in before and c in after and not judging.same(before[c], after[c]))
