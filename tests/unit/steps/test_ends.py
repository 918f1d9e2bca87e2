"""What follows when a job ends without a result, by the cause that its scheduler names, and what is alive."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from emflow.config import Bytes, SchedulerSettings, SlurmSettings
from emflow.records import AcquisitionState, EndCause, JobState, SchedulerPhase
from emflow.steps.ending import CLUSTER_GRACE_S
from emflow.steps.follow import LEAVING_S
from mpi_kernels import jsonfile
from mpi_kernels.contract import ResultManifest

A, J, P, E = AcquisitionState, JobState, SchedulerPhase, EndCause
LONG_S = CLUSTER_GRACE_S + 100.0


def sent(bench) -> str:
    """The attempt that the scheduler has, once it has one."""
    bench.work(5)
    (job,) = [job for job in bench.jobs() if job.state in (J.SUBMITTED, J.RUNNING)]
    return job.name


def states(bench) -> list[JobState]:
    return [job.state for job in bench.jobs()]


def end(bench, name: str, cause: EndCause, **facts: object) -> None:
    """Let the scheduler say why a job ended, and wait until that is believed."""
    bench.scheduler.phases[name] = P.ENDED
    bench.scheduler.facts[name] = {"cause": cause, "reason": f"{cause} as Slurm says it", **facts}
    bench.work(LONG_S)


def partial(folder: Path, job: str, number: int, coverage: float) -> None:
    """The manifest of a partial result, as the kernels leave it."""
    manifest = ResultManifest(
        job=job,
        acquisition=job[:16],
        trace=job[:16],
        recipe="quick",
        result=f"partial-{number}.h5",
        result_sha256="0" * 64,
        preview=None,
        outputs=(),
        scalars={},
        skipped=(),
        frames=3,
        coverage=coverage,
        partial=True,
        quality="OK",
        quality_reasons=(),
        seconds={},
        ranks=1,
        host="n1",
        source_digest=None,
        wall_ns=time.time_ns(),
        program="test",
    )
    jsonfile.publish(folder / f"partial-{number}.json", jsonfile.encode(manifest))


# --- memory


@pytest.fixture
def short(make_bench, scripts):
    """A bench whose jobs have 1 GiB of each node, and a single attempt."""
    bench = make_bench(
        scheduler=scripts(),
        scheduling=SchedulerSettings(use="null", ranks=1, attempts=1),
        slurm=SlurmSettings(memory=Bytes(1 << 30)),
    ).open()
    bench.save()
    return bench


def test_out_of_memory_is_tried_once_more_with_twice_as_much(short) -> None:
    first = sent(short)
    assert short.scheduler.asked[first].memory_mib == 0  # the configuration says it
    end(short, first, E.OUT_OF_MEMORY)
    second = sent(short)
    assert short.scheduler.asked[second].memory_mib == 2048
    assert [job.memory_mib for job in short.jobs()] == [0, 2048]
    (planned,) = [e for _, e in short.journal.events(subject=second, names=("planned",))]
    assert planned.attrs["memory_mib"] == 2048
    short.scheduler.run(second)
    short.work(2)
    assert (short.state(), states(short)) == (A.DONE, [J.FAILED, J.REDUCED])


def test_out_of_memory_twice_is_for_a_person_who_is_told_the_setting(short) -> None:
    end(short, sent(short), E.OUT_OF_MEMORY)
    end(short, sent(short), E.OUT_OF_MEMORY)
    assert (short.state(), states(short)) == (A.QUARANTINED, [J.FAILED] * 2)
    assert "memory in [slurm]" in short.one().reason
    assert "1024 and then 2048 MiB" in short.one().reason


def test_the_next_attempt_after_another_end_keeps_the_memory(short) -> None:
    end(short, sent(short), E.OUT_OF_MEMORY)
    end(short, sent(short), E.NODE_FAIL)
    assert short.scheduler.asked[sent(short)].memory_mib == 2048


def test_memory_of_the_sites_profile_is_doubled(make_bench, scripts, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('memory = "3 GiB"\n')
    bench = make_bench(scheduler=scripts(), slurm=SlurmSettings(site=str(tmp_path / "site.toml"))).open()
    bench.save()
    end(bench, sent(bench), E.OUT_OF_MEMORY)
    assert bench.scheduler.asked[sent(bench)].memory_mib == 6144


def test_memory_that_the_scheduler_tells_is_doubled(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.phases[name], scripted.scheduler.facts[name] = P.RUNNING, {"memory_mib": 700}
    scripted.turn()
    end(scripted, name, E.OUT_OF_MEMORY)
    assert scripted.scheduler.asked[sent(scripted)].memory_mib == 1400


def test_python_out_of_memory_is_the_same(short) -> None:
    short.scheduler.fail(sent(short), "memory")
    assert short.scheduler.asked[sent(short)].memory_mib == 2048


def test_a_rank_that_was_stopped_because_another_one_had_no_memory(short) -> None:
    name = sent(short)
    short.scheduler.fail(name, "stopped")  # srun ends the other ranks
    end(short, name, E.OUT_OF_MEMORY)
    assert short.scheduler.asked[sent(short)].memory_mib == 2048


# --- taken away


@pytest.mark.parametrize("cause", [E.NODE_FAIL, E.BOOT_FAIL, E.PREEMPTED, E.CANCELLED])
def test_a_job_that_was_taken_away_is_fenced_and_not_counted(scripted, cause: EndCause) -> None:
    calls = []
    for n in range(1, 6):
        name = sent(scripted)
        scripted.scheduler.claim(name)
        end(scripted, name, cause)
        calls += [f"sent {n:02d}", f"cancelled {n:02d}"]
        assert (scripted.job_folder(attempt=n - 1) / "claim").exists()
    scripted.scheduler.run(sent(scripted))
    scripted.work(2)
    assert (scripted.state(), states(scripted)) == (A.DONE, [J.FAILED] * 5 + [J.REDUCED])
    assert scripted.scheduler.calls == [*calls, "sent 06"]
    assert all(job.reason.startswith("lost: ") and cause in job.reason for job in scripted.jobs()[:5])


def test_the_next_attempt_waits_until_nothing_of_the_old_one_is_left(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.stuck_cancel = True
    end(scripted, name, E.NODE_FAIL)
    assert states(scripted) == [J.SUBMITTED]
    assert "still there" in scripted.context.alarms[f"trouble {name}"]
    scripted.scheduler.stuck_cancel = False
    scripted.work(5)
    assert states(scripted) == [J.FAILED, J.SUBMITTED]
    assert scripted.context.alarms == {}


def test_attempts_that_are_taken_away_at_once_get_rarer(scripted) -> None:
    for _ in range(4):
        name = sent(scripted)
        scripted.scheduler.fail(name, "stopped")  # told to stop: its scheduler's word is enough, and no time passes
        scripted.scheduler.facts[name] = {"cause": E.PREEMPTED}
        scripted.work(9)
    assert len(scripted.scheduler.sent) == 5
    name = scripted.scheduler.sent[-1]
    scripted.scheduler.facts[name] = {"cause": E.PREEMPTED}
    scripted.scheduler.fail(name, "stopped")
    scripted.work(14)  # it waits for 16 s now
    assert len(scripted.scheduler.sent) == 5


def test_a_result_that_was_there_before_the_node_failed_counts(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.run(name)
    end(scripted, name, E.NODE_FAIL)
    assert (scripted.state(), states(scripted)) == (A.DONE, [J.REDUCED])


# --- time


@pytest.mark.parametrize("cause", [E.TIMEOUT, E.DEADLINE])
def test_a_time_limit_counts_and_tells_the_setting_and_what_is_there(scripted, cause: EndCause) -> None:
    for _ in range(3):
        name = sent(scripted)
        partial(scripted.job_folder(), name, 3, 0.25)
        partial(scripted.job_folder(), name, 4, 0.5)
        end(scripted, name, cause)
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED] * 3)
    for word in ("time limit of 3600 s", "time_limit_s in [scheduler]", "50%", "partial-4.h5"):
        assert word in scripted.one().reason


def test_a_job_that_was_told_to_stop_and_then_had_no_time_left_counts(scripted) -> None:
    for _ in range(3):
        name = sent(scripted)
        scripted.scheduler.fail(name, "stopped")
        end(scripted, name, E.TIMEOUT)
    assert scripted.state() is A.QUARANTINED


def test_a_job_that_stopped_in_time_counts(scripted) -> None:
    for _ in range(3):
        name = sent(scripted)
        partial(scripted.job_folder(), name, 1, 0.75)
        scripted.scheduler.fail(name, "time-limit")
    scripted.work(5)
    assert scripted.state() is A.QUARANTINED
    assert "75%" in scripted.one().reason


# --- alive


def beat(bench, number: int) -> None:
    """A heartbeat that differs from the one before."""
    (bench.job_folder() / "heartbeat").write_text(json.dumps({"beat": "x" * number}))


def running(bench) -> str:
    name = sent(bench)
    bench.scheduler.phases[name] = P.RUNNING
    bench.turn()
    assert states(bench)[-1] is J.RUNNING
    return name


def test_a_job_that_is_said_to_run_and_shows_no_sign_of_life_is_ended_and_followed(scripted) -> None:
    name, silent_s = running(scripted), scripted.scheduling.silent_s
    for number in range(1, 4):
        beat(scripted, number)
        scripted.work(0.9 * silent_s)
        assert states(scripted) == [J.RUNNING]
    scripted.work(0.2 * silent_s)
    assert scripted.scheduler.calls == ["sent 01", "cancelled 01", "sent 02"]
    assert "sign of life" in scripted.journal.job(name).reason
    for _ in range(2):
        running(scripted)
        scripted.work(1.2 * silent_s)
    assert (scripted.state(), states(scripted)) == (A.QUARANTINED, [J.FAILED] * 3)  # it counts: a program may hang


def test_a_first_heartbeat_may_come_late(scripted) -> None:
    running(scripted)
    scripted.work(0.9 * scripted.scheduling.silent_s)
    beat(scripted, 1)
    scripted.work(0.9 * scripted.scheduling.silent_s)
    assert states(scripted) == [J.RUNNING]
    scripted.work(0.2 * scripted.scheduling.silent_s)
    assert states(scripted)[0] is J.FAILED


def test_time_for_which_a_job_is_suspended_is_not_silence(scripted) -> None:
    name = running(scripted)
    beat(scripted, 1)
    for elapsed_s in (100, 100, 100, 500):  # the scheduler's clock of a job stands still meanwhile
        scripted.scheduler.facts[name] = {"elapsed_s": elapsed_s, "nodes": 1}
        scripted.work(3 * scripted.scheduling.silent_s)
    assert states(scripted) == [J.RUNNING]
    scripted.scheduler.phases[name] = P.PENDING  # how Slurm's SUSPENDED is told
    scripted.scheduler.facts[name] = {"elapsed_s": 5000, "reason": "SUSPENDED: it goes on when Slurm lets it"}
    scripted.work(3 * scripted.scheduling.silent_s)
    assert states(scripted) == [J.RUNNING]
    assert "SUSPENDED" in scripted.jobs()[0].reason
    scripted.scheduler.phases[name] = P.RUNNING
    scripted.scheduler.facts[name] = {"elapsed_s": 9000}
    scripted.work(20)
    assert states(scripted) == [J.RUNNING]
    assert scripted.jobs()[0].reason == ""
    scripted.scheduler.facts[name] = {"elapsed_s": 9000 + 2 * scripted.scheduling.silent_s}
    scripted.work(2 * scripted.scheduling.silent_s)
    assert states(scripted)[0] is J.FAILED


def test_a_job_that_said_it_was_stopped_and_stays_is_cancelled(scripted) -> None:
    name = running(scripted)
    scripted.scheduler.fail(name, "stopped")
    scripted.scheduler.phases[name] = P.RUNNING  # its ranks do not end
    scripted.work(0.8 * LEAVING_S)
    assert states(scripted) == [J.RUNNING]
    scripted.work(LEAVING_S)
    assert scripted.scheduler.calls == ["sent 01", "cancelled 01", "sent 02"]
    assert scripted.jobs()[0].reason.startswith("stopped")


# --- waiting


def test_a_wait_that_never_ends_is_an_alarm_and_never_a_failure(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.facts[name] = {"reason": "waits (Priority): jobs before it in the queue"}
    scripted.work(3)
    assert scripted.context.alarms == {}
    assert "Priority" in scripted.jobs()[0].reason
    scripted.scheduler.facts[name] = {"reason": "waits for ever (JobHeldUser): a user held it", "stuck": True}
    scripted.work(3000)
    assert states(scripted) == [J.SUBMITTED]
    assert "a user held it" in scripted.context.alarms[f"waiting {name}"]
    assert "a user held it" in scripted.jobs()[0].reason
    scripted.scheduler.facts[name] = {}
    scripted.scheduler.phases[name] = P.RUNNING
    scripted.work(2)
    assert scripted.context.alarms == {}
    scripted.scheduler.run(name)
    scripted.work(2)
    assert scripted.state() is A.DONE


def test_a_stuck_job_that_is_cancelled_leaves_no_alarm(scripted) -> None:
    name = sent(scripted)
    scripted.scheduler.facts[name] = {"reason": "waits for ever", "stuck": True}
    scripted.work(3)
    assert f"waiting {name}" in scripted.context.alarms
    end(scripted, name, E.CANCELLED)
    assert f"waiting {name}" not in scripted.context.alarms
    assert states(scripted)[0] is J.FAILED
