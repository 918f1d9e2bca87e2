"""Modes ``observe`` and ``propose``: every new result is decided on, nothing is ever sent, and no lease is taken."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from emflow.agent import judging, resting, stopping
from emflow.agent.control import Finished
from emflow.agent.evidence import Finder, Wanted, examine
from emflow.agent.opening import Experiment
from emflow.agent.protocol import Decision, Ending, Verdict
from emflow.agent.records import Decided, Ended, Seen, planned
from emflow.agent.thinking import thought
from emflow.errors import Unavailable
from emflow.microscope.client import MicroscopeClient

POLL_S = 0.05

_log = logging.getLogger(__name__)


class Observer:
    """Runs one experiment that only looks.

    Controls are read from the microscope where its server answers; a policy that needs them says so where it does not.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.x = experiment
        self._finder = Finder(experiment.config.service.runs)
        self._done = {f.parent.name for f in self._finder.recent(())}
        settings = experiment.config.microscope
        self._client = MicroscopeClient(
            settings.address, role="viewer", name=f"agent {experiment.id}", patience_s=min(settings.patience_s, 2.0)
        )

    def run(self) -> Ended:
        """Run until somebody stops it, the policy is at its end, or a stop rule says so."""
        try:
            resting.go_on(self.x)
            if self.x.progress.last is None:
                decision = self._ask(None, {})
                self._decided(decision, (), self._settings(), time.perf_counter())
            while True:
                self._look()
        except Finished as end:
            ended = Ended(ending=end.ending, reason=end.reason)
        except judging.PolicyError as error:
            ended = Ended(ending=Ending.FAILED, reason=str(error))
        finally:
            self._client.close()
        self.x.record(ended)
        self.x.show("ended")
        return ended

    def _look(self) -> None:
        self.x.show("waiting")
        for folder in list(self._finder.recent(self._done)):
            self.x.control.check_stop()
            if not self.x.control.paused:
                self._done.add(folder.parent.name)
                self._result(folder)
        end = stopping.over(self.x.started.rules, self.x.progress, self.x.clock.seconds)
        most = self.x.started.rules.max_acquisitions
        if end is None and most and self.x.progress.number > most:
            end = (Ending.ACQUISITIONS, f"{most} results")
        if end:
            raise Finished(*end)
        self.x.control.nap(POLL_S)

    def _result(self, folder: Path) -> None:
        begin = time.perf_counter()
        settings = self._settings()
        wanted = Wanted(
            acquisition=folder.parent.name,
            command=None,
            settings=settings,
            used=frozenset(self.x.progress.used),
            made_by=self.x.recipe.reductions,
        )
        seen, result = examine(self._finder.root, folder, wanted, self.x.policy, self.x.started.reductions)
        self.x.events.write("found", subject=seen.job, trace=seen.command or seen.acquisition)
        if result is None:
            self.x.record(seen)
            return
        try:
            name, history = self.x.started.policy, self.x.progress.history
            decision = thought(self.x, lambda: judging.decide(name, self.x.policy, result, settings, history))
        except judging.PolicyError:
            self.x.record(seen)
            raise
        finally:
            result.close()
        self._decided(decision, (seen.job,), settings, begin, seen)
        if decision.verdict is not Verdict.GO_ON:
            gave = decision.verdict is Verdict.GIVE_UP
            raise Finished(Ending.GAVE_UP if gave else Ending.TARGET, decision.reason)

    def _ask(self, result: None, settings: Mapping[str, float]) -> Decision:
        known = settings or self._settings()
        return thought(self.x, lambda: judging.decide(self.x.started.policy, self.x.policy, result, known, ()))

    def _decided(
        self,
        decision: Decision,
        based_on: tuple[str, ...],
        settings: dict[str, float],
        begin: float,
        seen: Seen | None = None,
    ) -> None:
        number = self.x.progress.number
        decided = Decided(
            number=number,
            by="policy",
            based_on=based_on,
            settings=settings,
            decision=decision,
            commands=planned(self.x.id, number, decision.actions),
            seconds=round(time.perf_counter() - begin, 6),
        )
        self.x.record(*([seen] if seen else []), decided)
        self.x.events.write(
            "decided",
            subject=seen.job if seen else self.x.id,
            trace=(seen.command or seen.acquisition) if seen else self.x.id,
            number=number,
            reason=decision.reason,
            verdict=decision.verdict.value,
            merit=decision.merit,
            by="policy",
            seconds=decided.seconds,
        )

    def _settings(self) -> dict[str, float]:
        try:
            return dict(self._client.status().controls)
        except Unavailable as error:
            _log.debug("controls are not known: %s", error)
            return {}
