"""Jobs on this machine: the real job script under bash and mpiexec, each in a session of its own.

No daemon and no table: a job is known by the record ``local.json`` in its run folder, which is published before the
job can do anything, and by the kernel's process table.  So a service that was killed finds its jobs again.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self

import msgspec

from emflow.config import Config
from emflow.errors import NoSpace, SubmitError, Unavailable, printable
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers import processes
from emflow.schedulers.processes import Process
from emflow.schedulers.protocol import Finding, Rehearsal
from mpi_kernels.jsonfile import publish

RECORD_FILE = "local.json"
OUTPUT_FILE = "job.out"
GRACE_S = 5.0
CHECK_S = 60.0

_INHERITED = ("PATH", "HOME", "LANG")
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TWO_RANKS = """
from mpi4py import MPI
if MPI.COMM_WORLD.size != 2:
    raise SystemExit(f"2 ranks were started, but each is in a world of {MPI.COMM_WORLD.size}")
if MPI.COMM_WORLD.rank == 0:
    print(MPI.Get_library_version().partition(",")[0].splitlines()[0])
"""
_NO_LAUNCHER = "pip install mpich (or load the site's MPI), or set [scheduler] ranks = 1"


class LocalRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``local.json``: the process that the job of this run folder was started as."""

    job: str
    scheduler_id: str
    host: str
    v: int = 1


