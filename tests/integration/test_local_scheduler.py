"""The local scheduler against a service that dies, a person who cancels, and processes that won't end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from emflow import registry
from emflow.errors import NoSpace, SubmitError, Unavailable
from emflow.records import Resources, SchedulerPhase
from emflow.schedulers import processes
from emflow.schedulers.local import LocalScheduler, job_environment
from mpi_kernels import jsonfile
from mpi_kernels.contract import (
    CLAIM_FILE,
    ERROR_FILE,
    HEARTBEAT_FILE,
    JOB_FILE,
    RESULT_FILE,
    ErrorRecord,
    JobSpec,
    Recipe,
    ReductionSpec,
    SourceSpec,
)

ONE = Resources(ranks=1, time_limit_s=60)
ACQUISITION = "0123456789abcdef"

# Writes a line before anything else, so that the number of lines is the number of times that the job began.
SLEEPER = """#!/bin/bash
echo "$EMFLOW_SCHEDULER_ID" >> "$1/began"
exec sleep 300
"""
# A launcher whose members have groups of their own, and one of which ignores SIGTERM.
STUBBORN = """#!/bin/bash
echo "$EMFLOW_SCHEDULER_ID" >> "$1/began"
set -m
(trap '' TERM; while :; do sleep 1; done) &
sleep 300 &
echo ready >> "$1/ready"
wait
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "sleeper.sh"
    path.write_text(SLEEPER)
    return path


@pytest.fixture
def local(script: Path) -> Iterator[LocalScheduler]:
    scheduler = LocalScheduler(script=script, grace_s=0.5)
    yield scheduler
    scheduler.close()


def run_folder(root: Path, number: int = 1) -> tuple[str, Path]:
    folder = root / "runs" / "2024-05-01" / ACQUISITION / f"{number:02d}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    return f"{ACQUISITION}-{number:02d}", folder


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.01)


def begun(folder: Path) -> list[str]:
    return (folder / "began").read_text().split() if (folder / "began").exists() else []


def phase(scheduler: LocalScheduler, name: str, scheduler_id: str) -> SchedulerPhase:
    return scheduler.poll({name: scheduler_id})[name].phase


# --- a service that dies while it submits -----------------------------------------------------------------------------

# Submits once per run folder, each time in a child that is killed at its n-th step: a line of our own code or a call
# that Python audits (open, rename, spawn).  Ends when a child gets to the end alive.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import emflow.schedulers.local as local, emflow.schedulers.processes as processes, mpi_kernels.jsonfile as jsonfile
from emflow.records import Resources

script, root, acquisition = sys.argv[1:]
OURS = {local.__file__, processes.__file__, jsonfile.__file__}

