"""What jobs cost, what follows near a cap and at it, and what the service says of its backlog."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from emflow import backlog
from emflow.backlog import REFRESH_S
from emflow.config import CapSettings, SchedulerSettings
from emflow.errors import ConfigError
from emflow.journal_usage import by_day, day_of
from emflow.microscope import sidecar
from emflow.microscope.protocol import Acquired, Command, Scan4d
from emflow.pipeline import degraded_recipe
from emflow.records import AcquisitionState, EndCause, JobState, SchedulerPhase
from emflow.steps.economy import BOOK_S, TELL_S
from mpi_kernels import jsonfile

A, J, P, E = AcquisitionState, JobState, SchedulerPhase, EndCause
HOUR_S, DAY_S = 3600.0, 86_400.0
CHEAP = '[[reduction]]\nuse = "pattern"\nname = "pattern"\n'


def sent(bench, name: str = "scan.npy") -> str:
    bench.work(5)
    (job,) = [job for job in bench.jobs(name) if job.state in (J.SUBMITTED, J.RUNNING)]
    return job.name


def at(bench, hour: float) -> None:
    """Set the clock to an hour of a day, UTC; the clock of the pauses goes on by nothing."""
    bench.clock.began = datetime(2026, 3, 1, tzinfo=UTC).timestamp() + hour * HOUR_S - bench.clock.now


def spend(bench, name: str, hours: float, *, nodes: int = 1) -> None:
    """Let a job run for some time on some nodes, and succeed."""
    bench.scheduler.phases[name] = P.RUNNING
    bench.scheduler.facts[name] = {"nodes": nodes, "elapsed_s": 1.0}
    bench.turn()
    bench.clock.now += hours * HOUR_S - 1.0
    bench.scheduler.facts[name] = {"nodes": nodes, "elapsed_s": hours * HOUR_S, "cause": E.FAILED}
    bench.scheduler.phases[name] = P.ENDED
    bench.work(40)


@pytest.fixture
def capped(make_bench, scripts):
    """Make a bench with caps, one job at a time, and a cheap recipe."""

    def make(**caps: object):
        bench = make_bench(scheduler=scripts(), scheduling=SchedulerSettings(use="null", ranks=1, attempts=20))
        (bench.folder / "cheap.toml").write_text(f'name = "cheap"\n{CHEAP}')
        bench.caps = CapSettings(degraded="./cheap.toml", **caps)
        bench.recipe = "default"
        return bench.open()

    return make


# --- what a job costs


def test_a_job_belongs_to_the_days_on_which_it_ran() -> None:
    start = int(datetime(2026, 2, 28, 23, 0, tzinfo=UTC).timestamp() * 1e9)
    spent = by_day(start, start + 26 * 3600 * 10**9, 3)
    assert spent == {"2026-02-28": 3 * HOUR_S, "2026-03-01": 3 * DAY_S, "2026-03-02": 3 * HOUR_S}
    assert by_day(start, start, 3) == by_day(start, start - 1, 3) == {}
    assert day_of(start) == "2026-02-28"


def test_nodes_and_time_are_the_schedulers(capped) -> None:
    bench = capped()
    at(bench, 10)
    bench.save()
    name = sent(bench)
    spend(bench, name, 2.0, nodes=3)
    assert bench.journal.usage.of_day("2026-03-01") == pytest.approx(6.0, abs=0.01)
    assert bench.journal.usage.of_acquisition(bench.one().id) == pytest.approx(6.0, abs=0.01)
    (failed,) = [e for _, e in bench.journal.events(subject=name, names=("failed",))]
    assert failed.attrs["node_hours"] == pytest.approx(6.0, abs=0.01)
    assert (bench.jobs()[0].nodes, bench.journal.usage.of_day("2026-03-02")) == (3, 0.0)
    spend(bench, sent(bench), 1.0)
    assert bench.journal.usage.of_acquisition(bench.one().id) == pytest.approx(7.0, abs=0.02)


def test_over_midnight(capped) -> None:
    bench = capped()
    at(bench, 23)
    bench.save()
    spend(bench, sent(bench), 3.0, nodes=2)
    days = [bench.journal.usage.of_day(day) for day in ("2026-03-01", "2026-03-02")]
    assert days == pytest.approx([2.0, 4.0], abs=0.1)
    assert sum(days) == pytest.approx(6.0, abs=0.01)


def test_a_job_that_runs_costs_already(capped) -> None:
    bench = capped()
    at(bench, 1)
    bench.save()
    name = sent(bench)
    bench.scheduler.phases[name] = P.RUNNING
    for elapsed_s in (1.0, 0.9 * BOOK_S):
        bench.scheduler.facts[name] = {"nodes": 10, "elapsed_s": elapsed_s}
        bench.turn(elapsed_s)
    assert bench.journal.usage.of_day("2026-03-01") == 0.0
    (bench.job_folder() / "heartbeat").write_text("it lives")
    bench.scheduler.facts[name] = {"nodes": 10, "elapsed_s": HOUR_S}
    bench.turn(HOUR_S)
    assert bench.journal.usage.of_day("2026-03-01") == pytest.approx(10.0)


def test_where_the_scheduler_does_not_say_it_is_from_the_claim_to_the_end(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.claim(name, ago_s=HOUR_S)
    scripted.scheduler.fail(name)
    scripted.turn()
    assert scripted.journal.usage.of_acquisition(scripted.one().id) == pytest.approx(1.0, abs=0.01)
    scripted.scheduler.run(sent(scripted))
    scripted.work(2)
    (reduced,) = [e for _, e in scripted.journal.events(names=("reduced",)) if e.plane == "management"]
    assert 0 < reduced.attrs["node_hours"] < 0.01


def test_a_job_that_never_started_costs_nothing(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.facts[name], scripted.scheduler.phases[name] = {"cause": E.CANCELLED}, P.ENDED
    scripted.work(40)
    assert scripted.journal.job(name).state is J.FAILED
    assert scripted.journal.usage.of_acquisition(scripted.one().id) == 0.0


def test_a_service_that_comes_back_days_later_books_the_days_of_the_job(capped) -> None:
    bench = capped()
    at(bench, 10)
    bench.save()
    name = sent(bench)
    bench.scheduler.phases[name], bench.scheduler.facts[name] = P.RUNNING, {"nodes": 2, "elapsed_s": 1.0}
    bench.turn()
    bench.clock.now += 3 * DAY_S
    bench.scheduler.phases[name] = P.ENDED
    bench.scheduler.facts[name] = {"nodes": 2, "elapsed_s": HOUR_S, "cause": E.FAILED}
    bench.open().work(40)
    assert bench.journal.usage.of_day("2026-03-01") == pytest.approx(2.0, abs=0.01)
    assert bench.journal.usage.of_day("2026-03-04") == 0.0


# --- caps


def test_near_a_cap_jobs_are_cheaper_at_it_they_wait_and_the_next_day_they_go_on(capped) -> None:
    bench = capped(node_hours_per_day=10.0, degrade_at=0.5)
    at(bench, 9)
    bench.save()
    spend(bench, sent(bench), 4.0)
    assert bench.jobs()[-1].recipe == "default"
    spend(bench, sent(bench), 2.0)
    name = sent(bench)  # 6 of 10
    assert bench.jobs()[-1].recipe == "cheap"
    (planned,) = [e for _, e in bench.journal.events(subject=name, names=("planned",))]
    assert planned.attrs["degraded"] is True
    assert jsonfile.decode(dict, (bench.job_folder() / "job.json").read_bytes())["recipe"]["name"] == "cheap"
    spend(bench, name, 4.5)
    waiting = [bench.save(f"more{n}.npy", np.full((2, 2, 4, 4), n, "uint16")).name for n in range(3)]
    bench.work(60)
    assert len(bench.scheduler.sent) == 3
    (alarm,) = [text for name, text in bench.context.alarms.items() if name.startswith("cap")]
    assert "10.5 of 10 node-hours" in alarm
    assert "00:00 UTC" in alarm
    assert {bench.state(name) for name in waiting} == {A.STAGED}
    at(bench, 24.01)
    bench.work(10)
    assert bench.context.alarms == {}
    for _ in range(4):  # in their turn; none was dropped
        bench.work(5)
        name = bench.scheduler.sent[-1]
        assert bench.journal.job(name).recipe == "default"
        bench.scheduler.run(name)
    bench.work(5)
    assert {bench.state(name) for name in ("scan.npy", *waiting)} == {A.DONE}


def test_without_a_cheaper_recipe_jobs_stay_as_they_are_until_the_cap(capped) -> None:
    bench = capped(node_hours_per_day=10.0)
    bench.caps = CapSettings(node_hours_per_day=10.0)
    bench.open()
    at(bench, 9)
    bench.save()
    spend(bench, sent(bench), 9.0)
    sent(bench)
    assert bench.jobs()[-1].recipe == "default"


def commanded(bench, experiment: str, number: int) -> str:
    """A scan as the microscope's server leaves it."""
    name = f"{experiment}-{number:04d}-00"
    path = bench.save(f"{name}.npy", np.full((2, 3, 8, 9), number, "uint16"))
    command = Command(
        id=name, trace=name, action=Scan4d(shape=(2, 3), step_nm=1.0, exposure_us=1.0), epoch=1, not_after_s=1.0
    )
    acquired = Acquired(name=name, path=path.name, kind="4d", scan_shape=(2, 3), det_shape=(8, 9), frames=6, dose_e=0.0)
    sidecar.write(bench.share, sidecar.Sidecar.of(command, acquired))
    return path.name


