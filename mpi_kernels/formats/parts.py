"""Files that are numbered parts of one acquisition: found by the numbering, never by a pattern that fits others too."""

from __future__ import annotations

import os
import re

from mpi_kernels.errors import FormatError, Incomplete, PartOfAnother, printable
from mpi_kernels.formats.access import os_errors

MAX_PARTS = 100_000


def numbered(path: str, rule: re.Pattern[str], first: int | None = None) -> tuple[str, ...]:
    """All parts of an acquisition, in order of their numbers.

    Parameters
    ----------
    path : str
        The first part.
    rule : re.Pattern
        Matches a whole file name; its groups ``stem``, ``number`` and ``end`` must be all of it.
    first : int, optional
        Number of the first part; None: 0 where there is one, else 1.

    Returns
    -------
    tuple of str
        Just ``path`` where its name is not numbered.

    Raises
    ------
    PartOfAnother
        ``path`` is a later part.
    Incomplete
        A part is missing between others.
    """
    folder, name = os.path.split(path)
    own = rule.fullmatch(name)
    if own is None:
        return (path,)
    found = {}
    with os_errors(folder or "."), os.scandir(folder or ".") as entries:
        for entry in entries:
            other = rule.fullmatch(entry.name)
            if other and (other["stem"], other["end"].lower()) == (own["stem"], own["end"].lower()):
                number = int(other["number"])
                if number in found:
                    raise FormatError(f"two parts have number {number}", path=path, next_step="remove one of them")
                found[number] = os.path.join(folder, entry.name)  # noqa: PTH118
    if len(found) > MAX_PARTS:
        raise FormatError(f"more than {MAX_PARTS} parts have its name", path=path, next_step="move others elsewhere")
    if first is None:
        first = 0 if 0 in found else 1
    if int(own["number"]) != first and first in found:
        main = printable(os.path.basename(found[first]))  # noqa: PTH119
        raise PartOfAnother(f"it is a later part of {main}", path=path, next_step=f"name {main}: it brings its parts")
    numbers = range(first, first + len(found))
    gap = next((n for n in numbers if n not in found), None)
    if gap is not None:
        raise Incomplete(f"part {gap} of {first + len(found)} or more is missing", path=path, next_step="wait for it")
    return tuple(found[n] for n in numbers)
