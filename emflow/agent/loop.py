"""The loop: decide, write the decision, send its commands, write the answers, wait for the result, decide again.

Everything that happens is in the log before anything follows from it, and where the loop is, is read from the log
alone: so a process that was killed at any point is followed by one that goes on from there.
"""

from __future__ import annotations

import logging
import time

from emflow.agent import judging, resting, stopping
from emflow.agent.control import Finished
from emflow.agent.notes import write_notes
from emflow.agent.opening import Experiment
from emflow.agent.pressure import Pressure, ease
from emflow.agent.progress import Taken
from emflow.agent.protocol import Decision, Ending, Verdict
from emflow.agent.records import Decided, Ended, Received, Recovered, Seen, Source, Told, planned
from emflow.agent.results import LoadedResult
from emflow.agent.sending import EventCopy, Hand, Held
from emflow.agent.thinking import thought
from emflow.agent.waiting import Waiting
from emflow.errors import Unavailable, printable
from emflow.microscope.protocol import Mode, Outcome, Receipt, Status

BEYOND = frozenset({"limits"})
"""Codes of refusals that the same command would always meet: the microscope's envelope."""

_log = logging.getLogger(__name__)


class Loop:
    """Runs one experiment in mode ``approve`` or ``auto`` to its end."""

    def __init__(self, experiment: Experiment, hand: Hand) -> None:
        self.x = experiment
        self._hand = hand
        self._waiting = Waiting(experiment)
        self._copy = EventCopy(experiment.folder, experiment.id)
        self._pressure = Pressure(experiment.config.service.runs)
        self._ask_first = experiment.resumed

    def run(self) -> Ended:
        """Run to the end and give the last record, which is in the log."""
        try:
            resting.go_on(self.x)
            while True:
                self._turn()
        except Finished as end:
            self._abort(end.reason)  # first: whatever is broken, nothing is left running
            self._stopped()
            ended = Ended(ending=end.ending, reason=end.reason)
        except (judging.PolicyError, Unavailable) as error:
            ended = Ended(ending=Ending.FAILED, reason=str(error))
        self._copy.pull(self._hand.client)
        self.x.record(ended)
        self.x.show("ended")
        return ended

    def _turn(self) -> None:
        last = self.x.progress.last
        if last is None:
            self._begin()
            return
        decision = last.decided.decision
        if last.trouble is None and last.outstanding:
            self._check_rules(decision)
            if self.x.started.mode == "approve":
                resting.approval(self.x, last.decided.number)
            self._carry_out(last)
        self._notes(last)
        if last.trouble is not None:
            self._mend(last, last.trouble)
            return
        if decision.verdict is not Verdict.GO_ON:
            gave = decision.verdict is Verdict.GIVE_UP
            raise Finished(Ending.GAVE_UP if gave else Ending.TARGET, decision.reason)
        self._check_rules(decision)
        self._decide_next()

    def _check_rules(self, decision: Decision) -> None:
        if decision.verdict is Verdict.GO_ON:
            end = stopping.over(self.x.started.rules, self.x.progress, self.x.clock.seconds)
            if end:
                raise Finished(*end)

    # --- decide

    def _begin(self) -> None:
        resting.checkpoint(self.x)
        self.x.show("deciding")
        settings = self._hand.status().controls
        begin = time.perf_counter()
        decision = thought(self.x, lambda: judging.decide(self.x.started.policy, self.x.policy, None, settings, ()))
        self._decided(decision, "policy", (), settings, begin)

    def _decide_next(self) -> None:
        awaited = self.x.progress.awaited()
        if awaited is None:
            raise Finished(Ending.GAVE_UP, "the policy asked for no acquisition, so no result can follow")
        self.x.show("waiting")
        self._copy.pull(self._hand.client)
        folder = self._waiting.wait(awaited[2])
        begin = time.perf_counter()
        self.x.show("deciding")
        seen, result = self._waiting.examine(folder, *awaited[:2])
        resting.checkpoint(self.x)
        try:
            self._judge(seen, result, begin)
        finally:
            if result is not None:
                result.close()  # also under a policy that hangs: h5py may crash at the end over what is open

    def _judge(self, seen: Seen, result: LoadedResult | None, begin: float) -> None:
        progress = self.x.progress
        if result is None:
            decision = judging.gate(seen.distrusted, progress.last_acquire, progress.in_a_row("gate"))
            self._decided(decision, "gate", (seen.job,), progress.known, begin, seen)
            return
        name = self.x.started.policy
        asked = time.perf_counter()
        try:
            decision = thought(
                self.x, lambda: judging.decide(name, self.x.policy, result, progress.known, progress.history)
            )
        except judging.PolicyError:
            self.x.record(seen)
            raise
        thought_s = time.perf_counter() - asked
        self._decided(decision, "policy", (seen.job,), progress.known, begin, seen, thought_s)

    def _decided(
        self,
        decision: Decision,
        by: Source,
        based_on: tuple[str, ...],
        settings: dict[str, float],
        begin: float,
        seen: Seen | None = None,
        thought_s: float = 0.0,
    ) -> None:
        number = self.x.progress.number
        commands = planned(self.x.id, number, decision.actions)
        decided = Decided(
            number=number,
            by=by,
            based_on=based_on,
            settings=dict(settings),
            decision=decision,
            commands=commands,
            seconds=round(time.perf_counter() - begin, 6),
        )
        self.x.record(*([seen] if seen else []), decided)
        trace = seen.command if seen else commands[0].trace if commands else self.x.id
        self.x.events.write(
            "decided",
            subject=seen.job if seen else self.x.id,
            trace=trace,
            number=number,
            reason=decision.reason,
            verdict=decision.verdict.value,
            merit=decision.merit,
            by=by,
            seconds=round(time.perf_counter() - begin, 6),
            policy_seconds=round(thought_s, 6),
        )

    # --- carry out

    def _carry_out(self, last: Taken) -> None:
        """Send what is outstanding, in order, until one is not done."""
        if not last.receipts and not self._ask_first:  # what was begun is finished: it may be what the others wait for
            ease(self.x, self._pressure)
        self.x.show("sending")
        for command in last.outstanding:
            receipt = None
            while receipt is None:
                resting.checkpoint(self.x)
                try:
                    receipt = self._hand.asked(command) if self._ask_first else None
                    self._ask_first = False
                    expects = {c: v for c, v in self.x.progress.known.items() if c in self.x.started.controls}
                    receipt = receipt or self._hand.execute(command, expects, last.decided.based_on)
                except Held as held:
                    resting.hold(self.x, str(held))
            self.x.record(Received(receipt=receipt))
            if receipt.outcome is not Outcome.DONE:
                return

    # --- mend

    def _mend(self, last: Taken, receipt: Receipt) -> None:
        """What follows an answer that is not DONE: the end, or a decision of the loop's own."""
        resting.checkpoint(self.x)
        progress = self.x.progress
        reason = f"{receipt.command} {receipt.outcome.value}"
        reason += f" ({receipt.code}: {printable(receipt.reason)})" if receipt.code or receipt.reason else ""
        refused = receipt.outcome is Outcome.REFUSED
        if receipt.code in BEYOND:
            raise Finished(Ending.GAVE_UP, reason)
        if refused and receipt.code != "expects":
            raise Finished(Ending.FAILED, reason)
        if progress.in_a_row("recovery") >= judging.IN_A_ROW:
            raise Finished(Ending.FAILED, f"{reason}, after {judging.IN_A_ROW} recoveries in a row")
        status = self._fit_status()
        moved = [] if refused else self._moved(last, status.controls)
        if moved:
            reason += f", and somebody else moved {', '.join(moved)}"
        number = last.decided.number
        if (refused or moved or _by_a_person(receipt)) and number not in progress.held:
            resting.hold(self.x, reason)
            status = self._fit_status()
            moved = moved or self._moved(last, status.controls)  # whoever held it up may have turned a knob as well
        recovered = Recovered(number=number, reason=reason, settings=status.controls, afresh=refused or bool(moved))
        receipts = tuple(last.receipts.values())
        decision = judging.after_trouble(recovered, last.decided.decision, receipts, progress.last_acquire)
        self.x.record(recovered)
        self._decided(decision, "recovery", last.decided.based_on, status.controls, time.perf_counter())

    def _fit_status(self) -> Status:
        """How the microscope is now; its STOP ends the experiment."""
        status = self._hand.status()
        if status.mode is Mode.STOPPED:
            raise Finished(Ending.STOPPED, f"the microscope is stopped: {printable(status.reason)}")
        return status

    def _moved(self, last: Taken, now: dict[str, float]) -> list[str]:
        """Controls of the policy that somebody else moved."""
        return judging.moved(self.x.started.controls, last.decided.decision, self.x.progress.known, now)

    def _stopped(self) -> None:
        """Log who asked for the end, if anybody did."""
        wish, number = self.x.control.stop_wish, self.x.progress.number - 1
        if wish is not None:
            self.x.record(Told(what="stop", by=wish.by, number=number, reason=wish.reason))

    def _abort(self, reason: str) -> None:
        """Leave nothing of ours running at the microscope, and log its answer."""
        last = self.x.progress.last
        for command in last.outstanding[:1] if last else ():
            try:
                receipt = self._hand.abort(command, reason)
            except Exception as error:  # noqa: BLE001  the end must be logged, whatever else is broken
                _log.warning("%s could not be aborted: %s", command.id, printable(str(error)))
                return
            if receipt is not None:
                self.x.record(Received(receipt=receipt))

    def _notes(self, last: Taken) -> None:
        seen = next((s for s in self.x.progress.seen if s.job in last.decided.based_on), None)
        if seen is not None:
            write_notes((self.x.config.service.runs / seen.path).parent, last)


def _by_a_person(receipt: Receipt) -> bool:
    """Whether somebody aborted a command, and not the loss of a connection or lease."""
    return receipt.outcome is Outcome.ABORTED and receipt.code not in ("lease", "epoch")
