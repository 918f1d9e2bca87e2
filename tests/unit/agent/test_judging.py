"""Decisions that a loop may carry out, those that it makes itself, and the stop rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from emflow.agent.judging import PolicyError, after_trouble, checked, decide, gate, moved, recovery
from emflow.agent.progress import Progress
from emflow.agent.protocol import Decision, Ending, History, Result, StopRules, Verdict
from emflow.agent.records import Decided, Received, Recovered, Seen, Told, planned
from emflow.agent.stopping import no_better, over
from emflow.microscope.protocol import Acquired, Batch, Camera, Outcome, Receipt, Scan, Set

SCAN = Scan(shape=(4, 4), step_nm=0.1, dwell_us=1.5)
MOVE = Set(values={"C10_nm": 5.0})
EXPERIMENT = "e0123456789ab"


class Fixed(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that says what it is told to."""

    recipe: ClassVar[str] = "quick"
    controls: ClassVar[tuple[str, ...]] = ("C10_nm",)
    says: Any

    def accepts_partial(self, coverage: float) -> bool:
        return coverage > 1

    def decide(self, result: Result | None, settings: Mapping[str, float], history: History) -> Decision:
        assert result is None
        assert not history
        assert settings is not None
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (ValueError("x"), "failed: ValueError: x"),
        (None, "gave NoneType"),
        (Decision(reason="", actions=(Set(values={"C10_nm": float("nan")}),)), "nan is not a finite number"),
        (Decision(reason="", actions=(Set(values={"C10_nm": float("inf")}),)), "inf is not a finite number"),
        (Decision(reason="", actions=(Batch(actions=(SCAN, Set(values={"C10_nm": np.nan}))),)), "nan is not a finite"),
        (Decision(reason="", actions=(Scan(shape=(0, 4), step_nm=1.0, dwell_us=1.0),)), ">= 1"),
        (Decision(reason="", actions=(Set(values={"C10_nm": "5"}),)), "float"),  # type: ignore[dict-item]
        (Decision(reason="", actions=(Set(values={"C10_nm": np.ones(2)}),)), "ndarray is no number"),  # type: ignore[dict-item]
        (Decision(reason="", actions=(Set(values={"C30_um": 1.0}),)), "sets C30_um, which it does not list"),
        (Decision(reason="", actions=(MOVE,), trusted=False), "distrusts the result and sets C10_nm"),
        (Decision(reason="", actions=(Batch(actions=(MOVE,)),), trusted=False), "distrusts the result and sets"),
        (Decision(reason="", actions=(SCAN,) * 101), "101 actions"),
        (Decision(reason="\udc80"), "surrogates"),
        (Decision(reason="", measured={"x": "y"}), "real number"),  # type: ignore[dict-item]
    ],
)
def test_what_no_microscope_may_be_sent(says: Any, told: str) -> None:
    with pytest.raises(PolicyError, match="policy 'fixed'") as error:
        decide("fixed", Fixed(says=says), None, {}, ())
    assert told in str(error.value)


def test_numbers_become_plain_and_come_back_from_json_the_same() -> None:
    said = Decision(
        reason="",
        actions=(Set(values={"C10_nm": np.float64(0.1)}), SCAN),
        measured={"a_nm": np.float32(0.1), "bad_nm": float("nan"), "one": 1},
        merit=float("inf"),
    )
    whole = checked("fixed", said, ("C10_nm",))
    assert whole.measured == {"a_nm": float(np.float32(0.1)), "one": 1.0}
    assert whole.merit is None
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Decision) == whole
    assert type(whole.actions[0].values["C10_nm"]) is float  # type: ignore[union-attr]


def test_a_distrusted_result_is_acquired_again_three_times() -> None:
    decisions = [gate("bad", SCAN, before) for before in range(3)]
    assert [d.actions for d in decisions] == [(SCAN,), (SCAN,), ()]
    assert [d.verdict for d in decisions] == [Verdict.GO_ON, Verdict.GO_ON, Verdict.GIVE_UP]
    assert not any(d.trusted for d in decisions)
    assert gate("bad", None, 0).verdict is Verdict.GIVE_UP


def receipt(number: int, outcome: Outcome, **facts: Any) -> Receipt:
    return Receipt(command=f"{EXPERIMENT}-0000-{number:02d}", outcome=outcome, **facts)


