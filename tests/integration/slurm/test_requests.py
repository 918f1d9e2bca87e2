"""What Slurm is sent, what it refuses, and why jobs wait: on a real cluster."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cluster import Cluster
from emflow.errors import SubmitError
from emflow.records import EndCause, JobStatus, Resources, SchedulerPhase
from emflow.schedulers import slurm_commands
from emflow.schedulers.slurm_reasons import Outlook
from mpi_kernels import jsonfile
from mpi_kernels.contract import RESULT_FILE, ResultManifest

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_mpi, pytest.mark.timeout(180)]
ONE = Resources(ranks=1, time_limit_s=300)

HOSTILE = [
    "two words",
    'it\'s "quoted"',
    "$(touch pwned)`touch pwned`;touch pwned #",
    "--wrap=touch pwned",
    "%j%%x%u %t",
    "back\\slash\\\\%j",
    "a|b,c=d:e;f",
    "ünï",
    "-p",
]


@pytest.mark.parametrize("root", HOSTILE)
def test_path_of_the_run_folders_is_never_more_than_a_path(
    root: str, shared: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    place = tmp_path / root
    place.mkdir()
    name, folder = jobs.plan(place)
    scheduler = jobs.make_scheduler(place)
    scheduler_id = scheduler.submit(name, folder, ONE)
    said = jobs.until_ended(scheduler, name, scheduler_id)
    assert jsonfile.read(ResultManifest, folder / RESULT_FILE).job == name, said
    assert (folder / "job.out").is_file(), "its output went elsewhere"
    assert not list(tmp_path.rglob("pwned"))


def test_path_as_output_is_taken_to_the_letter() -> None:
    assert slurm_commands.verbatim(Path("/a b/%j\\c/job.out")) == "/a b/\\%j\\\\c/job.out"


def test_environment_of_the_caller_changes_nothing(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "SBATCH_PARTITION": "nowhere",
        "SBATCH_ACCOUNT": "nobody",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_REQUEUE": "1",
        "SLURM_HINT": "nomultithread",
        "SQUEUE_FORMAT": "%i",
        "SQUEUE_STATES": "RUNNING",
        "SQUEUE_USERS": "nobody",
        "SALLOC_PARTITION": "nowhere",
        "SECRET_TOKEN": "do-not-tell",
        "LD_PRELOAD_SPARE": "/tmp/evil.so",
    }.items():
        monkeypatch.setenv(key, value)
    name, folder = jobs.plan(tmp_path, waits=True)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    jobs.until_claimed(folder)
    assert jobs.status(scheduler, name, scheduler_id).phase is SchedulerPhase.RUNNING
    for pid in jobs.processes_of(folder):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert not re.search(rb"SBATCH_|SECRET|SQUEUE_|SALLOC_|LD_PRELOAD|SLURM_HINT|do-not-tell", environ)
    record = shared.run("scontrol", "show", "job", scheduler_id)
    assert "Requeue=0" in record
    assert f"Comment=emflow {name}" in record
    scheduler.cancel(scheduler_id)


REFUSED = {
    'partition = "nowhere"': "partition of [slurm]",
    'constraint = "made-of-gold"': "constraint of [slurm]",
    'reservation = "none"': "reservation of [slurm]",
    "nodes = 4": "nodes and partition of [slurm]",
    "cpus_per_rank = 100": "ranks of [scheduler]",
    'memory = "1 TiB"': "memory of [slurm]",
    "gpus_per_rank = 1": "gpus_per_rank of [slurm]",
    'flags = ["--licenses=unheard-of"]': "flags of [slurm]",
    'flags = ["--no-such-flag"]': "flags of [slurm]",
    'flags = ["--begin=soonish"]': "--begin, from [slurm]",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_refused_for_good_and_says_which_setting(
    setting: str, shared: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path, f"[slurm]\n{setting}\n")
    resources = Resources(ranks=4, time_limit_s=300)
    with pytest.raises(SubmitError) as refused:
        scheduler.submit(name, folder, resources)
    assert not refused.value.transient, refused.value
    assert REFUSED[setting] in refused.value.next_step
    assert scheduler.find(name, folder) == []
    trial = scheduler.rehearse(resources)
    assert not trial.ok
    assert trial.said


def test_too_long_is_refused_for_good(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path)
    with pytest.raises(SubmitError) as refused:
        jobs.make_scheduler(tmp_path).submit(name, folder, Resources(ranks=1, time_limit_s=2 * 3600))
    assert not refused.value.transient
    assert "time_limit_s" in refused.value.next_step


def test_partition_that_is_down_is_asked_again(
    make_cluster: Callable[..., Cluster], jobs: SimpleNamespace, tmp_path: Path
) -> None:
    make_cluster(partitions="PartitionName=live Nodes=ALL Default=YES MaxTime=60 State=INACTIVE")
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    with pytest.raises(SubmitError) as refused:
        scheduler.submit(name, folder, ONE)
    assert refused.value.transient
    found = {finding.part: finding for finding in scheduler.check()}
    assert not found["partition"].ok
    assert "INACTIVE" in found["partition"].found
    assert found["partition"].fix


def waiting(jobs: SimpleNamespace, scheduler, name: str, scheduler_id: str, word: str) -> JobStatus:
    jobs.eventually(lambda: word in jobs.status(scheduler, name, scheduler_id).reason)
    said = jobs.status(scheduler, name, scheduler_id)
    assert said.phase is SchedulerPhase.PENDING
    assert (said.nodes, said.node, said.elapsed_s) == (0, "", 0.0)
    return said


def test_why_a_job_waits_is_said_in_plain_words(own: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path, '[slurm]\nflags = ["--begin=now+1hour"]\n')
    scheduler_id = scheduler.submit(name, folder, ONE)
    said = waiting(jobs, scheduler, name, scheduler_id, "BeginTime")
    assert said.reason.startswith(f"{Outlook.TURN} (")
    own.run("scontrol", "update", f"JobId={scheduler_id}", "StartTime=now")
    own.run("scontrol", "hold", scheduler_id)
    said = waiting(jobs, scheduler, name, scheduler_id, "JobHeld")
    assert said.reason.startswith(f"{Outlook.NEVER} (")
    assert said.stuck
    assert "scontrol release" in said.reason
    own.run("scontrol", "update", "PartitionName=live", "State=DOWN")
    own.run("scontrol", "release", scheduler_id)
    said = waiting(jobs, scheduler, name, scheduler_id, "PartitionDown")
    assert said.reason.startswith(f"{Outlook.OTHERS} (")
    assert not said.stuck
    own.run("scontrol", "update", "PartitionName=live", "State=UP")
    assert jobs.until_ended(scheduler, name, scheduler_id).cause is EndCause.COMPLETED


@pytest.mark.parametrize("limit", ["MaxTime=1", "MaxNodes=1"])
def test_partition_that_became_too_small_is_waited_for_for_ever(
    limit: str, own: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path, '[slurm]\nnodes = 2\nflags = ["--begin=now+2"]\n')
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=2, time_limit_s=300))
    own.run("scontrol", "update", "PartitionName=live", limit)
    word = "PartitionTimeLimit" if "Time" in limit else "PartitionNodeLimit"
    said = waiting(jobs, scheduler, name, scheduler_id, word)
    assert said.reason.startswith(f"{Outlook.NEVER} (")
    assert "[scheduler] time_limit_s" in said.reason or "[slurm] nodes" in said.reason


def test_rehearsal_says_what_is_sent_and_when_it_would_start(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path
) -> None:
    before = shared.run("squeue", "-h", "-t", "all", "-o", "%i").split()
    tried = jobs.make_scheduler(tmp_path).rehearse(Resources(ranks=2, time_limit_s=300, memory_mib=500))
    assert tried.ok
    assert re.search(r"to start at \d{4}-\d\d-\d\dT", tried.said)
    assert tried.command[0] == "sbatch"
    assert {"--no-requeue", "--export=ALL", "--parsable", "--ntasks=2", "--mem=500M"} <= set(tried.command)
    assert tried.script.startswith("#!/bin/bash")
    assert not {key for key in tried.environment if key.startswith(("SLURM", "SBATCH"))}
    assert shared.run("squeue", "-h", "-t", "all", "-o", "%i").split() == before, "nothing was sent"


def test_check_finds_all_of_a_working_cluster(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    found = {finding.part: finding for finding in jobs.make_scheduler(tmp_path).check()}
    assert all(finding.ok for finding in found.values()), found
    assert found["Slurm controller"].found.endswith("UP")
    assert "live" in found["partition"].found
    assert "to start at" in found["Slurm dry run"].found
    there = importlib.util.find_spec("pyslurm") is not None
    assert found["pyslurm"].found.startswith("pyslurm " if there else "not used: pyslurm can't be imported")


def test_check_says_how_to_get_what_is_missing(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {f.part: f for f in jobs.make_scheduler(tmp_path, '[slurm]\npartition = "x"\n').check()}
    assert not found["partition x"].ok
    assert "live" in found["partition x"].fix
    assert found["Slurm dry run"].fix == "look at partition of [slurm]"
    nobody = tmp_path / "nobody.conf"  # a cluster whose controller is not there
    nobody.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", shared.conf.read_text()))
    monkeypatch.setenv("SLURM_CONF", os.fspath(nobody))
    scheduler = jobs.make_scheduler(tmp_path)
    away = scheduler.check()[-1]
    assert (away.part, away.ok) == ("Slurm controller", False)
    assert "SLURM_CONF" in away.fix
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    (missing,) = scheduler.check()
    assert not missing.ok
    assert "slurm-client" in missing.fix


def test_thousand_jobs_are_one_question(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, first_call: Callable[..., Path]
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = jobs.make_scheduler(tmp_path)
    scheduler_id = scheduler.submit(name, folder, ONE)
    asked = tmp_path / "asked"
    first_call("squeue", f'echo once >>\'{asked}\'; exec "$real" "$@"')
    many = {f"{number:016x}-01": str(10**6 + number) for number in range(1000)} | {name: scheduler_id}
    said = scheduler.poll(many)
    assert said.keys() == many.keys()
    assert said[name].phase is not SchedulerPhase.GONE
    assert {one.phase for key, one in said.items() if key != name} == {SchedulerPhase.GONE}
    assert asked.read_text() == "once\n"
