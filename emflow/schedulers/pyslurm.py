"""Jobs under Slurm, through pyslurm: the scheduler ``slurm`` with another way to the same controller.

pyslurm wants exactly the Slurm that it was built for.  Where it is missing or belongs to another, this scheduler says
so, with the cure, and does nothing: emflow never goes another way than the one that it was told.

Two things differ from sbatch.  Limits of the service's own process (``ulimit``) are not carried to the nodes.  And what
pyslurm has no field for is refused by name (`emflow.schedulers.pyslurm_fields`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from msgspec.structs import replace

from emflow.config import Config
from emflow.errors import EmflowError, SubmitError, Unavailable
from emflow.records import JobStatus, Resources
from emflow.schedulers.protocol import Finding, Rehearsal
from emflow.schedulers.pyslurm_fields import DEFAULTS, directives, fields
from emflow.schedulers.pyslurm_library import USE_COMMANDS, Library
from emflow.schedulers.slurm import SlurmScheduler
from emflow.schedulers.slurm_check import LIBRARY

NO_DRY_RUN = "pyslurm has no dry run"


class PySlurmScheduler:
    """Sends each run folder as one batch job, as `SlurmScheduler` does.

    Parameters
    ----------
    config : Config
        Where the site's profile, the account and the rest of ``[slurm]`` come from.
    """

    name: ClassVar[str] = "pyslurm"
    ends_with_service: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self._library = Library()
        self._slurm = SlurmScheduler(config, transport=self._library)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Ask for what ``[slurm]`` and the site's profile say; pyslurm is looked for by the first question."""
        return cls(config)

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Send the job of a run folder; its output goes to ``job.out`` there."""
        return self._slurm.submit(name, folder, resources)

    def find(self, name: str, folder: Path) -> list[str]:
        """Jobs that the controller, the accounting or the run folder knows under a name; those that live come first."""
        return self._slurm.find(name, folder)

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are; few are asked for one by one, more by one question for all jobs of the cluster."""
        return self._slurm.poll(jobs)

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs with all their processes; raises `Unavailable` where some are left after a minute."""
        self._slurm.cancel(*scheduler_ids)

    def tend(self) -> None:
        """Do nothing: nothing is held between jobs."""

    def rehearse(self, resources: Resources) -> Rehearsal:
        """The fields of a job; what Slurm says to it is asked with ``sbatch --test-only``, where there is an sbatch."""
        by_sbatch = self._slurm.rehearse(resources)
        flags = by_sbatch.command[1 : by_sbatch.command.index("--")]
        script, folder = by_sbatch.command[-2:]
        try:
            asked = fields((*directives(Path(script)), *flags))
        except SubmitError as error:
            return replace(by_sbatch, said=str(error), ok=False)
        said = [f"{key}={value}" for key, value in asked.items() if DEFAULTS.get(key) != value]
        command = ("pyslurm.JobSubmitDescription", *said, script, folder)
        if shutil.which("sbatch") is None:
            return replace(by_sbatch, command=command, said=f"{NO_DRY_RUN}, and there is no sbatch here", ok=True)
        return replace(by_sbatch, command=command, said=f"{NO_DRY_RUN}; sbatch --test-only says: {by_sbatch.said}")

    def check(self) -> list[Finding]:
        """Whether pyslurm belongs to the cluster's Slurm, and has a field for all that is asked; then as ``slurm``."""
        try:
            belongs = Finding(part=LIBRARY, ok=True, found=self._library.versions())
        except Unavailable as error:
            belongs = Finding(part=LIBRARY, ok=False, found=error.message, fix=error.next_step or USE_COMMANDS)
        try:
            tried = self.rehearse(Resources())
        except EmflowError:  # wrong settings, which the scheduler slurm tells below
            return [belongs, *self._commands()]
        has_fields = tried.command[0] != "sbatch"
        found = "for all that a job asks for" if has_fields else tried.said
        fields_there = Finding(
            part="pyslurm's fields", ok=has_fields, found=found, fix="" if has_fields else USE_COMMANDS
        )
        return [belongs, fields_there, *self._commands()]

    def _commands(self) -> list[Finding]:
        """What ``slurm`` finds, but for what it says of the library, which is told above."""
        return [found for found in self._slurm.check() if found.part != LIBRARY]

    def close(self) -> None:
        """Forget the jobs; they go on."""
        self._slurm.close()
        self._library.close()
