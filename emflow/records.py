"""The nouns of the service and their two state machines."""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Mapping

import msgspec

from mpi_kernels.contract import JOB_NAME


class AcquisitionState(enum.StrEnum):
    """Where an acquisition is on its way."""

    GROWING = "GROWING"  # seen; its format's rule does not hold yet, or it still changes
    READY = "READY"  # complete on the share
    STAGED = "STAGED"  # verified copy made, digest bound
    DONE = "DONE"  # a final result is published
    STALLED = "STALLED"  # incomplete and unchanged for too long; goes on by itself if it changes
    QUARANTINED = "QUARANTINED"  # can't be processed; needs a person (emflow retry)
    SUPERSEDED = "SUPERSEDED"  # another acquisition stands for this file


class JobState(enum.StrEnum):
    """Where one attempt is on its way."""

    PLANNED = "PLANNED"  # the row exists; the run folder is written next
    SUBMITTING = "SUBMITTING"  # intent recorded; the scheduler may or may not know the name
    SUBMITTED = "SUBMITTED"  # the scheduler knows it; not started
    RUNNING = "RUNNING"  # started
    REDUCED = "REDUCED"  # result.json is there
    FAILED = "FAILED"  # ended without a result
    UNKNOWN = "UNKNOWN"  # the scheduler says something that emflow does not know; never terminal


_A, _J = AcquisitionState, JobState

ACQUISITION_MOVES: Mapping[AcquisitionState, frozenset[AcquisitionState]] = {
    _A.GROWING: frozenset({_A.READY, _A.STALLED, _A.QUARANTINED, _A.SUPERSEDED}),
    _A.STALLED: frozenset({_A.GROWING, _A.QUARANTINED, _A.SUPERSEDED}),
    _A.READY: frozenset({_A.STAGED, _A.GROWING, _A.QUARANTINED, _A.SUPERSEDED}),
    _A.STAGED: frozenset({_A.DONE, _A.QUARANTINED, _A.SUPERSEDED}),
    _A.DONE: frozenset({_A.STAGED, _A.GROWING, _A.SUPERSEDED}),
    _A.QUARANTINED: frozenset({_A.GROWING, _A.STAGED, _A.SUPERSEDED}),
    _A.SUPERSEDED: frozenset(),
}
"""Allowed moves; STAGED after DONE or QUARANTINED is `emflow retry` of data that are already copied, GROWING after DONE
the same where the copy is gone."""

JOB_MOVES: Mapping[JobState, frozenset[JobState]] = {
    _J.PLANNED: frozenset({_J.SUBMITTING, _J.FAILED}),
    _J.SUBMITTING: frozenset({_J.SUBMITTED, _J.FAILED}),
    _J.SUBMITTED: frozenset({_J.RUNNING, _J.REDUCED, _J.FAILED, _J.UNKNOWN}),
    _J.RUNNING: frozenset({_J.REDUCED, _J.FAILED, _J.UNKNOWN}),
    _J.UNKNOWN: frozenset({_J.SUBMITTED, _J.RUNNING, _J.REDUCED, _J.FAILED}),
    _J.REDUCED: frozenset(),
    _J.FAILED: frozenset(),
}

ACTIVE_JOB_STATES = frozenset({_J.PLANNED, _J.SUBMITTING, _J.SUBMITTED, _J.RUNNING, _J.UNKNOWN})


LAST_ATTEMPT = 99
"""A job's name has two digits for its attempt; reached only by attempts that are not counted."""


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a stat says of a file; two that differ mean that it was written."""

    size: int
    mtime_ns: int
    ctime_ns: int


class MemberCopy(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a transfer: where it came from (relative to the share, bytes as they are), and what was read."""

    relpath: bytes
    suffix: str
    fingerprint: Fingerprint
    xxh3_128: str


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """A verified copy.

    ``digest`` is the XXH3-128 of the members' digests, in order, joined by newlines, as 32 hex digits.
    """

    members: tuple[MemberCopy, ...]
    path: str
    digest: str
    bytes: int
    seconds: float


class Acquisition(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset on a share, as the journal knows it."""

    id: str
    share: str
    relpath: bytes
    generation: int
    state: AcquisitionState
    day: str
    trace: str
    seen_ns: int
    changed_ns: int
    fingerprint: Fingerprint
    format: str = ""
    kind: str = ""
    frames: int = 0
    reason: str = ""
    digest: str | None = None
    supersedes: str | None = None

    @property
    def name(self) -> str:
        """The relative path for people: valid text, not reversible."""
        return self.relpath.decode("utf-8", "backslashreplace")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to run a recipe over an acquisition.

    Attributes
    ----------
    memory_mib : int
        Of each node, as it was asked for, or as the scheduler says; 0 where nobody has said.
    nodes : int
        That it has or had; 0 until the scheduler or its claim has told.
    started_ns : int
        Wall time from which its nodes are counted; 0 likewise.
    """

    name: str
    acquisition: str
    attempt: int
    state: JobState
    recipe: str
    scheduler: str
    scheduler_id: str = ""
    reason: str = ""
    planned_ns: int = 0
    changed_ns: int = 0
    memory_mib: int = 0
    nodes: int = 0
    started_ns: int = 0


class SchedulerPhase(enum.StrEnum):
    """All that emflow wants to know from a scheduler; success is judged by the result's manifest alone."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    ENDED = "ENDED"
    GONE = "GONE"  # the scheduler does not know the id (any more): not the same as failed
    UNKNOWN = "UNKNOWN"


class EndCause(enum.StrEnum):
    """Why a scheduler says that a job ended.  It never says whether there is a result: COMPLETED neither."""

    UNSAID = ""
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    DEADLINE = "DEADLINE"
    BOOT_FAIL = "BOOT_FAIL"


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler says of one job: ``RUNNING``, or ended without saying whether there is a result.

    Attributes
    ----------
    reason : str
        In plain words; of a job that waits, why, and what to do if that can never change.
    cause : EndCause
        Why it ended.
    nodes : int
        Nodes that it has or had; 0 where the scheduler does not say.
    elapsed_s : float
        Seconds that it has had them, without those for which it was suspended; 0 likewise.
    memory_mib : int
        Memory that it has of each node; 0 likewise.
    stuck : bool
        It waits for what can't come by itself: ``reason`` says what a person has to do.
    """

    scheduler_id: str
    phase: SchedulerPhase
    reason: str = ""
    node: str = ""
    cause: EndCause = EndCause.UNSAID
    nodes: int = 0
    elapsed_s: float = 0.0
    memory_mib: int = 0
    stuck: bool = False


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may use.  ``memory_mib`` is for each node; 0 leaves it to the configuration, then to the site."""

    ranks: int = 1
    time_limit_s: int = 3600
    memory_mib: int = 0


def acquisition_id(share: str, relpath: bytes, generation: int) -> str:
    """The 16 hex digits that name an acquisition: the same file gets the same id even with a new journal.

    ``generation`` counts the different contents seen under one path.
    """
    key = b"\0".join((os.fsencode(share), relpath, str(generation).encode()))
    return hashlib.blake2b(key, digest_size=8).hexdigest()


def job_name(acquisition: str, attempt: int) -> str:
    """``<acquisition>-<nn>``, the one key of an attempt: folder, Slurm job name, log field and result key."""
    name = f"{acquisition}-{attempt:02d}"
    if not JOB_NAME.fullmatch(name):
        raise ValueError(f"no job name: {name!r}")
    return name
