"""What starts and ends pools: Slurm, or mpiexec on workstations.  The script is ``pool.sbatch``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from emflow.config import Config
from emflow.errors import ConfigError, printable
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers import site, slurm_commands
from emflow.schedulers.local import OUTPUT_FILE, LocalScheduler, find_launcher, shipped
from emflow.schedulers.pool_signs import PREFIX, Launcher
from emflow.schedulers.slurm_reasons import explained
from emflow.schedulers.slurm_states import judge


class SlurmLauncher:
    """Pools as Slurm jobs.

    Parameters
    ----------
    config : Config
        ``[slurm]`` and ``[pool]`` say what is asked for.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def submit(self, name: str, folder: Path, resources: Resources) -> str:  # noqa: ARG002
        """Send the job of a pool; how large it is stands in the configuration, as in its ``pool.json``."""
        request = site.pool_request(self._config, name)
        return slurm_commands.submit(self.flags(request, folder), request.script, folder, self.environment(request))

    def find(self, name: str, folder: Path) -> list[str]:  # noqa: ARG002
        """Jobs of this name, alive or ended, that Slurm remembers."""
        return [row.id for row in slurm_commands.listed([name])]

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How pools are, by name and id: an id alone may be forgotten, and given to another job."""
        rows = {row.id: row for row in slurm_commands.listed(jobs)}
        said = {}
        for name, scheduler_id in jobs.items():
            row = rows.get(scheduler_id)
            if row is None or row.name != name:
                said[name] = JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.GONE, reason="Slurm forgot it")
                continue
            meaning = judge(row.state)
            waits = meaning.phase is SchedulerPhase.PENDING
            said[name] = JobStatus(
                scheduler_id=scheduler_id,
                phase=meaning.phase,
                reason=meaning.text or (explained(row.reason) if waits else ""),
                node=row.node,
                cause=meaning.cause,
                nodes=row.nodes,
                elapsed_s=row.elapsed_s,
            )
        return said

    def cancel(self, *scheduler_ids: str) -> None:
        """Tell Slurm to end pools; it kills what does not end by itself within its KillWait."""
        ids = [one for one in scheduler_ids if one.isascii() and one.isdigit()]
        known = slurm_commands.named(ids) if ids else []
        # a pool that was forgotten has no id any more: another job may have got it
        if pools := [row.id for row in known if row.name.startswith(PREFIX)]:
            slurm_commands.cancel(pools)

    @staticmethod
    def environment(request: site.Request) -> dict[str, str]:
        """What sbatch is started with, and so all that the pool sees."""
        conf = {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}
        return {**request.environment, **conf}

    @staticmethod
    def flags(request: site.Request, folder: Path) -> tuple[str, ...]:
        """All flags for sbatch."""
        ours = f"--comment=emflow pool {folder.name}", f"--output={slurm_commands.verbatim(folder / OUTPUT_FILE)}"
        return (*request.flags, *ours, f"--chdir={folder}", "--export=ALL")


class HereLauncher:
    """Pools under mpiexec: on this machine, or from it over the workstations of ``[pool] hosts``.

    A pool is found again through ``local.json`` in its folder.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._known = LocalScheduler()
        self._starter: LocalScheduler | None = None

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Start a pool in a session of its own."""
        if self._starter is None:
            self._starter = starter_of(self._config)
        return self._starter.submit(name, folder, resources)

    def find(self, name: str, folder: Path) -> list[str]:
        """The pool that was started in this folder."""
        return self._known.find(name, folder)

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How pools are; what outlived its mpiexec is ended."""
        if self._starter is not None:
            self._starter.poll({})  # takes leave of those that have ended
        return self._known.poll(jobs)

    def cancel(self, *scheduler_ids: str) -> None:
        """End pools with all their processes on this machine; mpiexec ends those on others."""
        self._known.cancel(*scheduler_ids)


def starter_of(config: Config) -> LocalScheduler:
    """What starts a pool under mpiexec."""
    python, hosts = config.slurm.python or sys.executable, hosts_of(config)
    more = {}
    if hosts:
        launcher = find_launcher(python)
        if launcher is None:
            raise ConfigError(
                "[pool] hosts are given, but there is no mpiexec", next_step="Install one: pip install mpich"
            )
        more = {"EMFLOW_HOSTS": ",".join(hosts), "EMFLOW_LAUNCHER": launcher}
    return LocalScheduler(python=python, script=shipped("pool.sbatch"), more=more)


def hosts_of(config: Config) -> tuple[str, ...]:
    """``[pool] hosts``, checked: they are read by mpiexec and ssh.

    Raises
    ------
    ConfigError
        One is no host's name.
    """
    for host in config.pool.hosts:
        plain = host.isascii() and host.replace("-", "").replace(".", "").replace(":", "").isalnum()
        if not plain or host.startswith("-"):
            raise ConfigError(
                f"{printable(host)!r} in hosts of [pool] is no host's name", next_step="Write it as name or name:ranks"
            )
    return config.pool.hosts


def launchers(config: Config) -> dict[str, Launcher]:
    """All launchers: pools that another one started, before the configuration was changed, must be ended too."""
    return {"slurm": SlurmLauncher(config), "mpiexec": HereLauncher(config)}


__all__ = ["HereLauncher", "SlurmLauncher", "hosts_of", "launchers", "starter_of"]