@pytest.mark.parametrize(
    ("outcomes", "now", "left"),
    [
        ((Outcome.UNKNOWN,), 5.0, (SCAN,)),  # it was set after all
        ((Outcome.UNKNOWN,), 5.0 + 1e-12, (SCAN,)),
        ((Outcome.UNKNOWN,), 4.9, (MOVE, SCAN)),
        ((Outcome.EXPIRED,), 0.0, (MOVE, SCAN)),
        ((Outcome.DONE, Outcome.UNKNOWN), 5.0, (SCAN,)),
        ((Outcome.UNKNOWN, Outcome.DONE), 4.9, (MOVE, SCAN)),  # what came after it says nothing
        ((Outcome.DONE, Outcome.ABORTED), 5.0, (SCAN,)),
    ],
)
def test_what_is_left_of_an_interrupted_decision(
    outcomes: tuple[Outcome, ...], now: float, left: tuple[object, ...]
) -> None:
    interrupted = Decision(reason="x", actions=(MOVE, SCAN), merit=1.0)
    receipts = tuple(receipt(n, outcome) for n, outcome in enumerate(outcomes))
    decision = recovery("trouble", interrupted, receipts, {"C10_nm": now})
    assert decision.actions == left
    assert decision.merit is None
    moved = Recovered(number=0, reason="trouble", settings={"C10_nm": now}, afresh=True)
    assert after_trouble(moved, interrupted, receipts, SCAN).actions == (SCAN,)


@pytest.mark.parametrize("actions", [(MOVE, SCAN), (Batch(actions=(MOVE, SCAN)),)], ids=["alone", "in a batch"])
def test_what_somebody_else_moved(actions: tuple[Any, ...]) -> None:
    interrupted = Decision(reason="x", actions=actions)
    for now, found in ((1.0, []), (5.0, []), (4.9, ["C10_nm"]), (float("nan"), ["C10_nm"])):
        assert moved(("C10_nm",), interrupted, {"C10_nm": 1.0}, {"C10_nm": now}) == found
    assert moved(("C10_nm",), interrupted, {"C10_nm": 1.0}, {}) == ["C10_nm"]


# --- progress and stop rules


def decided(number: int, *actions: Any, by: Any = "policy", merit: float | None = None, job: str = "") -> Decided:
    return Decided(
        number=number,
        by=by,
        based_on=(job,) if job else (),
        settings={"C10_nm": 1.0},
        decision=Decision(reason="", actions=actions, merit=merit),
        commands=planned(EXPERIMENT, number, actions),
    )


def done(number: int, i: int = 0, *, path: str = "", dose_e: float = 0.0, outcome: Outcome = Outcome.DONE) -> Received:
    made = Acquired(name="x", path=path, kind="image", scan_shape=(), det_shape=(4, 4), frames=1, dose_e=dose_e)
    return Received(
        receipt=Receipt(
            command=f"{EXPERIMENT}-{number:04d}-{i:02d}",
            outcome=outcome,
            before={"C10_nm": 1.0},
            after={"C10_nm": 2.0},
            acquired=(made,) if path else (),
            dose_e=dose_e,
        )
    )


def test_where_an_experiment_is() -> None:
    progress = Progress([decided(0, MOVE, SCAN)])
    assert progress.known == {"C10_nm": 1.0}
    assert progress.awaited() is None
    assert progress.last is not None
    assert len(progress.last.outstanding) == 2
    progress.apply(done(0))
    assert progress.known == {"C10_nm": 2.0}
    assert len(progress.last.outstanding) == 1
    progress.apply(done(0, 1, path="a.npy", dose_e=3.0))
    awaited = progress.awaited()
    assert awaited is not None
    assert awaited[2].path == "a.npy"
    assert (progress.acquisitions, progress.dose_e, progress.last_acquire) == (1, 3.0, SCAN)
    # a scan was made with the settings before it; a batch sets some first
    assert progress.scan_settings(SCAN, awaited[1]) == {"C10_nm": 1.0}
    assert progress.scan_settings(Batch(actions=(MOVE, SCAN)), awaited[1]) == {"C10_nm": 2.0}
    seen = Seen(job="j", acquisition="a", command="", path="", settings={"C10_nm": 9.0})
    progress.apply(seen)
    assert progress.used == set()  # seen, and not decided on
    progress.apply(decided(1, SCAN, by="gate", job="j"))
    assert progress.used == {"j", "a"}
    assert progress.in_a_row("gate") == 1
    assert progress.in_a_row("policy") == 0
    assert [s.settings for s in progress.history] == [{}, {"C10_nm": 9.0}]
    assert progress.strays() == [(f"{EXPERIMENT}-0000-01", awaited[2])]


