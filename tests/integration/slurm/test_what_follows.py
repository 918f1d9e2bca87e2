"""What the service does about jobs that a real cluster ends, or says to run though nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster import Cluster
from emflow.records import AcquisitionState, Job

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_mpi, pytest.mark.timeout(180)]
HERE = Path(__file__).parent
PARTITIONS = """\
PartitionName=bulk Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 State=UP
PartitionName=live Nodes=ALL MaxTime=60 PriorityTier=10 State=UP"""
PREEMPTION = "PreemptType=preempt/partition_prio\nPreemptMode=CANCEL\nMessageTimeout=3"
WAIT_S = 60.0


@pytest.fixture
def waiting(services: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A service's folder whose first job does not get on."""

    def make(scheduler: str = "", slurm: str = "") -> Any:
        place = services.Place(tmp_path / "here", scheduler="slurm", stall_s=30, quarantine_s=60)
        (place.folder / "waits.toml").write_text(
            f'name = "waits"\n[[reduction]]\nuse = "waits_once:WaitsOnce"\nname = "waits"\n'
            f'[reduction.parameters]\nmarker = "{tmp_path}/first"\n'
        )
        (place.folder / "setup.sh").write_text(f"export PYTHONPATH={HERE}\n")
        text = place.toml.read_text().replace('root = "share"\n', 'root = "share"\nrecipe = "./waits.toml"\n')
        text = text.replace("attempts = 3\n", f"attempts = 3\n{scheduler}")
        place.toml.write_text(f'{text}\n[slurm]\nsetup = "setup.sh"\n{slurm}')
        np.save(place.share / "scan.npy", np.arange(2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5))
        return place

    return make


def jobs_of(place) -> list[Job]:
    with place.journal() as journal:
        return [job for one in journal.acquisitions() for job in journal.jobs(one.id)]


def until_it_waits(place, service, tmp_path: Path) -> Job:
    """The first job is in the middle of its work."""
    service.until((tmp_path / "first").exists, WAIT_S)
    (job,) = jobs_of(place)
    return job


def folder_of(place, job: Job) -> Path:
    (folder,) = (place.folder / "runs").glob(f"*/{job.acquisition}/{job.name[-2:]}")
    return folder


@contextlib.contextmanager
def nothing_left(folder: Path, jobs: SimpleNamespace) -> Iterator[None]:
    """End what a test has made an orphan on purpose."""
    try:
        yield
    finally:
        for pid in jobs.processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_preempted_job_is_followed_by_one_that_is_not_counted(
    make_cluster: Callable[..., Cluster], waiting: Callable[..., Any], tmp_path: Path
) -> None:
    own = make_cluster(partitions=PARTITIONS, extra=PREEMPTION)
    place = waiting("", 'partition = "bulk"\nflags = ["--exclusive"]\n')
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    with place.start() as service:
        until_it_waits(place, service, tmp_path)
        own.run("sbatch", "-p", "live", "-N", "2", "--exclusive", "-o", "/dev/null", str(script))
        service.until_state("scan.npy", AcquisitionState.DONE, timeout_s=WAIT_S)
    first, second = jobs_of(place)
    assert first.reason.startswith("lost: ")
    assert "PREEMPTED" in first.reason
    assert (first.nodes, second.attempt) == (1, 2)
    with place.journal() as journal:
        assert journal.usage.of_job(first.name)


def test_a_job_that_somebody_cancels_is_followed_by_another(
    shared: Cluster, waiting: Callable[..., Any], tmp_path: Path
) -> None:
    place = waiting("silent_s = 120\n")
    with place.start() as service:
        job = until_it_waits(place, service, tmp_path)
        shared.run("scancel", job.scheduler_id)
        service.until_state("scan.npy", AcquisitionState.DONE, timeout_s=WAIT_S)
    first, _ = jobs_of(place)
    assert first.reason.startswith("lost: somebody cancelled it")


def supervisors(scheduler_id: str) -> list[int]:
    """The slurmstepd processes of a job: their command is a title such as ``slurmstepd: [5.batch]``."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"slurmstepd: [{scheduler_id}." in (entry / "cmdline").read_text("latin-1"):
                found.append(int(entry.name))
    return found


def test_a_job_that_slurm_says_to_run_and_nothing_is_left_of(
    make_cluster: Callable[..., Cluster], waiting: Callable[..., Any], jobs: SimpleNamespace, tmp_path: Path
) -> None:
    own = make_cluster()
    place = waiting("silent_s = 4\n")
    with place.start() as service:
        job = until_it_waits(place, service, tmp_path)
        folder = folder_of(place, job)
        with nothing_left(folder, jobs):
            stopped = supervisors(job.scheduler_id)
            assert stopped
            for pid in stopped:
                os.kill(pid, signal.SIGKILL)
            assert "RUNNING" in own.run("squeue", "-h", "-j", job.scheduler_id, "-o", "%T")
            service.until_state("scan.npy", AcquisitionState.DONE, timeout_s=WAIT_S)
    first, second = jobs_of(place)
    assert "without a sign of life" in first.reason
    assert second.attempt == 2


def test_a_job_that_waits_for_ever_is_an_alarm_and_goes_on_when_it_is_let(
    shared: Cluster, waiting: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()  # it is not to wait for itself
    place = waiting("", 'flags = ["--begin=now+1hour"]\n')
    with place.start() as service:
        service.until(lambda: bool(jobs_of(place)) and bool(jobs_of(place)[0].scheduler_id), WAIT_S)
        (job,) = jobs_of(place)
        shared.run("scontrol", "hold", job.scheduler_id)

        def alarm() -> str:
            return str(place.json("status", code=None).get("alarms", {}).get(f"waiting {job.name}", ""))

        service.until(lambda: bool(alarm()), WAIT_S)
        assert "scontrol release" in alarm()
        (row,) = place.json("status")["newest"]
        assert (row["state"], row["job_state"]) == ("STAGED", "SUBMITTED")
        assert "held it" in row["reason"]
        shared.run("scontrol", "release", job.scheduler_id)
        shared.run("scontrol", "update", f"JobId={job.scheduler_id}", "StartTime=now")
        service.until_state("scan.npy", AcquisitionState.DONE, timeout_s=WAIT_S)
        assert alarm() == ""
    assert len(jobs_of(place)) == 1
