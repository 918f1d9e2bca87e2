"""Where a job goes when no pool takes it: into a pool's allocation as a step of its own, else to Slurm, else here.

Each way is another scheduler, and its ids bear the name of the way: ``step:``, ``slurm:``, ``local:``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from emflow.config import Config
from emflow.errors import Unavailable
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers import site
from emflow.schedulers.local import LocalScheduler
from emflow.schedulers.protocol import Finding, Scheduler
from emflow.schedulers.slurm import SlurmScheduler

Way = Literal["step", "slurm", "local"]

INSTEAD: Mapping[Way, str] = {
    "step": "a step in a pool's allocation instead",
    "slurm": "a Slurm job of its own instead",
    "local": "a job of its own on this machine instead",
}
"""In plain words, behind the reason why no pool took a job."""


class Fallback:
    """The other ways, in the order in which they are tried.

    Parameters
    ----------
    config : Config
        ``[pool] launcher`` decides whether there is a cluster.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._slurm = config.pool.launcher == "slurm"
        here = LocalScheduler()
        self._steps: list[Scheduler] = []
        self._ways: dict[Way, Scheduler] = {"step": here, "local": here}
        if self._slurm:
            self._ways["slurm"] = SlurmScheduler.from_config(config)

    def ways(self, allocations: Sequence[str]) -> list[Way]:
        """Which ways are open, the best first."""
        if not self._slurm:
            return ["local"]
        return ["step", "slurm"] if allocations else ["slurm"]

    def submit(self, way: Way, name: str, folder: Path, resources: Resources, allocations: Sequence[str]) -> str:
        """Send a job one way; its id, with the way's name before it."""
        scheduler = self._step(allocations[0], resources) if way == "step" else self._ways[way]
        return f"{way}:{scheduler.submit(name, folder, resources)}"

    def find(self, name: str, folder: Path) -> list[str]:
        """Ids of what was sent any of these ways under a name."""
        if found := self._ways["local"].find(name, folder):
            way: Way = "step" if self._slurm else "local"  # local.json does not say; poll and cancel are the same
            return [f"{way}:{scheduler_id}" for scheduler_id in found]
        return [f"slurm:{i}" for i in self._ways["slurm"].find(name, folder)] if self._slurm else []

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are that went one of these ways, by their whole ids.

        Raises
        ------
        Unavailable
            Slurm can't be asked; what went another way is not told then either.
        """
        said: dict[str, JobStatus] = {}
        for step in self._steps:
            step.poll({})  # takes leave of what has ended
        for way, scheduler in self._ways.items():
            ours = {name: i.partition(":")[2] for name, i in jobs.items() if i.partition(":")[0] == way}
            for name, status in scheduler.poll(ours).items() if ours else ():
                said[name] = msgspec.structs.replace(status, scheduler_id=jobs[name])
        for name, scheduler_id in jobs.items():
            said.setdefault(name, JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.GONE, reason="no such way"))
        return said

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs that went one of these ways."""
        for way, scheduler in self._ways.items():
            ours = [i.partition(":")[2] for i in scheduler_ids if i.partition(":")[0] == way]
            if ours:
                scheduler.cancel(*ours)

    def check(self) -> list[Finding]:
        """What the last of these ways needs; pools need no less."""
        return self._ways["slurm" if self._slurm else "local"].check()

    def close(self) -> None:
        """Give resources back; jobs go on."""
        for scheduler in dict.fromkeys(self._ways.values()):
            scheduler.close()

    def _step(self, allocation: str, resources: Resources) -> Scheduler:
        """Start a job script so that its srun makes a step in an allocation whose cores a pool already holds.

        Source: srun(1), input environment variables.
        """
        if not allocation.isdecimal():
            raise Unavailable(f"{allocation!r:.40} is no id of a Slurm job")
        request = site.request(self._config, resources)
        minutes = -(-resources.time_limit_s // 60)
        inside = {
            "SLURM_JOB_ID": allocation,
            "SLURM_OVERLAP": "1",
            "SLURM_NTASKS": str(resources.ranks),
            "SLURM_TIMELIMIT": str(minutes),
        }
        if "SLURM_CONF" in os.environ:
            inside["SLURM_CONF"] = os.environ["SLURM_CONF"]
        # its launcher is never called: under Slurm the job script starts srun
        step = LocalScheduler(script=request.script, launcher="srun", more=request.environment | inside)
        self._steps.append(step)
        return step


def way_of(scheduler_id: str) -> Way | None:
    """Which of the other ways an id belongs to; None if to none."""
    way = scheduler_id.partition(":")[0]
    return way if way in INSTEAD else None  # type: ignore[return-value]
