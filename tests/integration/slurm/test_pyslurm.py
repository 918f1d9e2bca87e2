"""The scheduler pyslurm on a real cluster, beside sbatch on the same one.

It runs where pyslurm of the installed Slurm's release is, as in the chroot that test_pyslurm_chroot.py makes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cluster
from benchmarks.cluster import Cluster
from emflow.config import load
from emflow.errors import SubmitError, Unavailable
from emflow.records import EndCause, Resources, SchedulerPhase
from emflow.schedulers import pyslurm_child, slurm_commands
from emflow.schedulers.pyslurm import PySlurmScheduler
from emflow.schedulers.pyslurm_library import Library
from mpi_kernels import jsonfile
from mpi_kernels.contract import RESULT_FILE, ResultManifest

pytestmark = [pytest.mark.needs_slurm, pytest.mark.needs_pyslurm, pytest.mark.needs_mpi]

ONE = Resources(ranks=1, time_limit_s=300)
CHANGING = ("JobId", "SubmitTime", "EligibleTime", "AccrueTime", "LastSchedEval", "Scheduler", "Priority", "StartTime")
CHANGING += ("EndTime", "SubmitLine", "OOMKillStep", "Reason", "AllocNode:Sid")
"""What differs between two jobs that asked for the same, one of them with a command line."""


@pytest.fixture
def make_scheduler(tmp_path: Path) -> Iterator[Callable[..., PySlurmScheduler]]:
    made: list[PySlurmScheduler] = []

    def make(more: str = "") -> PySlurmScheduler:
        path = tmp_path / "emflow.toml"
        path.write_text(f'[[watch]]\nroot = "share"\n[scheduler]\nuse = "pyslurm"\n{more}')
        made.append(PySlurmScheduler.from_config(load(path)))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


# --- the same as sbatch


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with cards, features and licences, whose partition takes jobs and starts none."""
    root = tmp_path_factory.mktemp("closed") / "cluster"
    nodes = "GresTypes=gpu\nLicenses=matlab:9\nNodeName=DEFAULT Gres=gpu:4 Feature=big,fast"
    partitions = "PartitionName=down Nodes=ALL Default=YES MaxTime=UNLIMITED State=DOWN"
    found = Cluster(root, cpus=16, scheduling=f"{cluster.TUNED}\n{nodes}", partitions=partitions)
    for number in range(4):
        (root / f"card{number}").touch()
    (root / "gres.conf").write_text(f"Name=gpu File={root}/card[0-3]\n")
    try:
        found.start()
        yield found
    finally:
        found.stop()


def shown(where: Cluster, job: str) -> dict[str, str]:
    line = where.run("scontrol", "-o", "show", "job", job).partition("SubmitLine=")[0]
    fields = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
    return {key: value for key, value in fields.items() if key not in CHANGING}