def test_a_recovery_belongs_to_the_step_that_it_mends() -> None:
    records = [decided(0, MOVE, SCAN), done(0, outcome=Outcome.UNKNOWN), decided(1, MOVE, SCAN, by="recovery")]
    progress = Progress([*records, done(1), done(1, 1, path="a")])
    (step,) = progress.history
    assert (step.number, [r.outcome for r in step.receipts]) == (0, [Outcome.UNKNOWN, Outcome.DONE, Outcome.DONE])
    assert progress.known == {"C10_nm": 2.0}


RULES = StopRules(max_acquisitions=2, max_dose_e=10.0, max_time_s=100.0, no_improvement=2)


@pytest.mark.parametrize(
    ("records", "active_s", "ending"),
    [
        ([decided(0, SCAN)], 99.0, None),
        ([decided(0, SCAN)], 100.0, Ending.TIME),
        ([decided(0, SCAN), done(0, path="a"), decided(1, SCAN)], 0, None),
        ([decided(0, SCAN), done(0, path="a"), decided(1, SCAN, Camera(frames=1, exposure_us=1.0))], 0, "acquisitions"),
        ([decided(0, SCAN), done(0, path="a"), decided(1, SCAN), done(1, path="b"), decided(2, MOVE)], 0, None),
        ([decided(0, SCAN), done(0, path="a", dose_e=5.0), decided(1, SCAN)], 0, None),
        ([decided(0, SCAN), done(0, path="a", dose_e=5.1), decided(1, SCAN)], 0, Ending.DOSE),
        ([decided(0, SCAN), done(0, dose_e=11.0, outcome=Outcome.FAILED), decided(1, SCAN)], 0, Ending.DOSE),
        ([decided(n, merit=m) for n, m in enumerate([3.0, 2.0, 2.0])], 0, None),
        ([decided(n, merit=m) for n, m in enumerate([3.0, 2.0, 2.0, None, 2.5])], 0, Ending.NO_IMPROVEMENT),
    ],
)
def test_stop_rules(records: list[Any], active_s: float, ending: Any) -> None:
    expected = Ending.ACQUISITIONS if ending == "acquisitions" else ending
    found = over(RULES, Progress(records), active_s)
    assert (found[0] if found else None) == expected
    assert over(StopRules(max_acquisitions=0, no_improvement=0), Progress(records), active_s) is None


def test_a_batch_counts_all_that_it_acquires_and_only_that_is_repeated() -> None:
    batch = Batch(actions=(MOVE, SCAN, SCAN))
    found = over(RULES, Progress([decided(0, SCAN), done(0, path="a"), decided(1, batch)]), 0.0)
    assert found is not None
    assert found[0] is Ending.ACQUISITIONS
    # a batch is repeated where its result is distrusted, or somebody moved the microscope: nothing is set by that
    assert Progress([decided(0, batch)]).last_acquire == Batch(actions=(SCAN, SCAN))
    assert Progress([decided(0, Batch(actions=(MOVE, SCAN)))]).last_acquire == SCAN
    assert Progress([decided(0, MOVE, Batch(actions=(MOVE,)))]).last_acquire is None


def test_a_pause_and_a_hold_last_until_somebody_resumes() -> None:
    told = {what: Told(what=what, by="x", number=0) for what in ("pause", "hold", "resume", "approve", "stop")}  # type: ignore[arg-type]
    progress = Progress([decided(0, SCAN)])
    for what in ("pause", "hold"):
        progress.apply(told[what])
        progress.apply(told["approve"])
        assert progress.resting == told[what]
        progress.apply(told["resume"])
        assert progress.resting is None


def test_no_better() -> None:
    assert [no_better(m) for m in ([], [None], [1.0], [1.0, 1.0], [1.0, 2.0, None, 0.5], [3.0, 4.0, 5.0])] == [
        *(0, 0, 0, 1, 0, 2)
    ]
