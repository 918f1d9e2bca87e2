"""A real Slurm of virtual nodes on this machine, without systemd or munge: for the benchmarks and the tests.

slurmctld and one slurmd for each node run as children of this process, on free ports of loopback, with all their
files in one folder.  They end with the ``with`` block, and so do the steps of jobs that were still running.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd")
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client"
START_S = 30.0

_CONFIGURATION = """\
ClusterName=emflow-test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=pmi2
FirstJobId={first_job_id}
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
MinJobAge={min_job_age_s}
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
{scheduling}
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
{extra}
"""

TUNED = "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0"
"""A site that wants short jobs to start soon; Slurm's own defaults wait up to 3 s for a batch of jobs."""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    gone = [name for name in (*DAEMONS, *COMMANDS) if _found(name) is None]
    return f"{', '.join(gone)} not installed: {PACKAGES}" if gone else None


class Cluster:
    """Where a running cluster's parts are, and how to hurt them.

    Attributes
    ----------
    root : Path
        Folder of its configuration, logs and state.
    environment : dict of str to str
        ``SLURM_CONF``: what a Slurm command needs to find this cluster.
    daemons : dict of str to Popen
        ``slurmctld``, ``n1``, ``n2`` ...
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 2,
        cpus: int = 4,
        memory_mib: int = 4000,
        min_job_age_s: int = 600,
        scheduling: str = TUNED,
        partitions: str = "PartitionName=live Nodes=ALL Default=YES MaxTime=60 State=UP",
        extra: str = "",
    ) -> None:
        self.root = root
        self.nodes = tuple(f"n{number + 1}" for number in range(nodes))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        # slurmstepd makes sockets there, and a socket's path has 108 bytes at most: longer ones end every job unsaid
        self._spool = Path(tempfile.mkdtemp(prefix="slurm-"))
        for folder in (root / "state", root / "log", *(self._spool / node for node in self.nodes)):
            folder.mkdir(parents=True)
        ports = _free_ports(nodes + 1)
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            f"RealMemory={memory_mib} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = _CONFIGURATION.format(
            root=root,
            spool=self._spool,
            port=ports[0],
            user=pwd.getpwuid(os.geteuid()).pw_name,
            # linuxproc reads /proc of processes of others
            proctrack="proctrack/linuxproc" if os.geteuid() == 0 else "proctrack/pgid",
            # MPICH names its memory in /dev/shm by job and step: two clusters of this machine, or what a killed job of
            # an earlier one left there, must not share a number ("MPIDI_POSIX_comm_bootstrap: Out of memory")
            first_job_id=1 + secrets.randbelow(60_000_000),
            min_job_age_s=min_job_age_s,
            scheduling=scheduling,
            extra="\n".join((*lines, partitions, extra)),
        )
        self.conf = root / "slurm.conf"
        self.conf.write_text(text)
        (root / "cgroup.conf").write_text(f"CgroupPlugin={'autodetect' if version() < (23,) else 'disabled'}\n")
        self.environment = {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start all daemons, and wait until the nodes are idle."""
        self.start_daemon("slurmctld")
        for node in self.nodes:
            self.start_daemon(node)
        self.until(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "nodes are not idle")

    def start_daemon(self, name: str) -> None:
        """Start ``slurmctld`` or the slurmd of a node, again if it was killed."""
        part = ["slurmctld"] if name == "slurmctld" else ["slurmd", "-N", name]
        program = _found(part[0])
        assert program is not None
        with (self.root / "log" / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [program, "-D", *part[1:], "-f", str(self.conf)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.environment},
            )

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a daemon: SIGSTOP hangs it, SIGKILL ends it (and waits)."""
        self.daemons[name].send_signal(number)
        if number == signal.SIGKILL:
            self.daemons[name].wait(10)

    def run(self, *command: str, timeout_s: float = 20.0) -> str:
        """Output of a Slurm command on this cluster."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")
        return done.stdout

    def until(self, condition: Callable[[], bool], what: str, seconds: float = START_S) -> None:
        """Wait for something; the logs' ends are in the error."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                if condition():
                    return
            if time.monotonic() > end:
                raise TimeoutError(f"{what} after {seconds:g} s\n{self.tails()}")
            time.sleep(0.05)

    def tails(self, size: int = 1500) -> str:
        """Ends of the daemons' logs."""
        logs = sorted((self.root / "log").iterdir())
        return "\n".join(f"--- {log.name}\n{log.read_text('utf-8', 'replace')[-size:]}" for log in logs)

    def stop(self) -> None:
        """End jobs and daemons; nothing of them is left."""
        if self.daemons and self.daemons["slurmctld"].poll() is None:
            self.daemons["slurmctld"].send_signal(signal.SIGCONT)
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                user = pwd.getpwuid(os.geteuid()).pw_name
                self.run("scancel", "--signal=KILL", "--full", "-u", user, timeout_s=5.0)
                self.run("scancel", "-u", user, timeout_s=5.0)
                self.until(lambda: not self.run("squeue", "-h", timeout_s=5.0).strip(), "jobs do not end", 10.0)
        for daemon in reversed(self.daemons.values()):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGCONT)
                daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(5)
        self._end_steps()
        shutil.rmtree(self._spool, ignore_errors=True)

    def _end_steps(self) -> None:
        """End what a killed slurmd has left: its slurmstepd, and the programs of the jobs."""
        mark = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                command = (entry / "cmdline").read_bytes()
                ours = mark in (entry / "environ").read_bytes() or str(self.root).encode() in command
                if ours and int(entry.name) != os.getpid() and b"SLURM_JOB_ID=" in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


@contextlib.contextmanager
def running(root: Path, **settings: object) -> Iterator[Cluster]:
    """A cluster that is up, for the length of a ``with`` block; settings as of `Cluster`."""
    cluster = Cluster(root, **settings)  # type: ignore[arg-type]
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def version() -> tuple[int, ...]:
    """Version of the Slurm that is installed, such as ``(22, 5, 8)``."""
    program = _found("slurmctld")
    assert program is not None
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in said.split()[1].split("-")[0].split("."))


def _found(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
