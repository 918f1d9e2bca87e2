"""The tag tree of a DigitalMicrograph file: read with limits, arrays only by their place.

Source: the description of the format by C. Boothroyd and others as rosettasciio's and ncempy's readers hold it (read,
not copied), and real files.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mpi_kernels.errors import FormatError, Incomplete
from mpi_kernels.formats.access import os_errors

MAX_TAGS = 200_000
MAX_DEPTH = 40
MAX_INFO = 1 << 12
TEXT_LIMIT = 512
"""Values of an array of 16-bit numbers up to which it may be a text."""

END_BYTES = 8
"""Zeros behind the last tag."""

# type of a simple value: struct's letter
_SIMPLE = {2: "h", 3: "i", 4: "H", 5: "I", 6: "f", 7: "d", 8: "?", 9: "b", 10: "B", 11: "q", 12: "Q"}
_STRUCT, _STRING, _ARRAY = 15, 18, 20

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Place:
    """An array in the file: where it begins, how many elements, bytes of each."""

    offset: int
    count: int
    item: int


@dataclass(slots=True)
class Tree:
    """All tags by their path, ``ImageList/1/ImageData/DataType``; a tag without a name has its number."""

    order: str
    values: dict[str, Value] = field(default_factory=dict)
    arrays: dict[str, Place] = field(default_factory=dict)


def read(path: str) -> Tree:
    """Read the tags of a file that `version` knows.

    Raises
    ------
    Incomplete
        The file ends before its tags do.
    FormatError
        Lengths or types that can't be.
    """
    with os_errors(path), Path(path).open("rb") as file:
        return _Walk(path, file).tree()


class _Walk:
    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._tags = 0
        self._wide = False
        self._tree = Tree("<")

    def tree(self) -> Tree:
        version, self._wide = self._int(">I"), False
        if version not in (3, 4):
            raise self._wrong(f"version {version} is not 3 or 4")
        self._wide = version == 4
        length = self._word()
        self._tree.order = "<" if self._int(">I") else ">"
        begin = self._file.tell()
        self._group("", 0, root=True)
        if self._file.tell() == begin + length:  # some writers leave it wrong
            self._take(END_BYTES)
        return self._tree

    def _group(self, where: str, depth: int, *, root: bool = False) -> None:
        if depth > MAX_DEPTH:
            raise self._wrong(f"tags lie {depth} deep")
        if self._wide and not root:
            self._word()  # bytes of the group
        self._take(2)  # sorted, open
        for i in range(self._word()):
            self._tags += 1
            if self._tags > MAX_TAGS:
                raise self._wrong(f"more than {MAX_TAGS} tags")
            kind, length = struct.unpack(">BH", self._take(3))
            name = self._take(length).decode("latin-1").replace("/", "_") or str(i)
            at = f"{where}/{name}" if where else name
            if kind == 20:
                self._group(at, depth + 1)
            elif kind == 21:
                self._data(at)
            else:
                raise self._wrong(f"a tag of type {kind}")

    def _data(self, at: str) -> None:
        if self._wide:
            self._word()  # bytes of the tag
        if self._take(4) != b"%%%%":
            raise self._wrong("a tag without its mark")
        count = self._word()
        if not 0 < count <= MAX_INFO:
            raise self._wrong(f"a tag described by {count} numbers")
        info = [self._word() for _ in range(count)]
        if info[0] in _SIMPLE and count == 1:
            code = self._tree.order + _SIMPLE[info[0]]
            self._tree.values[at] = struct.unpack(code, self._take(struct.calcsize(code)))[0]
            return
        item, kinds = self._item(info)
        length = info[-1] if info[0] == _ARRAY else 1
        if info[0] == _ARRAY and kinds == (4,) and length <= TEXT_LIMIT:
            here = self._file.tell()
            text = self._take(2 * length).decode("utf-16-le" if self._tree.order == "<" else "utf-16-be", "replace")
            self._tree.values[at] = text.rstrip("\0")
            self._file.seek(here)
        self._skip(at, length, item)

    def _item(self, info: list[int]) -> tuple[int, tuple[int, ...]]:
        """Bytes of what an array, a struct or a string is made of, and its simple types."""
        kind, rest = info[0], info[1:]
        if kind == _ARRAY and len(rest) >= 2:
            return self._item(rest[:-1])
        if kind == _STRING and len(rest) == 1:
            return rest[0], ()
        if kind == _STRUCT and len(rest) >= 2 and len(rest) == 2 + 2 * rest[1]:
            kinds = tuple(rest[3::2])
        elif kind in _SIMPLE and not rest:
            kinds = (kind,)
        else:
            raise self._wrong(f"a tag described as {info[:8]}")
        if not all(k in _SIMPLE for k in kinds):
            raise self._wrong(f"a tag described as {info[:8]}")
        return sum(struct.calcsize("<" + _SIMPLE[k]) for k in kinds), kinds

    def _skip(self, at: str, length: int, item: int) -> None:
        here = self._file.tell()
        if length < 0 or here + length * item > 1 << 62:
            raise self._wrong(f"an array of {length} values")
        self._tree.arrays[at] = Place(here, length, item)
        self._file.seek(here + length * item)

    def _word(self) -> int:
        return self._int(">Q" if self._wide else ">I")

    def _int(self, code: str) -> int:
        value: int = struct.unpack(code, self._take(struct.calcsize(code)))[0]
        return value

    def _take(self, count: int) -> bytes:
        with os_errors(self._path):
            data = self._file.read(count)
        if len(data) < count:
            raise Incomplete(
                f"it ends after {self._size} bytes, within its tags", path=self._path, next_step="wait for the writer"
            )
        return data

    def _wrong(self, what: str) -> FormatError:
        return FormatError(
            f"its tags can't be read: {what} at byte {self._file.tell()}",
            path=self._path,
            next_step="copy the file again from the microscope",
        )