def test_a_cap_of_an_experiment_holds_that_one_alone(capped) -> None:
    bench = capped(node_hours_per_experiment=5.0)
    first, other = "e0123456789ab", "e0123456789ac"
    spend(bench, sent(bench, commanded(bench, first, 0)), 5.5)
    bench.work(20)
    assert len(bench.scheduler.sent) == 1
    assert bench.journal.usage.of_experiment(first) == pytest.approx(5.5, abs=0.01)
    assert bench.journal.usage.of_experiment(other) == 0.0
    assert "node_hours_per_experiment" in bench.context.alarms[f"cap experiment {first}"]
    bench.scheduler.run(sent(bench, commanded(bench, other, 0)))
    bench.save()
    bench.scheduler.run(sent(bench))
    bench.work(5)
    assert (bench.state(), bench.state(f"{other}-0000-00.npy")) == (A.DONE, A.DONE)
    assert bench.state(f"{first}-0000-00.npy") is A.STAGED
    bench.caps = CapSettings(node_hours_per_experiment=50.0)
    bench.open()
    bench.scheduler.run(sent(bench, f"{first}-0000-00.npy"))
    bench.work(3)
    assert bench.state(f"{first}-0000-00.npy") is A.DONE
    assert bench.context.alarms == {}


def test_two_recipes_of_one_name_are_refused(capped) -> None:
    bench = capped(node_hours_per_day=1.0)
    assert degraded_recipe(bench.context.config).name == "cheap"
    (bench.folder / "cheap.toml").write_text(f'name = "default"\n{CHEAP}')
    with pytest.raises(ConfigError, match="both called"):
        degraded_recipe(bench.context.config)