class LocalScheduler:
    """Runs the job script that ships with emflow on this machine; several jobs at once.

    Parameters
    ----------
    python : path, optional
        Interpreter that has mpi_kernels; this one by default.
    launcher : path, optional
        mpiexec; by default the one beside ``python``, else the one on PATH.
    script : path, optional
        Job script; by default ``reduce.sbatch``.
    grace_s : float
        Seconds between SIGTERM and SIGKILL of a cancelled job.
    more : mapping of str to str
        What the job sees besides `job_environment`.
    """

    name: ClassVar[str] = "local"
    ends_with_service: ClassVar[bool] = True

    def __init__(
        self,
        *,
        python: str | None = None,
        launcher: str | None = None,
        script: Path | None = None,
        grace_s: float = GRACE_S,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._python = python or sys.executable
        self._launcher = launcher or find_launcher(self._python)
        self._script = script or shipped("reduce.sbatch")
        self._grace_s = grace_s
        self._more = more
        self._children: set[int] = set()

    @classmethod
    def from_config(cls, config: Config) -> Self:  # noqa: ARG003
        """It has no settings: interpreter and mpiexec are those that the service runs with."""
        return cls()

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Start the job of a run folder; its output goes to ``job.out`` there."""
        self._reap()
        if (folder / RECORD_FILE).exists():
            raise SubmitError(f"{name} was already started", next_step="A new attempt gets a new run folder")
        environment = self._environment(resources)
        try:
            return self._start(name, folder, environment)
        except OSError as error:
            if error.errno in _FULL:
                raise NoSpace(f"no room to start {name}: {error.strerror}") from error
            raise SubmitError(f"{name} could not be started: {printable(str(error))}", transient=True) from error

    def find(self, name: str, folder: Path) -> list[str]:
        """The job that was started in a run folder, alive or ended."""
        try:
            record = msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=LocalRecord)
        except FileNotFoundError:
            return []
        except msgspec.MsgspecError as error:
            raise Unavailable(
                f"{printable(str(folder / RECORD_FILE))} can't be read: {error}",
                next_step=f"See whether {name} still runs before you delete the file",
            ) from error
        return [record.scheduler_id] if record.job == name else []

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are; a process that is not there on this boot has ended."""
        said = {name: _status(scheduler_id) for name, scheduler_id in jobs.items()}
        ended = [s.scheduler_id for s in said.values() if s.phase is SchedulerPhase.ENDED]
        processes.kill(_parsed(ended), self._grace_s)  # what outlived its mpiexec must not write on
        self._reap()
        return said

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs with all their processes, within twice the grace time."""
        processes.end(_parsed(scheduler_ids), self._grace_s)
        self._reap()

    def tend(self) -> None:
        """Do nothing: nothing is held between jobs."""

    def rehearse(self, resources: Resources) -> Rehearsal:
        """The command of a job; it is not run."""
        environment = self._environment(resources)
        folder = "/RUNS/<day>/<acquisition>/<nn>"
        command = ("bash", "--", str(shipped("recorded.sh")), str(self._script), folder)
        return Rehearsal(command=command, environment=environment, script=self._script.read_text("utf-8"))

    def check(self) -> list[Finding]:
        """Bash, the job script, and an MPI program on two ranks, started as a job would be."""
        bash = shutil.which("bash")
        return [
            Finding(part="bash", ok=bash is not None, found=bash or "missing", fix="" if bash else "install bash"),
            Finding(part="job script", ok=self._script.is_file(), found=printable(str(self._script))),
            self._check_mpi(),
        ]

    def close(self) -> None:
        """Forget the jobs; they go on, and are found again through their run folders."""
        self._reap()
        self._children.clear()

    def _environment(self, resources: Resources) -> dict[str, str]:
        known = job_environment(
            resources.ranks, time_limit_s=resources.time_limit_s, python=self._python, launcher=self._launcher
        )
        return known | dict(self._more)

    def _start(self, name: str, folder: Path, environment: Mapping[str, str]) -> str:
        waits, go = os.pipe()
        try:
            process = self._spawn(folder, environment, waits)
            record = LocalRecord(job=name, scheduler_id=str(process), host=socket.gethostname())
            publish(folder / RECORD_FILE, msgspec.json.encode(record))
            os.write(go, f"{process}\n".encode())
        finally:
            os.close(waits)
            os.close(go)  # without the line above, this ends the waiting process: nothing has run
        return str(process)

    def _spawn(self, folder: Path, environment: Mapping[str, str], waits: int) -> Process:
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawnp(
            "bash",
            ["bash", "--", str(shipped("recorded.sh")), str(self._script), str(folder)],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, waits, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(folder / OUTPUT_FILE), append, 0o666),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=(),
            # Python ignores SIGPIPE, and a service may ignore SIGINT: the job must not inherit that
            setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ),
        )
        self._children.add(pid)
        process = processes.identify(pid)
        assert process is not None  # our own child stays until it is waited for
        return process

    def _reap(self) -> None:
        """Take leave of children that have ended, so that no zombie is left."""
        for pid in list(self._children):
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended = pid  # waited for by someone else in this process
            if ended:
                self._children.discard(pid)

    def _check_mpi(self) -> Finding:
        if self._launcher is None:
            return Finding(part="MPI", ok=False, found="no mpiexec", fix=_NO_LAUNCHER)
        command = [self._launcher, "-n", "2", self._python, "-c", _TWO_RANKS]
        fix = f"mpiexec and mpi4py must be of one MPI: {self._python} -m pip install --force-reinstall mpi4py mpich"
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=CHECK_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding(part="MPI", ok=False, found=printable(f"{self._launcher}: {error}"), fix=fix)
        if done.returncode == 0:
            return Finding(part="MPI", ok=True, found=printable(f"{self._launcher}, {done.stdout.strip()}"))
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").split("\n")[-1]
        return Finding(part="MPI", ok=False, found=printable(f"two ranks can't work together: {said}"), fix=fix)


def job_environment(
    ranks: int, *, time_limit_s: int | None = None, python: str = sys.executable, launcher: str | None = None
) -> dict[str, str]:
    """All that a job sees of our environment: display, agents, tokens and loader variables stay here.

    Parameters
    ----------
    ranks : int
        MPI ranks; one is started without a launcher.
    time_limit_s : int, optional
        When the job script ends the job.
    python : path
        Interpreter that has mpi_kernels.
    launcher : path, optional
        mpiexec; looked for if None.

    Raises
    ------
    Unavailable
        More than one rank is asked for, and there is no mpiexec.
    """
    environment = {"PATH": _DEFAULT_PATH, **{key: os.environ[key] for key in _INHERITED if key in os.environ}}
    environment |= {"EMFLOW_PYTHON": python, "EMFLOW_RANKS": str(ranks)}
    if time_limit_s is not None:
        environment["EMFLOW_TIME_LIMIT_S"] = str(time_limit_s)
    if ranks > 1:
        launcher = launcher or find_launcher(python)
        if launcher is None:
            raise Unavailable(f"{ranks} ranks need an mpiexec, and there is none", next_step=_NO_LAUNCHER)
        environment["EMFLOW_LAUNCHER"] = launcher
    return environment


def shipped(name: str) -> Path:
    """A script that is installed with emflow."""
    return Path(str(files("emflow.slurm") / name))


def find_launcher(python: str) -> str | None:
    """The mpiexec that was installed with an interpreter's packages, else the one on PATH."""
    beside = Path(python).with_name("mpiexec")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")


def _parsed(scheduler_ids: Iterable[str]) -> list[Process]:
    return [process for process in map(processes.parse, scheduler_ids) if process is not None]


def _status(scheduler_id: str) -> JobStatus:
    process = processes.parse(scheduler_id)
    if process is None:
        reason = "no id of this scheduler"
        return JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.GONE, reason=reason)
    if process.alive:
        return JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.RUNNING, node=socket.gethostname())
    reason = "" if process.boot == processes.boot() else "the machine has been restarted since"
    return JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.ENDED, reason=reason)