@pytest.mark.parametrize(
    "flags",
    [
        ["--ntasks=1"],
        ["--ntasks=8"],
        ["--ntasks=8", "--nodes=2"],
        ["--ntasks=8", "--nodes=1-2"],
        ["--ntasks=4", "--mem=3000M", "--time=0-00:02:01"],
        ["--ntasks=1", "--mem=2G", "--time=1:00:00"],
        ["--ntasks=1", "--mem=100K", "--time=30"],
        ["--ntasks=1", "--mem-per-cpu=100", "--time=UNLIMITED"],
        ["--ntasks=1", "--constraint=big"],
        ["--ntasks=1", "--constraint=big&fast"],
        ["--ntasks=1", "--account=aa", "--qos=qq", "--wckey=wk"],
        ["--ntasks=1", "--begin=2035-01-01T00:00:00", "--nice=5"],
        ["--ntasks=1", "--core-spec=1"],
        ["--ntasks=1", "--exclude=n1"],
        ["--ntasks=1", "--nodelist=n2"],
        ["--ntasks=1", "--licenses=matlab:2", "--network=sn_all"],
        ["--ntasks=4", "--nodes=2", "--ntasks-per-node=2"],
        ["--ntasks=1", "--threads-per-core=1", "--contiguous"],
        ["--ntasks=1", "--exclusive"],
        ["--ntasks=2", "--gpus-per-node=2"],
        ["--ntasks=1", "--requeue", "--error=/tmp/e", "--input=/dev/zero"],
        ["--ntasks=1", "--open-mode=truncate"],
        ["--ntasks=1", "--dependency=singleton"],
    ],
    ids=" ".join,
)
def test_flags_ask_for_what_they_do_with_sbatch(
    flags: list[str], closed: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", closed.environment["SLURM_CONF"])
    script = tmp_path / "s.sh"
    script.write_text("#!/bin/bash\n#SBATCH --no-requeue\n#SBATCH --open-mode=append --kill-on-invalid-dep=yes\ntrue\n")
    ours = ["--job-name=0123456789abcdef-01", "--comment=emflow", f"--chdir={tmp_path}", f"--output={tmp_path}/o%%"]
    given = {"PATH": os.environ["PATH"], **closed.environment}
    by_sbatch = slurm_commands.submit([*ours, *flags], script, tmp_path, given)
    library = Library()
    by_library = library.submit([*ours, *flags], script, tmp_path, given)
    library.close()
    assert shown(closed, by_library) == shown(closed, by_sbatch)


@pytest.mark.parametrize("flags", [["--cpus-per-task=2"], ["--gpus-per-task=1"]], ids=" ".join)
def test_what_is_asked_for_each_rank_is_the_same_but_for_its_spelling(
    flags: list[str], closed: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sbatch says it twice since 23.11, as tres-per-task too; the job script's srun asks for cards by itself
    monkeypatch.setenv("SLURM_CONF", closed.environment["SLURM_CONF"])
    script = tmp_path / "s.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    given = {"PATH": os.environ["PATH"], **closed.environment}
    jobs = []
    library = Library()
    for submit in (slurm_commands.submit, library.submit):
        jobs.append(shown(closed, submit(["--job-name=x", "--ntasks=2", *flags], script, tmp_path, given)))
    library.close()
    for job in jobs:
        for key in ("TresPerTask", "TresBind", "NumNodes"):
            job.pop(key, None)
    assert jobs[0] == jobs[1]


def test_job_sees_what_it_sees_with_sbatch(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JUNK", "of the service's own job")
    monkeypatch.setenv("SLURM_NTASKS", "77")
    monkeypatch.setenv("SECRET", "x")
    script = tmp_path / "s.sh"
    script.write_text('#!/bin/bash\nenv -0 >"$1/environment.new"; umask >"$1/umask"; mv "$1"/environment{.new,}\n')
    before = os.umask(0o027)
    try:
        library = Library()
        seen = []
        for submit in (slurm_commands.submit, library.submit):
            folder = tmp_path / f"job{len(seen)}"
            folder.mkdir()
            given = {"PATH": os.environ["PATH"], "EMFLOW_X": "a\nb; $(c)", **shared.environment}
            submit(["--ntasks=2", "--cpus-per-task=2", f"--output={folder}/o"], script, folder, given)
            jobs.eventually((folder / "environment").exists)
            words = (folder / "environment").read_text().split("\0")
            seen.append(dict(word.split("=", 1) for word in words if word))
            assert (folder / "umask").read_text().strip() == "0027"
        library.close()
    finally:
        os.umask(before)
    by_sbatch, by_library = seen
    assert "SECRET" not in by_library
    assert "SLURM_JUNK" not in by_library
    assert by_library["EMFLOW_X"] == "a\nb; $(c)"
    for key in ("SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NUM_NODES", "SLURM_TASKS_PER_NODE", "SLURM_UMASK"):
        assert by_library.get(key) == by_sbatch.get(key), key
    ours = {key for key in by_library if not key.startswith("SLURM_")}
    assert ours <= by_sbatch.keys()


# --- jobs


def test_two_nodes_and_every_rank_on_them(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, make_scheduler: Callable[..., PySlurmScheduler]
) -> None:
    assert shared.nodes == ("n1", "n2")
    name, folder = jobs.plan(tmp_path, ranks=8)
    scheduler = make_scheduler()
    sent = scheduler.submit(name, folder, Resources(ranks=8, time_limit_s=300))  # a node has 4 cores
    said = jobs.until_ended(scheduler, name, sent, 60.0)
    assert (said.cause, said.nodes) == (EndCause.COMPLETED, 2), (folder / "job.out").read_text()
    assert jsonfile.read(ResultManifest, folder / RESULT_FILE).ranks == 8


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ('partition = "nowhere"', "partition of [slurm]"),
        ('constraint = "huge"', "constraint of [slurm]"),
        ('reservation = "r"', "reservation of [slurm]"),
        ("nodes = 9", "nodes and partition of [slurm]"),
        ('memory = "900 GiB"', "memory"),
        ("gpus_per_rank = 1", "gpus_per_rank of [slurm]"),
        ('flags = ["--licenses=none"]', "flags of [slurm]"),
        ('flags = ["--hint=nomultithread"]', "--hint"),
    ],
)
def test_refusal_is_final_and_names_the_setting(
    settings: str,
    setting: str,
    shared: Cluster,
    jobs: SimpleNamespace,
    tmp_path: Path,
    make_scheduler: Callable[..., PySlurmScheduler],
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = make_scheduler(f"[slurm]\n{settings}\n")
    with pytest.raises(SubmitError) as refused:
        scheduler.submit(name, folder, ONE)
    assert not refused.value.transient
    assert setting in str(refused.value)
    # of some that it refuses Slurm keeps a record, as ended
    assert shared.run("squeue", "-h", f"--name={name}") == ""


def test_more_jobs_than_are_asked_for_one_by_one(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, make_scheduler: Callable[..., PySlurmScheduler]
) -> None:
    script = tmp_path / "s.sh"
    script.write_text("#!/bin/bash\nexit 3\n")
    library = Library()
    given = {"PATH": os.environ["PATH"], **shared.environment}
    names = {}
    for number in range(1, 13):
        name, folder = jobs.plan(tmp_path, number)
        flags = [f"--job-name={name}", "--ntasks=1", f"--output={folder}/job.out"]
        names[name] = library.submit(flags, script, folder, given)
    library.close()
    # a name in Latin-1 is somebody's, and no text
    subprocess.run(["sbatch", b"--job-name=caf\xe9", "--wrap=true", f"--chdir={tmp_path}"], check=True)
    scheduler = make_scheduler()
    jobs.eventually(lambda: all(s.phase is SchedulerPhase.ENDED for s in scheduler.poll(names).values()))
    said = scheduler.poll(names)
    assert {name: s.scheduler_id for name, s in said.items()} == names
    assert {s.cause for s in said.values()} == {EndCause.FAILED}
    few = dict(list(names.items())[:2])
    assert scheduler.poll(few) == {name: said[name] for name in few}


def test_job_that_ignores_everything_but_kill_is_ended(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "s.sh"
    script.write_text('#!/bin/bash\ntrap "" TERM CONT\ntouch "$1/there"\nwhile :; do sleep 1; done\n')
    library = Library()
    given = {"PATH": os.environ["PATH"], **shared.environment}
    name, folder = jobs.plan(tmp_path)
    sent = library.submit([f"--job-name={name}", f"--output={folder}/job.out"], script, folder, given)
    jobs.eventually((folder / "there").exists)
    library.cancel([sent])
    jobs.eventually(lambda: not jobs.processes_of(folder))
    jobs.eventually(lambda: [row.state for row in library.listed([name])] == ["CANCELLED"])
    library.cancel([sent])
    library.cancel(["1999999999"])
    library.close()


@pytest.mark.timeout(150)  # Slurm looks at the clocks of jobs every half minute
def test_job_is_warned_before_its_time_is_up(shared: Cluster, jobs: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "s.sh"
    script.write_text("#!/bin/bash\ntrap 'touch \"$1/warned\"; exit 0' USR1\nwhile :; do sleep 0.1; done\n")
    library = Library()
    given = {"PATH": os.environ["PATH"], **shared.environment}
    name, folder = jobs.plan(tmp_path)
    flags = [f"--job-name={name}", f"--output={folder}/job.out", "--time=2", "--signal=B:USR1@110"]
    sent = library.submit(flags, script, folder, given)
    jobs.eventually((folder / "warned").exists, 110.0)
    jobs.eventually(lambda: [(row.id, row.state) for row in library.listed([name])] == [(sent, "COMPLETED")])
    library.close()


# --- trouble


def test_controller_that_hangs_stops_no_other_thread_and_takes_the_job(
    own: Cluster, jobs: SimpleNamespace, tmp_path: Path, make_scheduler: Callable[..., PySlurmScheduler]
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = make_scheduler()
    assert scheduler.find(name, folder) == []
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.wait(0.01):
            turns[0] += 1

    other = threading.Thread(target=count)
    other.start()
    own.signal("slurmctld", signal.SIGSTOP)
    try:
        with pytest.raises(SubmitError) as refused:
            scheduler.submit(name, folder, ONE)
    finally:
        stop.set()
        other.join()
    assert refused.value.transient
    assert turns[0] > 20, "the library held Python's lock while it waited"
    with pytest.raises(Unavailable):
        scheduler.find(name, folder)
    own.signal("slurmctld", signal.SIGCONT)
    found: list[str] = []

    def known() -> list[str]:
        try:
            found[:] = scheduler.find(name, folder)
        except Unavailable:
            return []
        return found

    jobs.eventually(known)
    assert found == own.run("squeue", "-h", "-t", "all", f"--name={name}", "-o", "%i").split()
    assert len(found) == 1
    jobs.until_ended(scheduler, name, found[0])
    assert jsonfile.read(ResultManifest, folder / RESULT_FILE).job == name


def test_child_killed_with_the_answer_under_way(
    own: Cluster, jobs: SimpleNamespace, tmp_path: Path, make_scheduler: Callable[..., PySlurmScheduler]
) -> None:
    name, folder = jobs.plan(tmp_path)
    scheduler = make_scheduler()
    assert scheduler.find(name, folder) == []
    child = scheduler._library._child
    assert child is not None
    own.signal("slurmctld", signal.SIGSTOP)
    killer = threading.Timer(1.0, child.kill)
    killer.start()
    with pytest.raises(Unavailable, match="gave no answer"):
        scheduler.submit(name, folder, ONE)
    killer.join()
    own.signal("slurmctld", signal.SIGCONT)

    def asked() -> list[str] | None:
        try:
            return scheduler.find(name, folder)
        except Unavailable:
            return None

    jobs.eventually(lambda: asked() is not None)
    sent = own.run("squeue", "-h", "-t", "all", f"--name={name}", "-o", "%i").split()
    assert asked() == sent
    assert len(sent) <= 1


def test_controller_that_is_not_there(own: Cluster, make_scheduler: Callable[..., PySlurmScheduler]) -> None:
    own.signal("slurmctld", signal.SIGKILL)
    scheduler = make_scheduler()
    with pytest.raises(Unavailable, match=r"Unable to contact slurm controller .*\(error 18"):
        scheduler.poll({"0123456789abcdef-01": "1"})
    own.start_daemon("slurmctld")
    own.until(lambda: bool(own.run("scontrol", "ping")), "slurmctld does not answer")
    until = time.monotonic() + 60
    while True:
        try:
            said = scheduler.poll({"0123456789abcdef-01": "1"})
            break
        except Unavailable:
            assert time.monotonic() < until
            time.sleep(0.2)
    assert said["0123456789abcdef-01"].phase is SchedulerPhase.GONE


@pytest.mark.skipif(Path("/etc/slurm/slurm.conf").exists(), reason="this machine has a cluster of its own")
def test_no_slurm_conf_is_told_and_ends_nothing(
    make_scheduler: Callable[..., PySlurmScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_CONF", raising=False)
    scheduler = make_scheduler()
    with pytest.raises(Unavailable, match=r"pyslurm does not start: .*fatal"):
        scheduler.poll({"0123456789abcdef-01": "1"})
    first = scheduler.check()[0]
    assert (first.part, first.ok) == ("pyslurm", False)
    assert "SLURM_CONF" in first.fix


def test_check_tells_that_pyslurm_belongs_to_the_cluster(
    shared: Cluster, make_scheduler: Callable[..., PySlurmScheduler]
) -> None:
    found = {finding.part: finding for finding in make_scheduler().check()}
    assert shared.conf.exists()
    assert found["pyslurm"].ok
    assert re.fullmatch(r"pyslurm [0-9.]+, Slurm [0-9.]+", found["pyslurm"].found)
    assert found["pyslurm's fields"].ok
    assert all(finding.ok for finding in found.values()), found


def words_of(numbers: Iterable[int]) -> list[str]:
    """What Slurm's library says of errors; not in this process, which would link differently ever after."""
    code = "import json, sys; from pyslurm.core.error import slurm_strerror as say; " + (
        "print(json.dumps([say(number) for number in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, json.dumps(list(numbers))]
    words: list[str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return words


def test_numbers_and_words_of_errors_are_those_of_the_installed_slurm(shared: Cluster) -> None:
    assert shared.conf.exists()
    header = Path("/usr/include/slurm/slurm_errno.h")
    if not header.exists():
        pytest.skip(f"no {header}: apt-get install libslurm-dev")
    numbers: dict[str, int] = {}
    last = 0
    for name, value in re.findall(r"^\s+(E?SLURM[A-Z0-9_]+)\s*(?:=\s*([0-9]+))?\s*,", header.read_text(), re.MULTILINE):
        last = int(value) if value else last + 1
        numbers[name] = last
    assert numbers["ESLURM_INVALID_JOB_ID"] == pyslurm_child.FORGOTTEN
    assert numbers["ESLURM_ALREADY_DONE"] == pyslurm_child.ENDED
    final = {
        "ESLURM_INVALID_PARTITION_NAME": "partition",
        "ESLURM_INVALID_ACCOUNT": "account",
        "ESLURM_INVALID_QOS": "qos",
        "ESLURM_INVALID_FEATURE": "constraint",
        "ESLURM_INVALID_TIME_LIMIT": "time_limit_s",
        "ESLURM_INVALID_NODE_COUNT": "nodes",
        "ESLURM_REQUESTED_NODE_CONFIG_UNAVAILABLE": "memory",
        "ESLURM_INVALID_GRES": "gpus_per_rank",
        "ESLURM_RESERVATION_INVALID": "reservation",
    }
    for (name, setting), words in zip(final.items(), words_of(numbers[name] for name in final), strict=True):
        assert setting in slurm_commands.refused(words), (name, words)
    passing = ("ESLURM_ACCOUNTING_POLICY", "ESLURM_MAX_JOB_COUNT", "SLURM_PROTOCOL_SOCKET_IMPL_TIMEOUT")
    passing += ("SLURMCTLD_COMMUNICATIONS_CONNECTION_ERROR", "ESLURM_IN_STANDBY_MODE", "ESLURM_QOS_THRES")
    for name, words in zip(passing, words_of(numbers[name] for name in passing), strict=True):
        assert slurm_commands.refused(words) == "", (name, words)
