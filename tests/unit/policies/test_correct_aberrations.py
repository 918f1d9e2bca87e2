"""The policy that corrects: it converges on what it was not told, and moves nothing that it should not."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from emflow.agent.policies.correct_aberrations import CorrectAberrations
from emflow.agent.protocol import Decision, Step, Verdict
from emflow.microscope.protocol import Acquired, Outcome, Receipt, Scan4d, Set

POLICY = CorrectAberrations(shape=(48, 48), step_nm=1.5, fine_step_nm=0.6)
Change = Callable[[Any, int], Any]


def sets(decision: Decision) -> list[Set]:
    return [a for a in decision.actions if isinstance(a, Set)]


def steered(
    made: SimpleNamespace,
    hidden: tuple[float, float, float],
    policy: CorrectAberrations = POLICY,
    change: Change = lambda result, _: result,
    most: int = 10,
    answer: float = 1.0,
) -> tuple[list[Step], dict[str, float]]:
    """Run the policy on synthetic scans until it ends; ``answer`` is how the optics follow their controls."""
    controls, history, result = dict(made.at_zero), [], None
    for number in range(most):
        decision = policy.decide(result, controls, tuple(history))
        history.append(made.step(number, decision, result.settings if result else None))
        for action in decision.actions:
            if isinstance(action, Set):
                controls |= action.values
                continue
            assert isinstance(action, Scan4d)
            true = [h + answer * c for h, c in zip(hidden, controls.values(), strict=True)]
            arrays = made.scan(*true, seed=number, shape=action.shape, step_nm=action.step_nm)
            result = change(made.result(*arrays, controls, step_nm=action.step_nm), number)
        if decision.verdict is not Verdict.GO_ON:
            break
    return history, {n: h + answer * controls[n] for n, h in zip(controls, hidden, strict=True)}


@pytest.mark.parametrize("hidden", [(560, 90, -110), (-400, 0, 20), (110, -60, 40)])
def test_it_reaches_the_target_by_steps_within_the_limit(
    made: SimpleNamespace, hidden: tuple[float, float, float]
) -> None:
    history, left = steered(made, hidden)
    assert history[-1].decision.verdict is Verdict.TARGET
    assert abs(left["C10_nm"]) <= 5
    assert math.hypot(left["C12a_nm"], left["C12b_nm"]) <= 5
    assert len(history) <= 6
    before = made.at_zero
    for one in (s for step in history for s in sets(step.decision)):
        assert abs(one.values["C10_nm"] - before["C10_nm"]) <= POLICY.max_step_nm + 1e-9
        assert all(v == round(v, 3) for v in one.values.values())
        before = one.values
    if abs(hidden[0]) > POLICY.max_step_nm:
        assert "limit of 300 nm" in history[1].decision.reason
    merits = [s.decision.merit for s in history if s.decision.merit is not None]
    assert merits == sorted(merits, reverse=True)


def test_the_first_decision_scans_and_nothing_else() -> None:
    decision = POLICY.decide(None, {}, ())
    assert decision.actions == (Scan4d(shape=(48, 48), step_nm=1.5, exposure_us=POLICY.exposure_us),)


def test_a_correction_is_control_minus_estimate(made: SimpleNamespace) -> None:
    at = {"C10_nm": 1000.0, "C12a_nm": -50.0, "C12b_nm": 7.0}
    result = made.result(*made.scan(120, 30, -40), at)
    decision = POLICY.decide(result, at, ())
    (correction,) = sets(decision)
    for name, wanted in zip(at, (880, -80, 47), strict=True):
        assert correction.values[name] == pytest.approx(wanted, abs=3)
        assert correction.values[name] == pytest.approx(at[name] - decision.measured[name], abs=2e-3)


def test_c12_is_limited_in_length_and_keeps_its_direction(made: SimpleNamespace) -> None:
    policy = msgspec.structs.replace(POLICY, max_step_nm=50.0)
    (one,) = sets(policy.decide(made.result(*made.scan(0, 90, -120)), made.at_zero, ()))
    assert math.hypot(one.values["C12a_nm"], one.values["C12b_nm"]) == pytest.approx(50, abs=2e-3)
    assert one.values["C12a_nm"] / one.values["C12b_nm"] == pytest.approx(-90 / 120, abs=0.05)


def test_the_same_input_gives_the_same_bytes(made: SimpleNamespace) -> None:
    result = made.result(*made.scan(250, 20, 30))
    encoded = {msgspec.json.encode(POLICY.decide(result, made.at_zero, ())) for _ in range(3)}
    assert len(encoded) == 1


# --- what must not move the microscope


def positions(result: Any, number: int) -> Any:
    images = result.arrays["segments/images"]
    order = np.random.default_rng(number).permutation(images.shape[0] * images.shape[1])
    result.arrays["segments/images"] = images.reshape(-1, images.shape[2])[order].reshape(images.shape)
    return result


def each_positions(result: Any, number: int) -> Any:
    images, random = result.arrays["segments/images"], np.random.default_rng(number)
    flat = images.reshape(-1, images.shape[2])
    result.arrays["segments/images"] = random.permuted(flat, axis=0).reshape(images.shape)
    return result


def segments(result: Any, number: int) -> Any:
    images = result.arrays["segments/images"].copy()
    bright = np.flatnonzero(images.sum(axis=(0, 1)) > 0.5 * np.percentile(images.sum(axis=(0, 1)), 90))
    images[..., bright] = images[..., np.random.default_rng(number).permutation(bright)]
    result.arrays["segments/images"] = images
    return result


def noise(result: Any, number: int) -> Any:
    images = result.arrays["segments/images"]
    mean = np.broadcast_to(images.mean(axis=(0, 1)), images.shape)
    result.arrays["segments/images"] = np.random.default_rng(number).poisson(mean)
    return result


@pytest.mark.parametrize("change", [positions, each_positions, segments, noise])
@pytest.mark.parametrize("hidden", [(300, 60, -80), (-120, 100, 0)])
def test_scrambled_results_end_by_the_gate(
    made: SimpleNamespace, change: Change, hidden: tuple[float, float, float]
) -> None:
    history, left = steered(made, hidden, change=change)
    assert [s.decision.verdict for s in history[1:]] == [Verdict.GO_ON] * 2 + [Verdict.GIVE_UP]
    assert not any(sets(s.decision) for s in history)
    assert not any(s.decision.trusted for s in history[1:])
    assert list(left.values()) == list(hidden)


@pytest.mark.parametrize("change", [segments, noise])
def test_without_the_gate_they_do_move_it(made: SimpleNamespace, change: Change) -> None:
    """The negative control bites: the gate is what holds it."""
    policy = msgspec.structs.replace(POLICY, gate=False)
    history, _ = steered(made, (300, 60, -80), policy, change, most=4)
    assert any(sets(s.decision) for s in history)


def test_optics_that_answer_the_wrong_way_are_noticed(made: SimpleNamespace) -> None:
    history, _ = steered(made, (250, 40, -60), answer=-1.0)
    assert len([s for s in history if sets(s.decision)]) == 1
    assert history[-1].decision.verdict is Verdict.GIVE_UP
    assert "did not follow the controls" in history[-1].decision.reason


def broken(**arrays: Any) -> Callable[[Any], None]:
    def apply(result: Any) -> None:
        for name, change in arrays.items():
            result.arrays[f"segments/{name}"] = change(result.arrays[f"segments/{name}"].astype(float))

    return apply


def one_nan(array: np.ndarray) -> np.ndarray:
    array[0, 0] = np.nan
    return array


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda result: setattr(result, name, value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (broken(images=one_nan), "finite"),
        (broken(images=lambda a: a + np.inf), "finite"),
        (broken(angles=one_nan), "finite"),
        (broken(angles=lambda a: a * 0), "different angles"),
        (broken(images=lambda a: a * 0), "bright"),
        (broken(images=lambda a: a * 0 + 5), "same everywhere"),
        (broken(images=lambda a: a[:9, :9]), "shape"),
        (broken(pixels=lambda a: a[:3]), "do not go with"),
        (attribute("quality", "INVALID"), "INVALID"),
        (attribute("quality", "DOUBTFUL"), "DOUBTFUL"),
        (attribute("coverage", 0.5), "50 %"),
        (attribute("scan_unit", "px"), "not calibrated as lengths"),
        (attribute("step_nm", 0.0), "not calibrated as lengths"),
        (attribute("scalars", {"segments": {"angle_unit": "px"}}), "not calibrated as angles"),
        (attribute("arrays", {}), "no map"),
        (attribute("settings", {"C10_nm": 0.0}), "C12a_nm, C12b_nm"),
        (attribute("settings", {"C10_nm": 0.0, "C12a_nm": 0.0, "C12b_nm": math.nan}), "C12b_nm"),
        (attribute("settings", {"C10_nm": 5.0, "C12a_nm": 0.0, "C12b_nm": 0.0}), "C10_nm moved since"),
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_what_can_not_be_used_is_not_trusted(
    made: SimpleNamespace, change: Callable[[Any], None], why: str, gate: bool
) -> None:
    result = made.result(*made.scan(200, 20, 10))
    change(result)
    decision = msgspec.structs.replace(POLICY, gate=gate).decide(result, made.at_zero, ())
    assert why in decision.reason
    assert not decision.trusted
    assert not sets(decision)
    assert decision.verdict is Verdict.GO_ON


def test_one_good_result_ends_the_row_of_bad_ones(made: SimpleNamespace) -> None:
    good = made.result(*made.scan(200, 20, 10))
    bad = made.result(*made.scan(200, 20, 10), quality="INVALID")
    history: list[Step] = [made.step(0, POLICY.decide(None, made.at_zero, ()))]
    for number, (result, wanted) in enumerate([(bad, "go on"), (bad, "go on"), (good, "go on"), (bad, "go on")], 1):
        decision = POLICY.decide(result, made.at_zero, tuple(history))
        assert decision.verdict == wanted
        history.append(made.step(number, decision, result.settings))


def test_only_whole_scans() -> None:
    assert not POLICY.accepts_partial(0.99)
    assert POLICY.accepts_partial(1.0)


def executed(made: SimpleNamespace, decision: Decision) -> Step:
    """A decision whose scan was made."""
    acquired = Acquired(name="x", path="x", kind="4d", scan_shape=(48, 48), det_shape=(8, 8), frames=1, dose_e=0.0)
    receipt = Receipt(command="e0123456789ab-0000-00", outcome=Outcome.DONE, acquired=(acquired,))
    return msgspec.structs.replace(made.step(0, decision), receipts=(receipt,))


@pytest.mark.parametrize(("step_nm", "fits"), [(1.5, True), (1.53, True), (-1.5, True), (0.6, False), (3.0, False)])
def test_a_scan_of_another_step_is_not_the_one_that_was_commanded(
    made: SimpleNamespace, step_nm: float, fits: bool
) -> None:
    """A wrong calibration, or a result of another scan, scales every coefficient."""
    images, angles, pixels = made.scan(200, 20, 10)
    result = made.result(images[:: 1 if step_nm > 0 else -1], angles, pixels, step_nm=(step_nm, abs(step_nm)))
    history = (executed(made, POLICY.decide(None, made.at_zero, ())),)
    decision = POLICY.decide(result, made.at_zero, history)
    assert decision.trusted is fits
    assert bool(sets(decision)) is fits
    if not fits:
        assert f"a step of {step_nm:g} nm, and 1.5 nm was commanded" in decision.reason
    # nothing is known of what nobody commanded
    assert POLICY.decide(result, made.at_zero, (made.step(0, history[0].decision),)).trusted


def test_a_scan_against_its_axis_keeps_the_sign(made: SimpleNamespace) -> None:
    """Rows or columns from the far end on: the step is negative, and nothing else changes."""
    images, angles, pixels = made.scan(200, 60, -40)
    for rows, columns in ((-1, 1), (1, -1), (-1, -1)):
        result = made.result(images[::rows, ::columns], angles, pixels, step_nm=(1.5 * rows, 1.5 * columns))
        (one,) = sets(POLICY.decide(result, made.at_zero, ()))
        for name, wanted in zip(made.at_zero, (-200, -60, 40), strict=True):
            assert one.values[name] == pytest.approx(wanted, abs=3)


@pytest.mark.parametrize("hidden", [(3, 0, 0), (0, 0, 3)])
def test_the_target_is_reached_with_the_error_added(made: SimpleNamespace, hidden: tuple[float, float, float]) -> None:
    """What is below the target, but perhaps is not, is corrected and measured again."""
    result = made.result(*made.scan(*hidden, step_nm=0.6), step_nm=0.6)
    found = POLICY.decide(result, made.at_zero, ()).measured
    if hidden[0]:
        value, error = abs(found["C10_nm"]), found["C10_error_nm"]
    else:
        value = math.hypot(found["C12a_nm"], found["C12b_nm"])
        error = max(found["C12a_error_nm"], found["C12b_error_nm"])
    for share, verdict in ((0.5, Verdict.GO_ON), (1.5, Verdict.TARGET)):
        policy = msgspec.structs.replace(POLICY, target_nm=value + share * error)
        assert policy.decide(result, made.at_zero, ()).verdict is verdict
