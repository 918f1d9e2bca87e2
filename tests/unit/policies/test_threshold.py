"""The simplest policy: one field after the other until one has enough signal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from emflow.agent.policies.threshold import Threshold
from emflow.agent.protocol import Decision, Verdict
from emflow.microscope.protocol import Scan, Set


def searched(
    made: SimpleNamespace, policy: Threshold, values: list[float | None], start: tuple[float, float] = (10.0, -20.0)
) -> list[Decision]:
    """Decisions over fields whose number is as given, one after the other."""
    stage = dict(zip(policy.controls, start, strict=True))
    result, history = None, []
    for value in [*values, None]:
        decision = policy.decide(result, stage, tuple(history))
        history.append(made.step(len(history), decision, result.settings if result else None))
        if decision.verdict is not Verdict.GO_ON:
            break
        for action in decision.actions:
            if isinstance(action, Set):
                stage |= action.values
        result = made.Made(scalars={"image": {"mean": value}}, settings=dict(stage))
    return [s.decision for s in history]


def places(decisions: list[Decision]) -> list[tuple[float, float]]:
    found = [a.values for d in decisions for a in d.actions if isinstance(a, Set)]
    return [(v["stage_y_nm"], v["stage_x_nm"]) for v in found]


def test_it_stops_at_the_first_field_with_enough(made: SimpleNamespace) -> None:
    decisions = searched(made, Threshold(at_least=50, fields=(2, 2), pitch_nm=100), [10, 49.9, 50, 99])
    assert [d.verdict for d in decisions] == [Verdict.GO_ON] * 3 + [Verdict.TARGET]
    assert places(decisions) == [(10, 80), (110, 80)]
    assert decisions[-1].measured == {"image.mean": 50}


def test_it_looks_at_every_field_once_and_gives_up(made: SimpleNamespace) -> None:
    decisions = searched(made, Threshold(fields=(2, 3), pitch_nm=50), [0.0] * 9)
    assert decisions[-1].verdict is Verdict.GIVE_UP
    assert places(decisions) == [(10, 30), (10, 80), (60, 80), (60, 30), (60, -20)]
    assert sum(isinstance(a, Scan) for d in decisions for a in d.actions) == 6


@pytest.mark.parametrize("nothing", [None, float("nan"), True, "text"])
def test_a_result_without_the_number_moves_nothing(made: SimpleNamespace, nothing: float | None) -> None:
    decisions = searched(made, Threshold(patience=3), [nothing] * 5)
    assert [d.verdict for d in decisions] == [Verdict.GO_ON] * 3 + [Verdict.GIVE_UP]
    assert not places(decisions)
    assert not any(d.trusted for d in decisions[1:])


def test_after_a_bad_result_it_goes_on_where_it_was(made: SimpleNamespace) -> None:
    decisions = searched(made, Threshold(fields=(1, 3), pitch_nm=10), [1.0, None, 1.0, 1.0])
    assert places(decisions) == [(10, -10), (10, 0)]
    assert decisions[-1].verdict is Verdict.GIVE_UP


def test_an_invalid_result_is_not_believed(made: SimpleNamespace) -> None:
    result = made.Made(scalars={"image": {"mean": 1e6}}, quality="INVALID", settings={})
    decision = Threshold().decide(result, {}, (made.step(0, Threshold().decide(None, {}, ())),))
    assert not decision.trusted
    assert decision.verdict is Verdict.GO_ON
