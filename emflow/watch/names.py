"""Which names on a share are acquisitions: the patterns of the configuration, and what is never data."""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections.abc import Sequence

_TEMPORARY = re.compile(r"\..*|~\$.*|.*\.part", re.IGNORECASE | re.DOTALL)

_OURS = re.compile(r".*_emflow\.[^.]+|.*\.emflow\.json", re.IGNORECASE | re.DOTALL)
"""Results (``<acquisition>_emflow.h5`` and its preview) and the notes that emflow's microscope server writes."""

_NOTE = re.compile(r"[^.].*\.emflow\.json", re.DOTALL)

_PART = re.compile(r".+_data_[0-9]{6}\.h5", re.IGNORECASE | re.DOTALL)
"""Dectris's data files, which belong to the acquisition of their ``<stem>_master.h5``."""

_BESIDE_MASTER = re.compile(rb"(.+)\.h5", re.IGNORECASE | re.DOTALL)

_SYSTEM_FOLDERS = frozenset({"@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information"})
"""What a NAS or Windows keeps beside data, thumbnails and deleted files under the data's own names."""


def is_temporary(name: str) -> bool:
    """Whether a file name marks something that its writer has not published, or that emflow wrote itself.

    >>> is_temporary(".scan.h5.a1"), is_temporary("~$notes.h5"), is_temporary("scan.h5.part"), is_temporary("scan.h5")
    (True, True, True, False)
    """
    return _TEMPORARY.fullmatch(name) is not None or _OURS.fullmatch(name) is not None


def is_note(name: str) -> bool:
    """Whether a file name is that of the note which says that a commanded scan is whole.

    >>> is_note("e0123456789ab-0001-02.emflow.json"), is_note(".e0123456789ab-0001-02.emflow.json.7.a1")
    (True, False)
    """
    return _NOTE.fullmatch(name) is not None


def is_part(name: str) -> bool:
    """Whether a file name is that of a further file of an acquisition, which is found by its main file's name.

    >>> is_part("scan_data_000001.h5"), is_part("scan_master.h5"), is_part("data_000001.h5")
    (True, False, False)
    """
    return _PART.fullmatch(name) is not None


def main_of(name: bytes) -> bytes | None:
    """The file that makes this one a sidecar, if it is there; None where the name can't be a sidecar's.

    >>> main_of(b"scan.h5"), main_of(b"scan.mib")
    (b'scan_master.h5', None)
    """
    found = _BESIDE_MASTER.fullmatch(name)
    return found[1] + b"_master.h5" if found else None


class Names:
    """Chooses by name, without regard to case, since shares are shared with Windows.

    Parameters
    ----------
    match : sequence of str
        Shell patterns; one with a slash is held against the path inside the share, where ``*`` crosses folders,
        any other against the last component.  Empty means every file.
    ignore : sequence of str
        Patterns that win over ``match``; a folder that fits is not entered.
    """

    def __init__(self, match: Sequence[str], ignore: Sequence[str]) -> None:
        self._match = _compiled(match or ("*",))
        self._ignore = _compiled(ignore)
        # a bare "*" fits every folder; only a pattern with a suffix says that a folder stands where a file should
        self._like_a_file = _compiled([p for p in match if "." in p.rpartition("/")[2]])

    def wants_file(self, relpath: bytes) -> bool:
        """Whether a file of this name may be the main file of an acquisition."""
        text, name = _text(relpath)
        unwanted = is_temporary(name) or is_part(name)
        return not unwanted and _fits(self._match, text, name) and not _fits(self._ignore, text, name)

    def wants_folder(self, relpath: bytes) -> bool:
        """Whether a folder is entered."""
        text, name = _text(relpath)
        unwanted = is_temporary(name) or name.lower() in _SYSTEM_FOLDERS
        return not unwanted and not _fits(self._ignore, text, name)

    def expects_file(self, relpath: bytes) -> bool:
        """Whether the name of a folder is one that only a file should have."""
        return _fits(self._like_a_file, *_text(relpath))


def _text(relpath: bytes) -> tuple[str, str]:
    text = os.fsdecode(relpath)
    return text, text.rpartition("/")[2]


_Compiled = tuple[re.Pattern[str] | None, re.Pattern[str] | None]
"""Alternatives for the last component, and for the path inside the share."""


def _compiled(patterns: Sequence[str]) -> _Compiled:
    return _any(tuple(p for p in patterns if "/" not in p)), _any(tuple(p for p in patterns if "/" in p))


@functools.cache
def _any(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    text = "|".join(fnmatch.translate(p) for p in patterns)
    return re.compile(text, re.IGNORECASE) if text else None


def _fits(compiled: _Compiled, path: str, name: str) -> bool:
    by_name, by_path = compiled
    return bool((by_name and by_name.match(name)) or (by_path and by_path.match(path)))
