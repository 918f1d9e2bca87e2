"""Jobs in this process, done when ``submit`` returns: no MPI, no second process.  For scale tests."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from emflow.config import Config
from emflow.errors import SubmitError, printable
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers.protocol import Finding, Rehearsal
from mpi_kernels.job import run
from mpi_kernels.ranks import Ranks

log = logging.getLogger("emflow")


class NullScheduler:
    """Reduces inside ``submit``; the kernels publish ``result.json`` or ``error.json`` as on any node."""

    name: ClassVar[str] = "null"
    ends_with_service: ClassVar[bool] = True

    def __init__(self) -> None:
        self._sent: set[str] = set()

    @classmethod
    def from_config(cls, config: Config) -> Self:  # noqa: ARG003
        """It has no settings."""
        return cls()

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Reduce the job of a run folder, here and now."""
        if resources.ranks != 1:
            step = 'set [scheduler] ranks = 1, or use = "local"'
            raise SubmitError(f"the null scheduler has one rank, and {name} asks for {resources.ranks}", next_step=step)
        self._sent.add(name)
        try:
            run(folder, Ranks())
        except Exception as error:  # noqa: BLE001 - recorded in error.json by run(), which judges the attempt
            log.debug("%s: %s", name, printable(str(error)))
        return name

    def find(self, name: str, folder: Path) -> list[str]:  # noqa: ARG002
        """The job, if this scheduler ran it; what an earlier process ran has ended with it."""
        return [name] if name in self._sent else []

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """ENDED for every job that was sent here, GONE for others."""
        return {name: self._status(scheduler_id) for name, scheduler_id in jobs.items()}

    def _status(self, scheduler_id: str) -> JobStatus:
        known = scheduler_id in self._sent
        return JobStatus(scheduler_id=scheduler_id, phase=SchedulerPhase.ENDED if known else SchedulerPhase.GONE)

    def cancel(self, *scheduler_ids: str) -> None:
        """Do nothing: a job that has an id has ended."""

    def tend(self) -> None:
        """Do nothing: nothing is held."""

    def rehearse(self, resources: Resources) -> Rehearsal:
        """Nothing is sent: the kernels are called."""
        said = "computed in the service's own process" if resources.ranks == 1 else "it has one rank"
        return Rehearsal(command=(), environment={}, script="", said=said, ok=resources.ranks == 1)

    def check(self) -> list[Finding]:
        """Nothing is needed of the machine."""
        return []

    def close(self) -> None:
        """Forget the jobs."""
        self._sent.clear()
