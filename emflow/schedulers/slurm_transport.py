"""What `emflow.schedulers.slurm` asks Slurm, whichever way the question goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from emflow.schedulers.slurm_rows import Row


class Transport(Protocol):
    """The module `emflow.schedulers.slurm_commands`, or what stands for it; used from one thread.

    Everything but `submit` raises `Unavailable` where Slurm can't be asked.
    """

    def submit(self, flags: Sequence[str], script: Path, folder: Path, env: Mapping[str, str]) -> str:
        """Send a job once with sbatch's flags, and return its id.

        Raises
        ------
        SubmitError
            Refused for good; or ``transient``: nobody knows whether there is a job now.
        Unavailable
            Likewise nobody knows, or nothing could be sent at all.
        """

    def listed(self, names: Iterable[str]) -> list[Row]:
        """Our jobs with these names that Slurm's controller remembers, ended ones too."""

    def named(self, ids: Sequence[str]) -> list[Row]:
        """Our jobs with these ids, as far as the controller remembers."""

    def accounted(self, names: Iterable[str]) -> list[Row] | None:
        """Our jobs with these names that Slurm's accounting knows; None where there is none, or it does not answer."""

    def cancel(self, ids: Sequence[str]) -> None:
        """Tell Slurm to end jobs; that they are unknown or have ended is no error."""
