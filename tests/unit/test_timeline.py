"""From events to rows and bars: in order, also when a step was taken twice or heard of late."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow.cli.look import trace_lines
from emflow.config import Config, load
from emflow.journal import Journal
from emflow.records import Acquisition, AcquisitionState, Fingerprint, Job, JobState, job_name
from emflow.timeline import (
    KERNEL_BARS,
    LOOP_BARS,
    SERVICE_BARS,
    STEPS,
    acquisition_events,
    in_order,
    loop_times,
    row_of,
    step_times,
    trace_of,
    waterfall,
    with_next,
)
from mpi_kernels import jsonfile
from mpi_kernels.contract import Event

KEY = "0123456789abcdef"
numbers = itertools.count()


def event(name: str, second: float, *, subject: str = KEY, plane: str = "management") -> Event:
    ns = round(second * 1e9)
    return Event(
        trace=KEY,
        subject=subject,
        plane=plane,
        host="h",
        pid=1,
        seq=next(numbers),
        name=name,
        wall_ns=ns,
        mono_ns=ns,
    )


def way(*names: str, start: float = 0.0) -> list[Event]:
    return [event(name, start + n) for n, name in enumerate(names)]


def kernels(attempt: int, *seconds: float) -> list[Event]:
    subject = job_name(KEY, attempt)
    names = ("claimed", "started", "reduced", "written")
    return [event(n, s, subject=subject, plane="data") for n, s in zip(names, seconds, strict=False)]


def test_each_step_has_the_time_of_its_event() -> None:
    assert step_times(way(*STEPS)) == {name: n * 10**9 for n, name in enumerate(STEPS)}


def test_what_is_no_step_is_left_out() -> None:
    events = [*way("noticed", "stalled", "planned"), event("reduced", 9, plane="data"), event("submitting", 10)]
    assert step_times(events) == {"noticed": 0}


def test_a_step_that_is_taken_again_begins_the_way_anew() -> None:
    events = [
        *way("noticed", "ready", "staged", "submitted", "running", "failed"),
        *way("submitted", "reduced", start=9),
    ]
    assert step_times(events) == {
        "noticed": 0,
        "ready": 10**9,
        "staged": 2 * 10**9,
        "submitted": 9 * 10**9,
        "reduced": 10 * 10**9,
    }
    retried = [*way(*STEPS), event("staged", 20)]
    assert list(step_times(retried)) == ["noticed", "ready", "staged"]


def test_no_events_no_bars() -> None:
    assert waterfall([]) == []
    assert waterfall(way("noticed")) == []
    assert waterfall(kernels(1, 1, 2)) == []


def test_bars_of_the_service_follow_each_other_without_a_gap() -> None:
    bars = waterfall(way(*STEPS))
    assert [bar.name for bar in bars] == [SERVICE_BARS[name] for name in STEPS[1:]]
    assert [(bar.start_s, bar.stop_s) for bar in bars] == [(n, n + 1) for n in range(6)]
    assert not any(bar.inside_job for bar in bars)


def test_bars_of_the_kernels_lie_inside_the_job() -> None:
    events = [*way(*STEPS), *kernels(1, 4.25, 4.5, 4.75, 4.875)]
    inside = [bar for bar in waterfall(events) if bar.inside_job]
    assert [bar.name for bar in inside] == [KERNEL_BARS[n] for n in ("claimed", "started", "reduced", "written")]
    assert [(bar.start_s, bar.stop_s) for bar in inside] == [(4, 4.25), (4.25, 4.5), (4.5, 4.75), (4.75, 4.875)]


def test_a_job_that_told_of_itself_before_the_service_heard_that_it_runs() -> None:
    events = [*way("noticed", "ready", "staged", "submitted"), event("running", 3.5), *kernels(1, 3.2, 3.3, 3.9)]
    inside = [bar for bar in waterfall(events) if bar.inside_job]
    assert [(bar.start_s, bar.stop_s) for bar in inside] == [(3, 3.2), (3.2, 3.3), (3.3, 3.9)]


def test_only_the_last_attempt_is_drawn() -> None:
    first = [*way("noticed", "ready", "staged", "submitted", "running"), *kernels(1, 4.1, 4.2)]
    events = [*first, event("submitted", 8), *kernels(2, 8.5, 8.6, 8.7, 8.8), event("reduced", 9), event("done", 10)]
    bars = waterfall(events)
    inside = [bar for bar in bars if bar.inside_job]
    assert [bar.start_s for bar in inside] == [8, 8.5, 8.6, 8.7]
    assert min(bar.stop_s - bar.start_s for bar in bars) >= 0


@given(
    st.lists(st.sampled_from([*STEPS, "failed", "stalled", "growing"]), max_size=30),
    st.lists(st.integers(0, 50), max_size=4),
)
def test_no_bar_ends_before_it_begins(names: list[str], seconds: list[int]) -> None:
    events = [event("noticed", 0), *way(*names, start=1), *kernels(1, *sorted(seconds))]
    for bar in waterfall(events):
        assert bar.stop_s >= bar.start_s
    times = list(step_times(events).values())
    assert times == sorted(times)


def test_a_row_has_the_newest_job_and_seconds_since_the_first_sight(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        acquisition = Acquisition(
            id=KEY,
            share="scope",
            relpath=b"a/\xff\n.npy",
            generation=0,
            state=AcquisitionState.STAGED,
            day="2026-01-01",
            trace=KEY,
            seen_ns=10**18,
            changed_ns=0,
            fingerprint=Fingerprint(size=1, mtime_ns=1, ctime_ns=1),
            format="npy",
            kind="4d",
            frames=7,
            digest="d",
        )
        journal.add_acquisition(acquisition)
        bare = row_of(journal, acquisition)
        assert (bare.job, bare.job_state, list(bare.seconds)) == ("", "", ["noticed"])
        for attempt in (1, 2):
            name = job_name(KEY, attempt)
            journal.add_job(
                Job(name=name, acquisition=KEY, attempt=attempt, state=JobState.PLANNED, recipe="r", scheduler="null")
            )
            if attempt == 1:
                journal.move_job(name, JobState.PLANNED, JobState.FAILED)
        row = row_of(journal, acquisition)
        assert (row.job, row.job_state) == (f"{KEY}-02", "PLANNED")
        assert row.path == "a/\\xff\n.npy"
        (noticed,) = [e.wall_ns for _, e in journal.events(names={"noticed"})]
        assert row.seconds == {"noticed": (noticed - 10**18) / 1e9}


def test_a_row_never_mixes_two_attempts() -> None:
    retried = [*way(*STEPS), event("growing", 20)]
    assert list(step_times(retried)) == ["noticed"]
    assert step_times([*retried, *way("ready", "staged", start=21)])["staged"] == 22 * 10**9
    failed = [*way("noticed", "ready", "staged", "planned", "submitted", "running", "failed"), event("planned", 20)]
    assert list(step_times(failed)) == ["noticed", "ready", "staged"]


# --- the closed loop: events of three processes under the id of a command

EXPERIMENT = "e0123456789ab"
SET, SCAN, NEXT = (f"{EXPERIMENT}-{number}" for number in ("0001-00", "0001-01", "0002-00"))
NEXT_SCAN = f"{EXPERIMENT}-0002-01"
JOB = job_name(KEY, 1)


def told(name: str, second: float, *, subject: str = SCAN, trace: str = SCAN, plane: str = "control") -> Event:
    return dataclasses.replace(event(name, second, subject=subject, plane=plane), trace=trace)


def loop() -> list[Event]:
    """One acquisition from the setting of controls before it to the command that follows, a second for each step."""
    return [
        told("sent", 0, subject=SET),
        told("admitted", 0.1, subject=SET),
        told("began", 0.2, subject=SET),
        told("ended", 0.9, subject=SET),
        told("sent", 1),
        told("admitted", 1.5),
        told("began", 2),
        told("noticed", 2.5, subject=KEY, plane="management"),
        told("written", 3),
        told("noted", 4),
        told("ended", 4.1),
        told("ready", 5, subject=KEY, plane="management"),
        told("staged", 6, subject=KEY, plane="management"),
        told("submitted", 7, subject=JOB, plane="management"),
        told("running", 7.1, subject=JOB, plane="management"),
        told("claimed", 7.25, subject=JOB, plane="data"),
        told("started", 7.5, subject=JOB, plane="data"),
        told("reduced", 7.75, subject=JOB, plane="data"),
        told("written", 8, subject=JOB, plane="data"),
        told("reduced", 8.5, subject=JOB, plane="management"),
        told("found", 9, subject=JOB),
        told("done", 9.5, subject=KEY, plane="management"),
        told("decided", 10),
        told("sent", 11, subject=NEXT, trace=NEXT_SCAN),
    ]


def test_a_commanded_acquisition_shows_the_whole_loop() -> None:
    assert loop_times(loop()) == {name: n * 10**9 for n, name in enumerate(LOOP_BARS)}
    bars = waterfall(loop())
    outside = [bar for bar in bars if not bar.inside_job]
    assert [bar.name for bar in outside] == list(LOOP_BARS.values())[1:]
    assert [(bar.start_s, bar.stop_s) for bar in outside] == [(n, n + 1) for n in range(11)]
    inside = [(bar.start_s, bar.stop_s) for bar in bars if bar.inside_job]
    assert inside == [(7, 7.25), (7.25, 7.5), (7.5, 7.75), (7.75, 8)]


def test_the_first_scan_has_no_controls_set_before_it_and_the_last_no_command_after_it() -> None:
    events = [e for e in loop() if e.subject not in (SET, NEXT)]
    names = [bar.name for bar in waterfall(events) if not bar.inside_job]
    assert names == list(LOOP_BARS.values())[2:-1]
    assert waterfall(events)[0].start_s == 0


def test_steps_of_the_loop_come_as_they_happen() -> None:
    so_far = [bar.name for bar in waterfall(loop()[:9]) if not bar.inside_job]
    assert so_far == ["controls set", "command", "scan written"]
    assert loop_times(way(*STEPS)) == {}


def test_what_is_done_twice_counts_from_the_first_time() -> None:
    again = [told("sent", 1.7), told("admitted", 1.8), told("found", 10.5, subject=JOB), told("decided", 10.6)]
    assert loop_times(in_order([*loop(), *again])) == loop_times(loop())


def test_the_decision_that_ordered_a_scan_is_not_the_one_that_its_result_led_to() -> None:
    first = told("decided", -1, subject=SET)
    assert loop_times([first, *loop()]) == loop_times(loop())
    assert [e.name for e in with_next([first, *loop()], SCAN)][-1] == "sent"
    assert "decided" not in loop_times([first, *loop()[:-4]])


def test_the_job_is_the_one_whose_result_was_taken() -> None:
    later = [
        told(name, 20 + n, subject=job_name(KEY, 2), plane="data")
        for n, name in enumerate(("claimed", "started", "reduced", "written"))
    ]
    assert [b for b in waterfall([*loop(), *later]) if b.inside_job] == [b for b in waterfall(loop()) if b.inside_job]
    assert loop_times([*loop(), *later])["result"] == 8 * 10**9


@given(st.permutations(range(24)))
def test_clocks_that_differ_make_no_bar_that_ends_before_it_begins(order: list[int]) -> None:
    events = [dataclasses.replace(e, wall_ns=at * 10**9) for e, at in zip(loop(), order, strict=True)]
    first = dataclasses.replace(events[0], wall_ns=-1)
    for bar in waterfall(in_order([first, *events[1:]])):
        assert bar.name in {*LOOP_BARS.values(), *KERNEL_BARS.values()}
        assert bar.inside_job or bar.stop_s >= bar.start_s


def test_the_next_command_is_the_first_one_after_the_decision() -> None:
    early = told("sent", 9.9, subject=NEXT, trace=NEXT_SCAN)
    late = told("sent", 12, subject=NEXT_SCAN, trace=NEXT_SCAN)
    whole = loop()
    own = [e for e in whole if e.trace == SCAN]
    assert with_next(in_order([*whole, early, late]), SCAN) == whole
    assert with_next(own, SCAN) == own
    undecided = [e for e in own if e.name != "decided"]
    assert with_next([*undecided, late], SCAN) == undecided


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "share").mkdir()
    (tmp_path / "emflow.toml").write_text('[[watch]]\nroot = "share"\n')
    return load(tmp_path / "emflow.toml")


def commanded(key: str, relpath: bytes) -> Acquisition:
    return Acquisition(
        id=key,
        share="share",
        relpath=relpath,
        generation=0,
        state=AcquisitionState.GROWING,
        day="2026-01-01",
        trace=SCAN,
        seen_ns=10**18,
        changed_ns=0,
        fingerprint=Fingerprint(size=1, mtime_ns=1, ctime_ns=1),
    )


def test_events_of_agent_and_microscope_join_those_of_the_journal(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "experiments" / EXPERIMENT
    folder.mkdir(parents=True)
    agent = (told("sent", 1), told("found", 3.5, subject=JOB), told("decided", 4))
    microscope = (told("began", 2), told("noted", 3))
    next_ = told("sent", 5, subject=NEXT, trace=NEXT_SCAN)
    for name, events in {"h-1": (*agent, next_), "microscope": microscope}.items():
        (folder / f"events-{name}.jsonl").write_bytes(b"".join(jsonfile.encode(e) + b"\n" for e in events))
    other = "f" * 16
    with Journal(tmp_path / "journal.sqlite") as journal:
        mine = commanded(KEY, f"{SCAN}-00.npy".encode())
        journal.add_acquisition(mine)
        journal.add_acquisition(commanded(other, f"{SCAN}-01.npy".encode()))  # the second scan of one batch
        journal.merge([microscope[0]])  # known to both
        events = acquisition_events(journal, config, mine)
    assert [e.name for e in events] == ["sent", "began", "noted", "found", "decided", "sent", "noticed"]
    assert other not in {e.subject for e in events}
    assert [e for e in events if e.plane == "control"] == [agent[0], *microscope, *agent[1:], next_]
    assert any("0001-01" in line and "began" in line for line in trace_lines(events))


def test_the_id_of_any_command_of_a_decision_means_its_acquisition(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "experiments" / EXPERIMENT
    folder.mkdir(parents=True)
    (folder / "events-h-1.jsonl").write_bytes(jsonfile.encode(told("sent", 0, subject=SET)) + b"\n")
    assert trace_of(config, SET) == SCAN
    assert trace_of(config, NEXT) == NEXT
    assert trace_of(config, "scan.npy") == "scan.npy"


def test_what_a_job_told_after_the_service_had_merged_is_there_all_the_same(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "runs" / "2026-01-01" / KEY / "01"
    folder.mkdir(parents=True)
    early, late = told("claimed", 1, subject=JOB, plane="data"), told("written", 2, subject=JOB, plane="data")
    (folder / "events-h-1.jsonl").write_bytes(b"".join(jsonfile.encode(e) + b"\n" for e in (early, late)))
    with Journal(tmp_path / "journal.sqlite") as journal:
        acquisition = commanded(KEY, f"{SCAN}.npy".encode())
        journal.add_acquisition(acquisition)
        journal.add_job(Job(name=JOB, acquisition=KEY, attempt=1, state=JobState.PLANNED, recipe="r", scheduler="null"))
        journal.merge([early])
        events = acquisition_events(journal, config, acquisition)
    assert [e for e in events if e.plane == "data"] == [early, late]


def test_a_foreign_acquisition_has_only_what_the_journal_has(tmp_path: Path, config: Config) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        acquisition = commanded(KEY, b"scan.npy")
        foreign = Acquisition(**{f: getattr(acquisition, f) for f in acquisition.__struct_fields__} | {"trace": KEY})
        journal.add_acquisition(foreign)
        assert acquisition_events(journal, config, foreign) == [e for _, e in journal.events(trace=KEY)]
