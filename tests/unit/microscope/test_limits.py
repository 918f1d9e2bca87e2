"""The envelope against an oracle written another way, and each limit by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow.microscope.limits import Envelope, acquisitions_of, actions_of
from emflow.microscope.protocol import Batch, Camera, Scan, Scan4d, Set
from emflow.microscope.settings import ControlLimits, Limits, Range

C10 = ControlLimits(min=-100.0, max=100.0, max_step=60.0, per_minute=3, tolerance=0.5)
C12 = ControlLimits(min=0.0, max=10.0, max_step=10.0, per_minute=100, tolerance=0.0)
LIMITS = Limits(
    max_dose_e=100.0, max_total_dose_e=150.0, max_frames=16, step_nm=Range(min=0.1, max=2.0),
    dwell_us=Range(min=1.0, max=9.0), exposure_us=Range(min=1.0, max=9.0), centre_nm=Range(min=-5.0, max=5.0),
    controls={"C10_nm": C10, "C12a_nm": C12},
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def envelope(clock: Clock) -> Envelope:
    return Envelope(LIMITS, clock)


values = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(-130, 130), st.sampled_from([60.0, 100.0]))


@given(
    targets=st.lists(
        st.dictionaries(st.sampled_from(["C10_nm", "C12a_nm", "stage_y_nm"]), values, max_size=3), max_size=6
    ),
    start=st.floats(-100, 100),
)
def test_what_passes_is_inside_at_every_step(targets: list[dict[str, float]], start: float) -> None:
    envelope = Envelope(LIMITS, lambda: 0.0)
    current = {"C10_nm": start, "C12a_nm": 5.0, "stage_y_nm": 0.0}
    actions = [Set(values=target) for target in targets]
    refused = envelope.refused(actions, current, [0.0] * len(actions), 0.0)
    inside, moves = bool(actions) or refused is None, 0
    for target in targets:
        inside = inside and bool(target) and "stage_y_nm" not in target
        for name, value in target.items():
            limit = LIMITS.controls.get(name)
            near = limit is not None and abs(value - current[name]) <= limit.max_step
            inside = inside and near and limit.min <= value <= limit.max
            moves += name == "C10_nm" and value != current[name]
            current[name] = value
    assert (refused is None) == (inside and moves <= 3)
    if refused is not None:
        assert refused.code == "limits"
        assert any(name in refused.reason for name in ("C10_nm", "C12a_nm", "stage_y_nm", "no control"))


@pytest.mark.parametrize(
    ("start", "values", "words"),
    [
        (0.0, [60.0], None),
        (0.0, [-60.0], None),
        (0.0, [60.0000001], "is 60 from 0.0; one step is at most 60"),
        (-30.0, [31.0], "is 61 from -30.0; one step is at most 60"),
        (0.0, [50.0, -10.0], None),
        (0.0, [50.0, -11.0], "C10_nm: -11.0 is 61 from 50.0"),  # judged as if what stands before it were done
    ],
)
def test_step(envelope: Envelope, start: float, values: list[float], words: str | None) -> None:
    actions = [Set(values={"C10_nm": value}) for value in values]
    found = envelope.refused(actions, {"C10_nm": start}, [0.0] * len(actions), 0.0)
    assert (found is None) == (words is None)
    assert found is None or words in found.reason


def test_per_minute_is_a_window(envelope: Envelope, clock: Clock) -> None:
    for value in (1.0, 2.0, 3.0):
        move = Set(values={"C10_nm": value})
        assert envelope.refused([move], {"C10_nm": value - 1}, [0.0], 0.0) is None
        envelope.moved(move, {"C10_nm": value - 1})
        clock.now_s += 10
    fourth = Set(values={"C10_nm": 4.0})
    found = envelope.refused([fourth], {"C10_nm": 3.0}, [0.0], 0.0)
    assert found is not None
    assert found.reason == "C10_nm: 4.0 would be move 4 within a minute; 3 are allowed"
    assert envelope.refused([fourth], {"C10_nm": 4.0}, [0.0], 0.0) is None  # no move
    clock.now_s += 30.1  # a minute after the first
    assert envelope.refused([fourth], {"C10_nm": 3.0}, [0.0], 0.0) is None


def test_moves_from_before_a_restart_count(envelope: Envelope, clock: Clock) -> None:
    batch = Batch(actions=(Set(values={"C10_nm": 1.0}), SCAN, Set(values={"C10_nm": 2.0}), Set(values={"C10_nm": 2.0})))
    envelope.earlier(batch, {"C10_nm": 0.0}, 50.0)  # two moves
    envelope.earlier(Set(values={"C10_nm": 3.0, "gone": 1.0}), {"C10_nm": 2.0}, -5.0)  # a clock that was set back
    fourth = Set(values={"C10_nm": 4.0})
    assert "would be move 4" in envelope.refused([fourth], {"C10_nm": 3.0}, [0.0], 0.0).reason  # type: ignore[union-attr]
    clock.now_s += 10.1
    assert envelope.refused([fourth], {"C10_nm": 3.0}, [0.0], 0.0) is None


SCAN = Scan(shape=(2, 2), step_nm=1.0, dwell_us=2.0)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Scan(shape=(2, 2), step_nm=2.5, dwell_us=2.0), "step_nm: 2.5 is outside 0.1 to 2"),
        (Scan(shape=(2, 2), step_nm=math.nan, dwell_us=2.0), "step_nm: nan is not a finite number"),
        (Scan(shape=(2, 2), step_nm=1.0, dwell_us=math.inf), "dwell_us: inf is not a finite number"),
        (Scan(shape=(2, 2), step_nm=1.0, dwell_us=9.5), "dwell_us: 9.5 is outside 1 to 9"),
        (Scan(shape=(2, 2), step_nm=1.0, dwell_us=2.0, centre_nm=(0.0, 6.0)), "centre_nm: 6.0 is outside -5 to 5"),
        (Scan4d(shape=(4, 5), step_nm=1.0, exposure_us=2.0), "frames: 20 are more than 16"),
        (Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=0.5), "exposure_us: 0.5 is outside 1 to 9"),
        (Camera(frames=17, exposure_us=2.0), "frames: 17 are more than 16"),
        (Batch(actions=(SCAN, Camera(frames=17, exposure_us=2.0))), "frames: 17 are more than 16"),
        (Set(values={"C10_nm": 100.1}), "C10_nm: 100.1 is outside -100 to 100"),
        (Set(values={"gun": 1.0}), "gun: may not be set here; what may: C10_nm, C12a_nm"),
    ],
)
def test_outside_is_told_by_name(envelope: Envelope, action, words: str) -> None:
    found = envelope.outside(action)
    assert found is not None
    assert (found.code, found.reason) == ("limits", words)


def test_a_step_or_a_time_of_nothing_is_refused_without_any_limit() -> None:
    free = Envelope(Limits(), lambda: 0.0)
    assert free.outside(SCAN) is None
    for bad in (Scan(shape=(1, 1), step_nm=0.0, dwell_us=1.0), Camera(frames=1, exposure_us=-1.0)):
        assert "must be above 0" in free.outside(bad).reason  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("doses", "spent", "words"),
    [
        ([60.0, 40.0], 0.0, None),
        ([60.0, 40.1], 0.0, "for one command"),
        ([60.0], 90.0, None),
        ([60.0], 90.1, "59.9 left of 150"),
        ([0.0], 1e9, None),
        ([math.nan], 0.0, "is no dose"),
        ([-1.0], 0.0, "is no dose"),
        ([math.inf], 0.0, "is no dose"),
    ],
)
def test_dose(envelope: Envelope, doses: list[float], spent: float, words: str | None) -> None:
    found = envelope.refused([SCAN] * len(doses), {}, doses, spent)
    assert (found is None) == (words is None)
    assert found is None or words in found.reason


def test_expects_with_its_tolerance(envelope: Envelope) -> None:
    assert envelope.differs({"C10_nm": 1.5}, {"C10_nm": 1.0}) is None
    assert "C10_nm is 1.0, not 1.6" in (envelope.differs({"C10_nm": 1.6}, {"C10_nm": 1.0}) or "")
    assert envelope.differs({"stage_y_nm": 1.0}, {"stage_y_nm": 1.0}) is None  # one that can't be set: exactly
    assert envelope.differs({"stage_y_nm": 1.0}, {"stage_y_nm": 1.0000001})
    assert envelope.differs({"C10_nm": 1.0}, {"C10_nm": math.nan})
    assert envelope.differs({"C9_nm": 1.0}, {"C10_nm": 1.0})
    assert envelope.holds({}, {})


@pytest.mark.parametrize("name", ["C10_nm", "C12a_nm"])
@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 5e-324, -5e-324, -0.0])
def test_ends_of_what_a_float_can_hold(name: str, value: float) -> None:
    wide = ControlLimits(min=-1.8e308 / 1.01, max=1.8e308 / 1.01, max_step=60.0, per_minute=1, tolerance=1e308)
    envelope = Envelope(Limits(controls={"C10_nm": wide, "C12a_nm": C12}), lambda: 0.0)
    found = envelope.refused([Set(values={name: value})], {"C10_nm": -value, "C12a_nm": 0.0}, [0.0], 0.0)
    allowed = abs(value) < 1 and (name == "C10_nm" or value >= 0)
    assert (found is None) == allowed  # the difference overflows to infinity, which is no step
    assert (envelope.differs({"C10_nm": value}, {"C10_nm": -value}) is None) == (abs(value) < 1)


def test_control_that_reads_nan_cannot_be_stepped(envelope: Envelope) -> None:
    found = envelope.refused([Set(values={"C10_nm": 1.0})], {"C10_nm": math.nan}, [0.0], 0.0)
    assert found is not None


def test_actions_of_a_batch() -> None:
    batch = Batch(actions=(Set(values={"C10_nm": 1.0}), SCAN))
    assert (len(actions_of(batch)), acquisitions_of(batch), actions_of(SCAN)) == (2, [SCAN], (SCAN,))
