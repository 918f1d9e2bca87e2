"""What can go wrong on the compute side; standard library only.

KernelError
├── FormatError         the bytes are not, and never will be, a valid file of the format
│   ├── NotThisFormat   another format may know the file
│   └── PartOfAnother   a further file of an acquisition that has another main file
├── Incomplete          the writer is not done; ask again later
├── MissingData         a frame that should be there is not (never replaced by zeros)
├── RecipeError         the recipe does not fit the data or names something unknown
├── Stalled             nothing more of a growing acquisition came
└── LaunchError         the ranks were not started as the job asked
"""

from __future__ import annotations

import os


class KernelError(Exception):
    """The computation failed.

    Parameters
    ----------
    message : str
        What is wrong and why, in one sentence.
    path : str or path-like, optional
        The file it is about.
    frame : int, optional
        The first frame that is affected, counted from 0 in scan order.
    next_step : str
        What the reader can do now.
    """

    code = "kernel"
    retryable = False

    def __init__(
        self, message: str, *, path: str | os.PathLike[str] | None = None, frame: int | None = None, next_step: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else os.fsdecode(path)
        self.frame = None if frame is None else int(frame)  # often numpy's, which JSON does not know
        self.next_step = next_step

    def __str__(self) -> str:
        where = "" if self.path is None else f"{printable(self.path)}: "
        at = "" if self.frame is None else f" (frame {self.frame})"
        then = "" if not self.next_step else f". {self.next_step}"
        return f"{where}{self.message}{at}{then}"


class FormatError(KernelError):
    """The bytes are not, and never will be, a valid file of the format."""

    code = "format"


class NotThisFormat(FormatError):
    """Another format may know the file."""

    code = "not-this-format"


class PartOfAnother(FormatError):
    """A further file of an acquisition that has another main file."""

    code = "part"


class Incomplete(KernelError):
    """The writer is not done; ask again later."""

    code = "incomplete"
    retryable = True


class MissingData(KernelError):
    """A frame that should be there is not; it is never replaced by zeros."""

    code = "missing-data"


class RecipeError(KernelError):
    """The recipe does not fit the data or names something unknown."""

    code = "recipe"


class Stalled(KernelError):
    """Nothing more of a growing acquisition came."""

    code = "stalled"
    retryable = True


class LaunchError(KernelError):
    """The ranks were not started as the job asked."""

    code = "launch"
    retryable = True


def printable(text: str) -> str:
    r"""Text from outside, safe for a terminal and a log line: control, bidi and undecodable characters escaped.

    >>> printable("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    return "".join(c if c.isprintable() and c != "\\" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
