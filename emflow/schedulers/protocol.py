"""What a scheduler does for emflow: it starts jobs and knows whether they live, never whether they succeeded.

A scheduler is made by its ``from_config``, found by the registry's name (``[scheduler] use = "local"``), runs the
folder's ``job.json``, and is used from one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

import msgspec

from emflow.config import Config
from emflow.records import JobStatus, Resources


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``emflow check``: a part, whether it is there, what was found, and how to fix it if it is not."""

    part: str
    ok: bool
    found: str
    fix: str = ""


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True):
    """What would be sent for a job, to the letter, and what the scheduler says of it without running anything.

    Attributes
    ----------
    command : tuple of str
        The argument list; no shell sees it.
    environment : dict of str to str
        All that the job sees of our environment.
    script : str
        The job script's text.
    said : str
        The scheduler's answer to a dry run, an estimate of the start included; empty where it has none.
    ok : bool
        Whether it would be taken.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    script: str
    said: str = ""
    ok: bool = True


@runtime_checkable
class Scheduler(Protocol):
    """Where jobs run.

    A job has two keys: its ``name`` (``<acquisition>-<nn>``), which emflow chooses before it asks for anything, and the
    scheduler's id, which may get lost on the way back.  So a name is looked for before it is sent a second time.
    """

    name: ClassVar[str]
    ends_with_service: ClassVar[bool]
    """Whether a service that is stopped by a person ends its jobs: on a workstation yes, on a cluster they go on."""

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Make one as a configuration asks for it; nothing is started or asked yet."""

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

    def tend(self) -> None:
        """Look after what is held between jobs (warm ranks); called in every turn of the service, and must not wait."""

    def rehearse(self, resources: Resources) -> Rehearsal:
        """What `submit` would send for a job, tried without running anything."""

    def check(self) -> list[Finding]:
        """What the scheduler needs of this machine, each part tried for real."""

    def close(self) -> None:
        """Give resources back; jobs go on."""
