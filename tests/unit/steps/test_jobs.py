"""Jobs: attempts, intent before act, and only a manifest is success; with schedulers that misbehave."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import wait
from typing import ClassVar

import numpy as np
import pytest

from emflow.config import SchedulerSettings
from emflow.errors import NoSpace, SubmitError, Unavailable
from emflow.records import AcquisitionState, Job, JobState, SchedulerPhase, job_name
from emflow.schedulers.protocol import Scheduler
from emflow.steps.ending import CLUSTER_GRACE_S, MANIFEST_GRACE_S
from emflow.steps.examine import examine
from emflow.steps.follow import AWAITED, end_jobs, follow
from emflow.steps.plan import plan
from emflow.steps.stage import stage
from emflow.steps.submit import submit
from mpi_kernels import jsonfile
from mpi_kernels.contract import Claim

A, J, P = AcquisitionState, JobState, SchedulerPhase


def sent(bench) -> str:
    bench.work(5)
    (job,) = [job for job in bench.jobs() if job.state in (J.SUBMITTED, J.RUNNING)]
    return job.name


def states(bench) -> list[JobState]:
    return [job.state for job in bench.jobs()]


def plan_only(bench) -> None:
    """Everything up to a planned job."""
    bench.look()
    examine(bench.context)
    for _ in range(2):
        stage(bench.context)
        wait(bench.context.transfers.values())
    plan(bench.context)
    assert states(bench) == [J.PLANNED]


def test_the_script_is_a_scheduler(scripts) -> None:
    assert isinstance(scripts(), Scheduler)


# --- attempts


def test_the_way_of_a_job(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.phases[name] = P.RUNNING
    scripted.turn()
    assert states(scripted) == [J.RUNNING]
    scripted.scheduler.run(name)
    scripted.work(2)
    assert (scripted.state(), states(scripted)) == (A.DONE, [J.REDUCED])
    assert scripted.told(name) == ["planned", "submitting", "submitted", "running", "reduced"]
    assert scripted.results == [f"{scripted.one().id}_emflow.h5"]
    assert (scripted.folder / "results" / f"{scripted.one().id}_emflow.png").exists()


def test_an_error_that_may_pass_is_tried_again_as_often_as_allowed(scripted) -> None:
    for n in range(3):
        scripted.scheduler.fail(sent(scripted))
        assert len(scripted.scheduler.sent) == n + 1
        scripted.turn()
    scripted.turn()
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED] * 3)
    assert "it went wrong (frame 3)" in scripted.one().reason
    scripted.work(30)
    assert len(scripted.scheduler.sent) == 3


def test_a_final_error_is_not_tried_again(scripted) -> None:
    scripted.scheduler.fail(sent(scripted), retryable=False)
    scripted.work(5)
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED])
    assert "final" in scripted.one().reason


@pytest.mark.parametrize("code", ["stopped", "no-space"])
def test_an_attempt_that_was_stopped_or_met_a_full_disk_is_not_counted(scripted, code: str) -> None:
    for _ in range(5):
        scripted.scheduler.fail(sent(scripted), code)
        scripted.turn()
        scripted.turn(60)
    assert scripted.state() is A.STAGED
    scripted.scheduler.run(sent(scripted))
    scripted.work(2)
    assert (scripted.state(), states(scripted)) == (A.DONE, [J.FAILED] * 5 + [J.REDUCED])
    assert scripted.context.alarms == {}


def test_an_attempt_that_ran_into_its_time_limit_is_counted(scripted) -> None:
    limit_s = scripted.scheduling.time_limit_s
    for _ in range(3):
        name = sent(scripted)
        claim = Claim(job=name, host="n1", pid=1, scheduler_id="", wall_ns=time.time_ns() - limit_s * 10**9)
        jsonfile.publish(scripted.job_folder() / "claim", jsonfile.encode(claim))
        scripted.scheduler.fail(name, "stopped")  # the kernels are told to stop, and don't know by whom
        scripted.turn()
    scripted.work(5)
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED] * 3)
    assert "time limit" in scripted.one().reason


def test_a_full_disk_is_an_alarm_and_attempts_get_rarer(scripted) -> None:
    for _ in range(4):
        scripted.scheduler.fail(sent(scripted), "no-space")
        scripted.turn()
        assert "disk runs" in scripted.context.alarms
        scripted.work(9)
    assert len(scripted.jobs()) == 5
    scripted.scheduler.fail(scripted.jobs()[-1].name, "no-space")
    scripted.work(14)  # it waits for 16 s now
    assert len(scripted.jobs()) == 5


def test_attempts_that_are_not_counted_end_with_the_numbers_that_there_are(scripted) -> None:
    name = sent(scripted)
    key, journal = scripted.one().id, scripted.journal
    scripted.scheduler.fail(name, "stopped")
    scripted.turn()
    for attempt in range(len(scripted.jobs()) + 1, 100):
        journal.add_job(
            Job(
                name=job_name(key, attempt), acquisition=key, attempt=attempt, state=J.PLANNED, recipe="r", scheduler=""
            )
        )
        journal.move_job(job_name(key, attempt), J.PLANNED, J.FAILED, reason="stopped: by hand")
    for job in journal.jobs_in({J.PLANNED, J.SUBMITTING, J.SUBMITTED}):
        journal.move_job(job.name, {J.PLANNED, J.SUBMITTING, J.SUBMITTED}, J.FAILED, reason="stopped: by hand")
    scripted.work(5)
    assert scripted.state() is A.QUARANTINED
    assert "99" in scripted.one().reason


def test_no_more_jobs_at_once_than_slots(make_bench, scripts) -> None:
    bench = make_bench(scheduler=scripts(), scheduling=SchedulerSettings(use="null", ranks=1, max_active=2)).open()
    for n in range(4):
        bench.save(f"scan{n}.npy")
    bench.work(10)
    assert len(bench.scheduler.sent) == 2
    bench.scheduler.run(bench.scheduler.sent[0])
    bench.work(3)
    assert len(bench.scheduler.sent) == 3
    for name in bench.scheduler.sent[1:]:
        bench.scheduler.run(name)
    bench.work(3)
    bench.scheduler.run(bench.scheduler.sent[3])
    bench.work(3)
    assert len(bench.results) == 4


# --- intent


def test_a_submission_whose_answer_was_lost_is_adopted(scripted) -> None:
    scripted.scheduler.lost.append(Unavailable("sbatch: Socket timed out on send/recv operation"))
    scripted.work(5)
    (name,) = scripted.scheduler.sent
    assert states(scripted) == [J.SUBMITTED]
    assert scripted.jobs()[0].scheduler_id == f"id-{name}"
    (event,) = [e for _, e in scripted.journal.events(subject=name) if e.name == "submitted"]
    assert event.attrs["adopted"] is True
    assert scripted.context.alarms == {}


@pytest.mark.parametrize("known", [True, False])
def test_killed_between_intent_and_fact(scripted, known: bool) -> None:
    scripted.scheduler.lost = [KeyboardInterrupt()] if known else []
    scripted.scheduler.refusals = [] if known else [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        scripted.work(5)
    assert states(scripted) == [J.SUBMITTING]
    scripted.open()
    scripted.work(3)
    assert states(scripted) == [J.SUBMITTED]
    assert len(scripted.scheduler.sent) == 1


def test_a_job_file_that_was_written_stays_as_it_is(scripted) -> None:
    plan_only(scripted)
    (job,) = scripted.jobs()
    folder = scripted.job_folder()
    scripted.scheduler.refusals = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        submit(scripted.context)
    before = (folder / "job.json").read_bytes()
    scripted.recipe = "default"
    scripted.open()
    scripted.work(3)
    assert scripted.scheduler.sent == [job.name]
    assert (folder / "job.json").read_bytes() == before


def test_a_refusal_that_may_pass_is_an_alarm_and_asked_again(scripted) -> None:
    scripted.scheduler.refusals = [SubmitError("QOS limit reached", transient=True)] * 3
    plan_only(scripted)
    submit(scripted.context)
    assert "QOS" in scripted.context.alarms["scheduler"]
    assert states(scripted) == [J.SUBMITTING]
    submit(scripted.context)  # not at once
    assert len(scripted.scheduler.refusals) == 2
    sent(scripted)
    assert scripted.context.alarms == {}


def test_a_refusal_for_good_is_final(scripted) -> None:
    scripted.scheduler.refusals = [SubmitError("invalid partition")]
    scripted.work(5)
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED])
    assert "invalid partition" in scripted.one().reason
    assert scripted.scheduler.sent == []
    assert scripted.context.alarms == {}


def test_no_room_for_the_job_is_an_alarm_and_tried_again(scripted) -> None:
    scripted.scheduler.refusals = [NoSpace("no room to start it")]
    plan_only(scripted)
    submit(scripted.context)
    assert "no room" in scripted.context.alarms["disk runs"]
    scripted.scheduler.run(sent(scripted))
    scripted.work(2)
    assert scripted.state() is A.DONE
    assert scripted.context.alarms == {}


def test_a_planned_job_of_a_share_that_is_gone_from_the_configuration(scripted) -> None:
    plan_only(scripted)
    scripted.open(shares=False)
    scripted.work(5)
    assert states(scripted) == [J.PLANNED]
    assert "not in the configuration" in " ".join(scripted.context.alarms.values())
    scripted.open()
    scripted.scheduler.run(sent(scripted))
    scripted.work(2)
    assert scripted.state() is A.DONE


def test_a_staged_acquisition_of_a_share_that_is_gone_from_the_configuration(scripted) -> None:
    scripted.scheduler.fail(sent(scripted))
    scripted.open(shares=False)
    scripted.work(5)
    assert (scripted.state(), states(scripted)) == (A.STAGED, [J.FAILED])
    assert "not in the configuration" in scripted.context.alarms["share share"]


def test_a_planned_job_of_a_superseded_acquisition_is_not_sent(scripted) -> None:
    plan_only(scripted)
    old = scripted.jobs()[0]
    key = scripted.one().id
    scripted.journal.move_acquisition(key, A.STAGED, A.SUPERSEDED, reason="rewritten")
    scripted.work(3)
    assert scripted.scheduler.sent == []
    assert scripted.journal.job(old.name).state is J.FAILED


# --- what the scheduler says


def test_a_scheduler_that_is_away_is_an_alarm_and_comes_back(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.away = True
    scripted.work(5)
    assert states(scripted) == [J.SUBMITTED]
    assert "does not answer" in scripted.context.alarms["scheduler poll"]
    scripted.scheduler.away = False
    scripted.scheduler.phases[name] = P.RUNNING
    scripted.work(2)
    assert states(scripted) == [J.RUNNING]
    assert scripted.context.alarms == {}


def test_a_folder_of_pools_that_is_away_stops_nothing_else(scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(scripted)

    def stale(jobs: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(scripted.scheduler, "poll", stale)
    scripted.work(2)
    assert states(scripted) == [J.SUBMITTED]
    assert "Stale file handle" in scripted.context.alarms["scheduler poll"]


def test_a_result_is_seen_though_the_scheduler_is_away(scripted) -> None:
    scripted.scheduler.run(sent(scripted))
    scripted.scheduler.away = True
    scripted.work(3)
    assert scripted.state() is A.DONE


def test_a_word_that_is_not_known_is_never_the_end(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.phases[name], scripted.scheduler.word = P.UNKNOWN, "TRANSMOGRIFIED"
    scripted.work(100)
    assert states(scripted) == [J.UNKNOWN]
    assert scripted.jobs()[0].reason == "TRANSMOGRIFIED"
    scripted.scheduler.phases[name] = P.PENDING
    scripted.work(2)
    assert states(scripted) == [J.SUBMITTED]
    scripted.scheduler.phases[name] = P.UNKNOWN
    scripted.work(2)
    scripted.scheduler.phases[name] = P.RUNNING
    scripted.work(2)
    assert states(scripted) == [J.RUNNING]
    scripted.scheduler.phases[name] = P.UNKNOWN
    scripted.work(2)
    scripted.scheduler.run(name)
    scripted.work(2)
    assert (scripted.state(), states(scripted)) == (A.DONE, [J.REDUCED])


@pytest.mark.parametrize(("here", "grace_s"), [(True, MANIFEST_GRACE_S), (False, CLUSTER_GRACE_S)])
@pytest.mark.parametrize("phase", [P.ENDED, P.GONE])
def test_ended_without_a_manifest_fails_only_after_the_grace(
    scripted, phase: SchedulerPhase, here: bool, grace_s: float
) -> None:
    scripted.scheduler.ends_with_service = here
    name = sent(scripted)
    scripted.scheduler.phases[name] = phase
    follow(scripted.context)
    scripted.clock.now += 0.9 * grace_s
    follow(scripted.context)
    assert states(scripted) == [J.SUBMITTED]
    assert scripted.jobs()[0].reason == AWAITED
    scripted.clock.now += 0.2 * grace_s
    follow(scripted.context)
    assert states(scripted) == [J.FAILED]
    assert "without a result" in scripted.jobs()[0].reason


def test_a_manifest_that_is_seen_late_counts(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.phases[name] = P.ENDED
    follow(scripted.context)
    scripted.scheduler.run(name)
    scripted.clock.now += 2 * CLUSTER_GRACE_S
    scripted.work(2)
    assert (scripted.state(), states(scripted)) == (A.DONE, [J.REDUCED])
    assert scripted.jobs()[0].reason == ""


def test_the_grace_begins_anew_for_each_doubt(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.phases[name] = P.ENDED
    follow(scripted.context)
    scripted.scheduler.phases[name] = P.RUNNING  # a scheduler that was wrong for a moment
    scripted.clock.now += 100
    follow(scripted.context)
    scripted.scheduler.phases[name] = P.ENDED
    follow(scripted.context)
    assert states(scripted) == [J.RUNNING]


@pytest.mark.parametrize("torn", [b"", b'{"v": 1, "job": "', b"[]", b'{"v": 99}'])
def test_a_torn_manifest_is_final_and_told(scripted, torn: bytes) -> None:
    name = sent(scripted)
    (scripted.job_folder() / "result.json").write_bytes(torn)
    scripted.scheduler.phases[name] = P.ENDED
    scripted.work(5)
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED])
    assert "result.json" in scripted.one().reason


# --- the end


def test_superseded_while_its_job_runs(scripted, good) -> None:
    old = sent(scripted)
    np.save(scripted.share / "scan.npy", good + 1)
    scripted.work(30)
    first = scripted.journal.job(old).acquisition
    assert scripted.journal.acquisition(first).state is A.SUPERSEDED
    scripted.scheduler.run(old)
    scripted.work(3)
    assert scripted.journal.job(old).state is J.REDUCED
    assert scripted.results == []
    (new,) = [job.name for job in scripted.jobs()]
    scripted.scheduler.run(new)
    scripted.work(3)
    assert scripted.state() is A.DONE
    assert scripted.results == [f"{scripted.one().id}_emflow.h5"]


def test_a_result_that_cannot_be_published_is_published_later(scripted) -> None:
    (scripted.folder / "results").write_text("a file where a folder should be")
    scripted.scheduler.run(sent(scripted))
    scripted.work(5)
    assert (scripted.state(), states(scripted)) == (A.STAGED, [J.REDUCED])
    (alarm,) = scripted.context.alarms
    assert alarm == f"trouble {scripted.one().id}"
    (scripted.folder / "results").unlink()
    scripted.work(5)
    assert scripted.state() is A.DONE
    assert scripted.context.alarms == {}


def test_killed_between_the_published_copy_and_the_journal(scripted) -> None:
    scripted.scheduler.run(sent(scripted))
    follow(scripted.context)
    results = scripted.folder / "results"
    results.mkdir()
    (results / f"{scripted.one().id}_emflow.h5").write_bytes(b"half of an older attempt")
    scripted.open()
    scripted.work(3)
    assert scripted.state() is A.DONE
    published = (results / f"{scripted.one().id}_emflow.h5").read_bytes()
    assert published == (scripted.job_folder() / "result.h5").read_bytes()


def test_a_service_that_stops_ends_jobs_that_end_with_it(make_bench, scripts) -> None:
    class OnThisMachine(scripts):
        ends_with_service: ClassVar[bool] = True

    bench = make_bench(scheduler=OnThisMachine()).open()
    bench.save()
    name = sent(bench)
    end_jobs(bench.context)
    assert bench.scheduler.cancelled == [f"id-{name}"]
    assert bench.jobs()[0].reason.startswith("stopped")
    bench.open()
    again = sent(bench)
    assert again != name
    bench.scheduler.run(again)
    bench.work(2)
    assert bench.state() is A.DONE


def test_a_service_that_stops_leaves_a_clusters_jobs_alone(scripted) -> None:
    sent(scripted)
    end_jobs(scripted.context)
    assert scripted.scheduler.cancelled == []
    assert states(scripted) == [J.SUBMITTED]


def test_a_job_that_made_it_before_the_stop_has_its_result(make_bench, scripts) -> None:
    class OnThisMachine(scripts):
        ends_with_service: ClassVar[bool] = True

    bench = make_bench(scheduler=OnThisMachine()).open()
    bench.save()
    bench.scheduler.run(sent(bench))
    end_jobs(bench.context)
    assert states(bench) == [J.REDUCED]


def test_trouble_with_one_acquisition_does_not_stop_the_others(scripted) -> None:
    name = sent(scripted)
    (scripted.job_folder() / "result.json").mkdir()
    scripted.work(3)
    assert os.strerror(errno.EISDIR) in scripted.context.alarms[f"trouble {name}"]
    scripted.save("other.npy")
    scripted.work(5)
    assert scripted.state("other.npy") is A.STAGED
    (scripted.job_folder() / "result.json").rmdir()
    scripted.scheduler.run(name)
    scripted.work(2)
    assert scripted.state() is A.DONE
    assert scripted.context.alarms == {}
