"""What a scheduler does for emflow: it starts jobs and knows whether they live, never whether they succeeded.

A scheduler is made without arguments by the registry's name (``[scheduler] use = "local"``), runs the folder's
``job.json``, and is used from one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import msgspec

from emflow.records import JobStatus, Resources


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``emflow check``: a part, whether it is there, what was found, and how to fix it if it is not."""

    part: str
    ok: bool
    found: str
    fix: str = ""


@runtime_checkable
class Scheduler(Protocol):
    """Where jobs run.

    A job has two keys: its ``name`` (``<acquisition>-<nn>``), which emflow chooses before it asks for anything, and the
    scheduler's id, which may get lost on the way back.  So a name is looked for before it is sent a second time.
    """

    name: ClassVar[str]
    ends_with_service: ClassVar[bool]
    """Whether a service that is stopped by a person ends its jobs: on a workstation yes, on a cluster they go on."""

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Send the job of a run folder, once.

        Returns
        -------
        str
            The scheduler's id.  When this call does not return, the job may exist all the same: ask `find`.

        Raises
        ------
        SubmitError
            The scheduler refuses the job; ``transient`` says whether asking again later can help.
        Unavailable
            The scheduler can't be asked, or has no room.
        """

    def find(self, name: str, folder: Path) -> list[str]:
        """Ids of the jobs that were sent under a name, alive or ended, as far as the scheduler remembers."""

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are, in one question for all of them.

        Parameters
        ----------
        jobs : mapping of str to str
            Scheduler's id by job name.

        Returns
        -------
        dict of str to JobStatus
            One entry for each name; GONE for an id that the scheduler does not know (any more).
        """

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs; when this returns none of their processes is left.  Ended and unknown ids are ignored."""

    def check(self) -> list[Finding]:
        """What the scheduler needs of this machine, each part tried for real."""

    def close(self) -> None:
        """Give resources back; jobs go on."""