def submit(number, steps):
    folder = Path(root) / f"{number:02d}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    left = [steps]
    def step(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in OURS:
            return None
        if event == "line":
            step()
        return trace
    def audit(event, args):
        if event in ("open", "os.rename", "os.posix_spawn", "os.remove"):
            step()
    scheduler = local.LocalScheduler(script=Path(script))
    sys.addaudithook(audit)
    sys.settrace(trace)
    scheduler.submit(f"{acquisition}-{number:02d}", folder, Resources(ranks=1, time_limit_s=60))
    sys.settrace(None)

killed = 0
for number in range(1, 100):
    child = os.fork()
    if child == 0:
        submit(number, number)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    killed += 1
print(json.dumps({"killed": killed, "survived": status == 0}))
"""


def test_kill_at_any_step_of_submit_leaves_no_job_or_one_that_is_found(tmp_path: Path, script: Path) -> None:
    root = tmp_path / "runs" / "2024-05-01" / ACQUISITION
    driver = [sys.executable, "-c", DRIVER, str(script), str(root), ACQUISITION]
    done = subprocess.run(driver, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["survived"]
    assert report["killed"] > 30, "the sweep has not gone through the steps of submit"
    again = LocalScheduler(script=script, grace_s=0.5)
    absent, ended, running = set(), set(), set()
    for folder in sorted(root.iterdir()):
        name, number = f"{ACQUISITION}-{folder.name}", int(folder.name)
        found = again.find(name, folder)
        if not found:
            absent.add(number)
            continue
        assert len(found) == 1
        # the job lives, or its starter died between record and start; between the two it may wait for a moment
        eventually(lambda f=folder, n=name, i=found[0]: begun(f) or phase(again, n, i) is SchedulerPhase.ENDED)
        (running if begun(folder) else ended).add(number)
        assert begun(folder) in ([], found), "began under another identity, or twice"
    assert absent, "no kill came before the record"
    assert report["killed"] + 1 in running, "the one that was not killed must run"
    for number in absent:
        assert not begun(root / f"{number:02d}"), "a job runs that nobody can find"
    # the same sequence as after a restart: who was not found is sent again, and runs once
    name, folder = f"{ACQUISITION}-{min(absent):02d}", root / f"{min(absent):02d}"
    scheduler_id = again.submit(name, folder, ONE)
    eventually(lambda: begun(folder))
    assert begun(folder) == [scheduler_id]
    again.cancel(*(i for f in root.iterdir() for i in again.find(f"{ACQUISITION}-{f.name}", f)))
    again.close()


def test_job_outlives_its_service_and_is_adopted(tmp_path: Path, script: Path) -> None:
    name, folder = run_folder(tmp_path)
    code = (
        "import sys; from pathlib import Path; from emflow.records import Resources\n"
        "from emflow.schedulers.local import LocalScheduler\n"
        "s = LocalScheduler(script=Path(sys.argv[1]))\n"
        "print(s.submit(sys.argv[2], Path(sys.argv[3]), Resources(ranks=1)), flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    service = [sys.executable, "-c", code, str(script), name, str(folder)]
    sent = subprocess.run(service, capture_output=True, text=True, check=False)
    assert sent.returncode == -signal.SIGKILL
    adopter = LocalScheduler(script=script, grace_s=0.5)
    (scheduler_id,) = adopter.find(name, folder)
    assert scheduler_id == sent.stdout.strip()
    assert phase(adopter, name, scheduler_id) is SchedulerPhase.RUNNING
    with pytest.raises(SubmitError, match="already started"):
        adopter.submit(name, folder, ONE)
    adopter.cancel(scheduler_id)
    assert phase(adopter, name, scheduler_id) is SchedulerPhase.ENDED
    assert not alive(scheduler_id)
    adopter.close()


# --- ends of jobs -----------------------------------------------------------------------------------------------------


def alive(scheduler_id: str) -> list[processes.Process]:
    leader = processes.parse(scheduler_id)
    assert leader is not None
    return sorted(processes.family([leader]), key=lambda member: member.pid)


def test_cancel_leaves_no_process_even_of_one_that_ignores_sigterm(tmp_path: Path, local: LocalScheduler) -> None:
    (tmp_path / "sleeper.sh").write_text(STUBBORN)
    name, folder = run_folder(tmp_path)
    scheduler_id = local.submit(name, folder, ONE)
    eventually((folder / "ready").exists)
    members = alive(scheduler_id)
    assert len(members) >= 4, "bash, a stubborn loop, its sleep, another sleep"
    began = time.monotonic()
    local.cancel(scheduler_id)
    assert 0.5 <= time.monotonic() - began < 3.0
    assert not [m for m in members if m.alive]
    assert not alive(scheduler_id)
    assert phase(local, name, scheduler_id) is SchedulerPhase.ENDED
    local.cancel(scheduler_id, "no id", "1@1@00000000")  # nothing to do any more


def test_leader_that_dies_does_not_leave_members_behind(tmp_path: Path, local: LocalScheduler) -> None:
    (tmp_path / "sleeper.sh").write_text(STUBBORN)
    name, folder = run_folder(tmp_path)
    scheduler_id = local.submit(name, folder, ONE)
    eventually((folder / "ready").exists)
    os.kill(int(scheduler_id.partition("@")[0]), signal.SIGKILL)
    eventually(lambda: phase(local, name, scheduler_id) is SchedulerPhase.ENDED, 2.0)
    eventually(lambda: not alive(scheduler_id), 2.0)


def test_time_limit_ends_a_job_without_the_service(tmp_path: Path) -> None:
    name, folder = run_folder(tmp_path)
    python = tmp_path / "python"  # stands where the kernels' interpreter would: a program that never ends
    python.write_text("#!/bin/bash\nsleep 300 & wait\n")
    python.chmod(0o755)
    local = LocalScheduler(python=str(python))
    scheduler_id = local.submit(name, folder, Resources(ranks=1, time_limit_s=1))
    assert phase(local, name, scheduler_id) is SchedulerPhase.RUNNING
    members = alive(scheduler_id)
    eventually(lambda: phase(local, name, scheduler_id) is SchedulerPhase.ENDED, 4.0)
    assert not [m for m in members if m.alive]
    local.close()


def test_no_zombie_is_left(tmp_path: Path, local: LocalScheduler) -> None:
    (tmp_path / "sleeper.sh").write_text("exit 0\n")
    name, folder = run_folder(tmp_path)
    scheduler_id = local.submit(name, folder, ONE)
    eventually(lambda: phase(local, name, scheduler_id) is SchedulerPhase.ENDED)
    local.poll({})
    assert not Path(f"/proc/{scheduler_id.partition('@')[0]}").exists()


# --- the real kernels on several ranks --------------------------------------------------------------------------------


def long_job(root: Path, ranks: int) -> tuple[str, Path]:
    """A job that reads for a minute or more: 2 TiB of zeros that take no room on the disk."""
    source = root / "long.npy"
    with source.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (128, 16384, 1024, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 128 * 16384 * 1024 * 1024)
    name, folder = run_folder(root)
    spec = JobSpec(
        job=name,
        acquisition=ACQUISITION,
        trace=ACQUISITION,
        recipe=Recipe(name="long", reductions=(ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="p"),)),
        source=SourceSpec(path=str(source), format=registry.target("formats", "npy")),
        ranks=ranks,
    )
    (folder / JOB_FILE).write_bytes(jsonfile.encode(spec))
    return name, folder


def ranks_of(scheduler_id: str) -> list[processes.Process]:
    """Processes of the job that are Python, not mpiexec and its proxy."""
    return [member for member in alive(scheduler_id) if is_python(member)]


def is_python(member: processes.Process) -> bool:
    """What the process runs; one that ended since it was listed runs nothing."""
    try:
        return "python" in Path(f"/proc/{member.pid}/exe").readlink().name
    except FileNotFoundError:
        return False


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[LocalScheduler, str, str, Path]]:
    """Two ranks that read."""
    name, folder = long_job(tmp_path, ranks=2)
    local = LocalScheduler(grace_s=2.0)
    scheduler_id = local.submit(name, folder, Resources(ranks=2, time_limit_s=60))
    try:
        eventually((folder / HEARTBEAT_FILE).exists, 30.0)
        eventually(lambda: len(ranks_of(scheduler_id)) == 2, 10.0)
        yield local, name, scheduler_id, folder
    finally:
        local.cancel(scheduler_id)
        local.close()


@pytest.mark.needs_mpi
def test_cancel_ends_every_rank(running: tuple[LocalScheduler, str, str, Path]) -> None:
    local, name, scheduler_id, folder = running
    members = alive(scheduler_id)
    assert len(members) >= 4, "timeout, mpiexec and two ranks at least"
    local.cancel(scheduler_id)
    assert not [m for m in members if m.alive]
    assert not alive(scheduler_id)
    assert phase(local, name, scheduler_id) is SchedulerPhase.ENDED
    assert not (folder / RESULT_FILE).exists()
    assert jsonfile.read(ErrorRecord, folder / ERROR_FILE).code == "stopped"


@pytest.mark.needs_mpi
@pytest.mark.parametrize("number", [0, 1])
def test_job_ends_soon_after_a_rank_dies(running: tuple[LocalScheduler, str, str, Path], number: int) -> None:
    local, name, scheduler_id, folder = running
    members = alive(scheduler_id)
    os.kill(sorted(p.pid for p in ranks_of(scheduler_id))[number], signal.SIGKILL)
    eventually(lambda: phase(local, name, scheduler_id) is SchedulerPhase.ENDED, 2.0)
    assert not [m for m in members if m.alive]
    assert not (folder / RESULT_FILE).exists()


@pytest.mark.needs_mpi
def test_job_ends_soon_after_mpiexec_dies(running: tuple[LocalScheduler, str, str, Path]) -> None:
    local, name, scheduler_id, folder = running
    members = alive(scheduler_id)
    (launcher,) = [m for m in members if Path(f"/proc/{m.pid}/comm").read_text().startswith("mpiexec")]
    processes.send(launcher, signal.SIGKILL)
    eventually(lambda: phase(local, name, scheduler_id) is SchedulerPhase.ENDED, 2.0)
    assert not [m for m in members if m.alive]
    assert not (folder / RESULT_FILE).exists()


@pytest.mark.needs_mpi
def test_time_limit_ends_every_rank_without_the_service(tmp_path: Path) -> None:
    name, folder = long_job(tmp_path, ranks=2)
    local = LocalScheduler()
    scheduler_id = local.submit(name, folder, Resources(ranks=2, time_limit_s=3))
    local.close()
    eventually((folder / CLAIM_FILE).exists)
    assert alive(scheduler_id)
    eventually(lambda: not alive(scheduler_id), 10.0)  # the limit, and 5 s of grace in the job script
    assert not (folder / RESULT_FILE).exists()


@pytest.mark.needs_mpi
def test_ranks_that_are_stopped_are_ended_too(running: tuple[LocalScheduler, str, str, Path]) -> None:
    local, name, scheduler_id, _ = running
    members = alive(scheduler_id)
    for member in members:
        processes.send(member, signal.SIGSTOP)
    local.cancel(scheduler_id)
    assert not [m for m in members if m.alive]
    assert phase(local, name, scheduler_id) is SchedulerPhase.ENDED


# --- identities -------------------------------------------------------------------------------------------------------


def test_pid_that_is_used_again_is_not_the_job(local: LocalScheduler) -> None:
    me = processes.identify(os.getpid())
    assert me is not None
    assert me.alive
    assert processes.parse(str(me)) == me
    other = processes.Process(me.pid, me.ticks + 1, me.boot)
    reboot = processes.Process(me.pid, me.ticks, "00000000")
    said = local.poll({"a": str(other), "b": str(reboot), "c": "slurm 17", "d": "", "e": f"{me}\n"})
    phases = {key: status.phase.value for key, status in said.items()}
    assert phases == {"a": "ENDED", "b": "ENDED", "c": "GONE", "d": "GONE", "e": "GONE"}
    assert "restarted" in said["b"].reason
    processes.end([other, reboot], 0.1)  # must not end this process
    processes.send(other, signal.SIGKILL)


def test_process_with_a_name_made_to_deceive_is_read_right(tmp_path: Path) -> None:
    liar = tmp_path / ") Z 1 1 1 ("
    liar.symlink_to("/bin/sleep")
    child = subprocess.Popen([liar, "60"])
    try:
        eventually(lambda: b") Z 1" in Path(f"/proc/{child.pid}/stat").read_bytes())
        identity = processes.identify(child.pid)
        assert identity is not None
        assert identity.alive
    finally:
        child.kill()
    eventually(lambda: not identity.alive)  # a zombie does not live
    child.wait()


# --- what a job sees --------------------------------------------------------------------------------------------------


def test_job_sees_only_the_allowed_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("PMI_RANK", "3")  # would make the kernels believe in a launcher
    monkeypatch.setenv("LANG", "C.UTF-8")
    (tmp_path / "env.sh").write_text('env -0 > "$1/env"; pwd > "$1/pwd"; read -r x; echo "read: $?" > "$1/stdin"\n')
    local = LocalScheduler(script=tmp_path / "env.sh")
    name, folder = run_folder(tmp_path)
    scheduler_id = local.submit(name, folder, Resources(ranks=1, time_limit_s=7))
    eventually(lambda: phase(local, name, scheduler_id) is SchedulerPhase.ENDED)
    seen = dict(line.split("=", 1) for line in (folder / "env").read_text().split("\0") if line)
    bash = {"PWD", "OLDPWD", "SHLVL", "_"}
    allowed = {"PATH", "HOME", "LANG", "EMFLOW_PYTHON", "EMFLOW_RANKS", "EMFLOW_TIME_LIMIT_S", "EMFLOW_SCHEDULER_ID"}
    assert seen.keys() - bash == allowed & (os.environ.keys() | {k for k in allowed if k.startswith("EMFLOW")})
    assert seen["EMFLOW_SCHEDULER_ID"] == scheduler_id
    assert seen["EMFLOW_TIME_LIMIT_S"] == "7"
    assert (folder / "pwd").read_text().strip() == str(folder)
    assert (folder / "stdin").read_text() == "read: 1\n" or (folder / "job.out").read_text() == ""
    local.close()


def test_two_ranks_without_mpiexec_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="mpiexec"):
        job_environment(2, python=str(tmp_path / "python"))
    assert "EMFLOW_LAUNCHER" not in job_environment(1, python=str(tmp_path / "python"))


def test_damaged_record_is_no_answer(tmp_path: Path, local: LocalScheduler) -> None:
    name, folder = run_folder(tmp_path)
    (folder / "local.json").write_text('{"job": "x"')
    with pytest.raises(Unavailable, match="can't be read"):
        local.find(name, folder)


@pytest.mark.needs_root
def test_full_disk_starts_nothing_and_may_be_tried_again(tmp_path: Path, local: LocalScheduler) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "emflow-test", disk], check=True)
    try:
        name, folder = run_folder(disk)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/fill", "bs=4k"], capture_output=True, check=False)
        assert os.statvfs(disk).f_bavail == 0
        with pytest.raises(NoSpace):
            local.submit(name, folder, ONE)
        assert local.find(name, folder) == []
        (disk / "fill").unlink()
        scheduler_id = local.submit(name, folder, ONE)
        eventually(lambda: begun(folder))
        assert begun(folder) == [scheduler_id]
        local.cancel(scheduler_id)
    finally:
        local.cancel(*local.find(name, folder))
        subprocess.run(["umount", "-l", disk], check=True)


# --- the job script itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("runs/2024-05-01/0123456789abcdef/01", "no absolute run folder"),
        ("{root}/runs/2024-05-01/0123456789abcdef/1", "no absolute run folder"),
        ("{root}/runs/2024-05-01/0123456789abcdeg/01", "no absolute run folder"),
        ("{root}/runs/2024-05-01/0123456789abcdef/01\n", "no absolute run folder"),
        ("{root}/runs/$(touch {root}/owned)/0123456789abcdef/01", "no job.json"),
        ("--wrap=touch {root}/owned", "no absolute run folder"),
    ],
)
def test_job_script_refuses_what_is_no_run_folder(tmp_path: Path, argument: str, says: str) -> None:
    run_folder(tmp_path)
    command = ["bash", "--", str(Path(__file__).parents[2] / "slurm" / "reduce.sbatch"), argument.format(root=tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 64
    assert says in done.stderr
    assert not (tmp_path / "owned").exists()


def test_job_scripts_are_clean_for_shellcheck() -> None:
    scripts = [str(p) for p in (Path(__file__).parents[2] / "slurm").glob("*.s[bh]*")]
    assert len(scripts) >= 2
    try:
        done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    assert done.returncode == 0, done.stdout
