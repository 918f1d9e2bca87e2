"""What can go wrong on the service side, each with its exit code and whether trying again can help.

EmflowError           1
├── UsageError        2   the command line or an id that names nothing
├── Unavailable       69  a part that is needed is not there (scheduler, mount, MPI)
│   └── NoSpace       69  a disk is full; resumes by itself when there is room
│       └── JournalFull   the journal's disk is: nothing can be recorded, so nothing is done
├── Busy              75  another service holds the journal
├── NotAllowed        77  the operating system says no
├── ConfigError       78  the configuration is wrong
├── SourceChanged     1   the source was rewritten while it was copied
├── SubmitError       1   the scheduler refused a job
└── JournalError      1   the journal is damaged, or newer than this program
StaleState is raised where a compare-and-set move finds another state than expected.
"""

from __future__ import annotations

from typing import ClassVar

from mpi_kernels.errors import printable


class EmflowError(Exception):
    """Something failed; the text says what, why and what to do.

    Parameters
    ----------
    message : str
        What is wrong and why.
    next_step : str
        What the reader can do now.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return self.message + (f". {self.next_step}" if self.next_step else "")


class UsageError(EmflowError):
    """The command line or an id that names nothing."""

    exit_code = 2


class Unavailable(EmflowError):
    """A part that is needed is not there."""

    exit_code = 69
    retryable = True


class NoSpace(Unavailable):
    """A disk is full; work resumes by itself when there is room."""


class JournalFull(NoSpace):
    """The journal's disk is full: nothing can be recorded, so nothing is done until there is room."""


class Busy(EmflowError):
    """Another service holds the journal."""

    exit_code = 75
    retryable = True

    def __init__(self, message: str, *, pid: int | None = None, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.pid = pid


class NotAllowed(EmflowError):
    """The operating system says no."""

    exit_code = 77


class ConfigError(EmflowError):
    """The configuration is wrong."""

    exit_code = 78


class SourceChanged(EmflowError):
    """The source was rewritten while it was copied."""

    retryable = True


class SubmitError(EmflowError):
    """The scheduler refused a job, for good unless ``transient``."""

    def __init__(self, message: str, *, transient: bool = False, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.transient = transient


class JournalError(EmflowError):
    """The journal is damaged, or newer than this program."""


class StaleState(EmflowError):
    """A compare-and-set move found another state than expected."""

    retryable = True


__all__ = [
    "Busy",
    "ConfigError",
    "EmflowError",
    "JournalError",
    "JournalFull",
    "NoSpace",
    "NotAllowed",
    "SourceChanged",
    "StaleState",
    "SubmitError",
    "Unavailable",
    "UsageError",
    "printable",
]
