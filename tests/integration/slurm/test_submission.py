"""Submission by intent, on a real cluster that fails in the middle of it: never lost, and never computed twice."""

from __future__ import annotations

import hashlib
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from benchmarks.cluster import Cluster
from emflow.errors import SubmitError, Unavailable
from emflow.records import AcquisitionState, EndCause, JobState, Resources, SchedulerPhase
from mpi_kernels import jsonfile
from mpi_kernels.contract import CLAIM_FILE, RESULT_FILE, Claim, ResultManifest

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_mpi, pytest.mark.timeout(300)]
ONE = Resources(ranks=1, time_limit_s=300)


def sent(cluster: Cluster, name: str) -> list[str]:
    """Ids of all jobs that Slurm ever got under a name."""
    return cluster.run("squeue", "-h", "-t", "all", f"--name={name}", "-o", "%i").split()


def asked_until_known(jobs: SimpleNamespace, scheduler, name: str, folder: Path) -> list[str]:
    """What the steps do after a doubt: ask, and ask again while there is no answer."""
    found: list[list[str]] = []

    def known() -> bool:
        try:
            found.append(scheduler.find(name, folder))
        except Unavailable:
            return False
        return True

    jobs.eventually(known)
    return found[0]


def test_controller_that_hangs_takes_the_job_all_the_same(
    hanging: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    hanging.signal("slurmctld", signal.SIGSTOP)
    with pytest.raises((SubmitError, Unavailable)) as refused:
        scheduler.submit(name, folder, ONE)
    assert not isinstance(refused.value, SubmitError) or refused.value.transient
    with pytest.raises(Unavailable):
        scheduler.find(name, folder)  # nobody can say
    hanging.signal("slurmctld", signal.SIGCONT)
    found = asked_until_known(jobs, scheduler, name, folder)
    assert len(found) == 1
    jobs.until_ended(scheduler, name, found[0])
    assert jsonfile.read(ResultManifest, folder / RESULT_FILE).job == name
    hanging.until(lambda: sent(hanging, name) == found, "more than one job")


def test_sbatch_killed_before_it_prints(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    called = first_call("sbatch", '"$real" "$@" >/dev/null; kill -KILL $$')
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    with pytest.raises(SubmitError, match="killed by signal 9") as refused:
        scheduler.submit(name, folder, ONE)
    assert refused.value.transient
    assert called.exists()
    found = scheduler.find(name, folder)
    assert found == sent(shared, name)
    assert len(found) == 1


def test_what_was_never_sent_is_sent_after_a_while_only(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    first_call("sbatch", "kill -KILL $$")
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path, settle_s=1.0)
    with pytest.raises(SubmitError):
        scheduler.submit(name, folder, ONE)
    with pytest.raises(Unavailable, match="may still turn up"):
        scheduler.find(name, folder)
    assert asked_until_known(jobs, scheduler, name, folder) == []
    scheduler_id = scheduler.submit(name, folder, ONE)
    assert scheduler.find(name, folder) == [scheduler_id]


def test_answer_that_is_no_id_is_a_doubt(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    first_call("sbatch", '"$real" "$@" >/dev/null; echo "lua: welcome to the cluster"')
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    with pytest.raises(SubmitError, match="no id") as refused:
        scheduler.submit(name, folder, ONE)
    assert refused.value.transient
    assert scheduler.find(name, folder) == sent(shared, name)


def test_wrapper_of_a_site_may_greet(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    first_call("sbatch", 'echo "welcome, 17 hours left"; "$real" "$@"; echo "bye"')
    name, folder = jobs.plan(tmp_path)
    assert [jobs.make_scheduler(tmp_path).submit(name, folder, ONE)] == sent(shared, name)


def test_late_twin_does_nothing_and_the_first_counts(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    """A request that was taken for lost arrives: two jobs of one name, of which the one that came first works."""
    name, folder = jobs.plan(tmp_path, waits=True)
    scheduler = jobs.make_scheduler(tmp_path)
    first = scheduler.submit(name, folder, ONE)
    jobs.until_claimed(folder)
    second = scheduler.submit(name, folder, ONE)  # what the journal knows
    jobs.eventually(lambda: shared.run("squeue", "-h", "-t", "all", "-j", second, "-o", "%T").strip() == "COMPLETED")
    said = jobs.status(scheduler, name, second)
    assert (said.scheduler_id, said.phase) == (first, SchedulerPhase.RUNNING)
    assert scheduler.find(name, folder) == [first, second]
    assert jsonfile.read(Claim, folder / CLAIM_FILE).scheduler_id == first
    scheduler.cancel(second)  # ends the whole attempt
    assert jobs.processes_of(folder) == []
    assert jobs.status(scheduler, name, first).cause is EndCause.CANCELLED


def test_name_of_another_job_with_the_same_id_is_not_ours(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_ended(scheduler, name, scheduler_id)
    other = f"{name[:-2]}77"
    assert jobs.status(scheduler, other, scheduler_id).phase is SchedulerPhase.GONE


# --- the whole service


BEFORE = "kill -KILL $PPID"
STEPS = {
    "before it is sent": BEFORE,
    "after it was taken, before anything is said": f'"$real" "$@" >/dev/null; {BEFORE}',
    "after the id was printed, before it is recorded": f'"$real" "$@"; {BEFORE}',
}


def fill(place) -> str:
    """A scan whose name no other test uses: Slurm remembers their jobs by names that are made of this one."""
    name = f"scan {hashlib.sha256(bytes(place.folder)).hexdigest()[:12]}.npy"
    np.save(place.share / name, np.arange(3 * 4 * 5 * 6, dtype=np.uint16).reshape(3, 4, 5, 6))
    return name


def converged(cluster: Cluster, place) -> None:
    """One job for Slurm, one attempt for the journal, one result."""
    done = place.emflow("run", "--once", code=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(place.states().values()) == {AcquisitionState.DONE}
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        (job,) = journal.jobs(acquisition.id)
    assert job.state is JobState.REDUCED
    assert sent(cluster, job.name) == [job.scheduler_id]
    assert len(list((place.folder / "runs").rglob("result.json"))) == 1
    assert len(place.results) == 1


@pytest.mark.parametrize("step", STEPS)
def test_service_killed_while_it_submits(
    step: str, shared: Cluster, services: ModuleType, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    called = first_call("sbatch", STEPS[step])
    place = services.Place(tmp_path / "here", scheduler="slurm", stall_s=30, quarantine_s=60)
    fill(place)
    killed = place.emflow("run", "--once", code=None)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert called.exists()
    converged(shared, place)


def test_request_of_a_killed_service_that_arrives_after_its_successor_s(
    shared: Cluster, services: ModuleType, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    """sbatch outlives the service, and is slower than the next service: two jobs, of which one works."""
    go = tmp_path / "go"
    late = f"kill -KILL $PPID; until [[ -e '{go}' ]]; do sleep 0.05; done; \"$real\" \"$@\" >'{go}.id'"
    first_call("sbatch", late)
    place = services.Place(tmp_path / "here", scheduler="slurm", stall_s=30, quarantine_s=60)
    fill(place)
    # its output goes to a file: sbatch would hold a pipe open
    with (tmp_path / "out").open("wb") as out:
        killed = subprocess.run(place.command("run", "--once"), stdout=out, stderr=out, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = place.emflow("run", "--once", code=None)
    assert done.returncode == 0, done.stdout + done.stderr
    go.touch()
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        (job,) = journal.jobs(acquisition.id)

    def twin() -> list[str]:
        said = shared.run("squeue", "-h", "-t", "completed", f"--name={job.name}", "-o", "%i")
        return [one for one in said.split() if one != job.scheduler_id]

    shared.until(lambda: bool(twin()), "the late job has not come", 90.0)
    assert len(sent(shared, job.name)) == 2
    (folder,) = (place.folder / "runs").glob(f"*/{acquisition.id}/01")
    assert jsonfile.read(Claim, folder / CLAIM_FILE).scheduler_id == job.scheduler_id
    assert jsonfile.read(ResultManifest, folder / RESULT_FILE).job == job.name


@pytest.mark.slow
@pytest.mark.needs_strace
@pytest.mark.timeout(900)
def test_service_killed_at_every_commit(shared: Cluster, services: ModuleType, tmp_path: Path) -> None:
    """With synchronous=FULL each commit of the journal is one fdatasync of the main thread: this is every state."""

    def run(place, *options: str) -> int:
        log = str(place.folder / "strace.log")
        command = ["strace", "-qq", "-o", log, "-e", "trace=fdatasync", *options, "--", *place.command("run", "--once")]
        return subprocess.run(command, capture_output=True, timeout=100, check=False).returncode

    def made(number: int):
        place = services.Place(tmp_path / f"here{number}", scheduler="slurm", stall_s=30, quarantine_s=60)
        fill(place)
        return place

    counting = made(0)
    assert run(counting) == 0
    commits = (counting.folder / "strace.log").read_text().count("fdatasync(")
    assert commits >= 8
    for number in range(1, commits + 1):
        place = made(number)
        killed = run(place, "-e", f"inject=fdatasync:signal=SIGKILL:when={number}")
        # how often it is told why a job waits depends on Slurm's pace: a run may have fewer commits than the first
        assert killed == -signal.SIGKILL or (killed == 0 and number > 8), f"the kill at {number} did not fire"
        converged(shared, place)


def test_service_goes_on_while_slurmctld_is_away_and_restarted(
    own: Cluster, services: ModuleType, tmp_path: Path
) -> None:
    place = services.Place(tmp_path / "here", scheduler="slurm", stall_s=30, quarantine_s=60)
    with place.start() as service:
        own.signal("slurmctld", signal.SIGKILL)
        name = fill(place)

        def alarmed() -> bool:
            return any("scheduler" in name for name in place.json("status", code=None).get("alarms", {}))

        service.until(alarmed, 120)
        own.start_daemon("slurmctld")
        service.until_state(name, AcquisitionState.DONE, timeout_s=120)
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        assert [job.attempt for job in journal.jobs(acquisition.id)] == [1]