# --- the backlog


def told(bench) -> backlog.Backlog | None:
    return backlog.read(bench.context.runs.root)


def test_without_a_limit_nothing_is_published(scripted) -> None:
    sent(scripted)
    assert told(scripted) is None


def test_the_backlog_is_told_when_it_changes_and_again_while_it_is_too_large(capped) -> None:
    bench = capped(backlog=1)
    names = [bench.save(f"scan{n}.npy", np.full((2, 2, 4, 4), n, "uint16")).name for n in range(3)]
    bench.work(10)
    said = told(bench)
    assert (said.waiting, said.limit, said.over) == (3, 1, True)
    bench.turn(0.9 * REFRESH_S)
    bench.turn(0.2 * REFRESH_S)
    again = told(bench)
    assert again.waiting == 3
    assert again != said
    for _ in names:
        bench.scheduler.run(bench.scheduler.sent[-1])
        bench.work(TELL_S + 4)
    assert (told(bench).waiting, told(bench).over) == (0, False)
    still = told(bench)
    bench.turn(10 * REFRESH_S)
    assert told(bench) == still  # nobody has to be held, so nothing has to be said again


def test_a_file_that_is_none_says_nothing(tmp_path: Path) -> None:
    assert backlog.read(tmp_path) is None
    for text in (
        "",
        "{",
        "[]",
        json.dumps({"waiting": 3}),
        json.dumps({"waiting": 3, "limit": 1, "wall_ns": 1, "v": 2}),
    ):
        (tmp_path / "backlog.json").write_text(text)
        assert backlog.read(tmp_path) is None


def test_a_backlog_that_cannot_be_published_is_an_alarm(capped) -> None:
    bench = capped(backlog=1)
    bench.save()
    bench.context.runs.root.mkdir(exist_ok=True)
    (bench.context.runs.root / "backlog.json").mkdir()
    bench.scheduler.run(sent(bench))
    assert "backlog.json" in bench.context.alarms["trouble backlog"]
    (bench.context.runs.root / "backlog.json").rmdir()
    bench.work(5)
    assert (bench.state(), bench.context.alarms) == (A.DONE, {})
