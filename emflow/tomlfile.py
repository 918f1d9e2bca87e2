"""TOML files that people write: strict records from them, and errors with the line and what was probably meant.

tomllib gives values without positions, so a small scanner finds the line of every key in text that tomllib accepted.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from emflow.errors import ConfigError, NotAllowed, printable

T = TypeVar("T")
Key = tuple[str | int, ...]
"""Where a value is: names of tables and keys, and indexes of arrays."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' + r"|'''(?:.|\n)*?'{3,5}" + r'|"(?:\\.|[^"\\\n])*"' + r"|'[^'\n]*'", re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]*")
_SYNTAX_LINE = re.compile(r"\(at line (\d+), column \d+\)")
_WRONG = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$?(?P<where>[^`]*)`)?$", re.DOTALL)


class Document:
    """A parsed TOML file that still knows where everything stands.

    Parameters
    ----------
    path : str
        How the file is called in messages.
    data : bytes
        Its content.
    """

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._at(data[: error.start].count(b"\n") + 1, "not UTF-8 text") from None
        text = text.replace("\r\n", "\n")
        try:
            self.value: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = _SYNTAX_LINE.search(str(error))
            line = int(found[1]) if found else text.rstrip("\n").count("\n") + 1
            raise self._at(line, f"not TOML: {_SYNTAX_LINE.sub('', str(error)).strip()}") from None
        self._lines = _lines(text)

    def line(self, where: Key) -> int:
        """Line of a key, counted from 1; of its nearest table where the key is not written."""
        while where and where not in self._lines:
            where = where[:-1]
        return self._lines.get(where, 1)

    def error(self, where: Key, message: str, *, next_step: str = "") -> ConfigError:
        """An error that starts with the file and the line of a key."""
        return self._at(self.line(where), message, next_step)

    def unknown(self, where: Key, known: typing.Iterable[str], what: str = "key") -> ConfigError:
        """The error for a name that nobody knows, with the likely meant one."""
        return self.error(where, f"unknown {what} {str(where[-1])!r}{_inside(where)}{meant(str(where[-1]), known)}")

    def convert(self, cls: type[T], hook: Callable[[type, Any], Any] | None = None) -> T:
        """The document as a record; unknown keys and wrong values raise `ConfigError`."""
        self._refuse_unknown(cls, self.value, ())
        try:
            return msgspec.convert(self.value, cls, strict=True, dec_hook=hook)
        except msgspec.ValidationError as error:
            raise self._wrong(str(error), cls) from None

    def _refuse_unknown(self, kind: Any, value: Any, where: Key) -> None:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
            fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
            for name, inner in value.items():
                if name not in fields:
                    raise self.unknown((*where, name), fields)
                self._refuse_unknown(fields[name], inner, (*where, name))
        elif typing.get_origin(kind) is tuple and isinstance(value, list):
            for index, inner in enumerate(value):
                self._refuse_unknown(typing.get_args(kind)[0], inner, (*where, index))

    def _wrong(self, text: str, cls: type) -> ConfigError:
        found = _WRONG.match(text)
        where: list[str | int] = []
        for part in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", (found and found["where"]) or ""):
            where.append(part[0] or int(part[1]))
        what = (found["what"] if found else text).replace("`", "")
        missing = re.fullmatch(r"Object missing required field (\w+)", what)
        if missing:
            return self.error(tuple(where), f"{missing[1]!r} is missing{_inside((*where, missing[1]))}")
        names = ".".join(str(p) for p in where if isinstance(p, str)) or "the file"
        choices = _choices(cls, where)
        value = re.fullmatch(r"Invalid enum value '(.*)'", what, re.DOTALL)
        known = meant(value[1] if value else "", choices) if choices else ""
        return self.error(tuple(where), f"{names}: {what[:1].lower()}{what[1:]}{known}")

    def _at(self, line: int, message: str, next_step: str = "") -> ConfigError:
        return ConfigError(f"{printable(self.path)}:{line}: {message}", next_step=next_step)


def read(path: Path, *, next_step: str = "") -> Document:
    """Read a TOML file; ``next_step`` is the advice where it does not exist."""
    try:
        return Document(str(path), path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{printable(str(path))}: no such file", next_step=next_step) from None
    except IsADirectoryError:
        raise ConfigError(f"{printable(str(path))}: a folder, not a file", next_step=next_step) from None
    except PermissionError:
        raise NotAllowed(f"{printable(str(path))}: no permission to read it") from None


def meant(name: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown name: the likely meant one, and all that are known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" known: {', '.join(names)}"


def _choices(kind: Any, where: list[str | int]) -> tuple[str, ...]:
    """The words that a Literal at a place of a record allows; none for any other type."""
    for part in where:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            kind = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}.get(part)
        elif isinstance(part, int) and typing.get_args(kind):
            kind = typing.get_args(kind)[0]
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _inside(where: Key) -> str:
    """`` in [scan]`` or `` in [[watch]]`` for a key in a table, nothing at the top."""
    table = where[:-1]
    name = ".".join(str(p) for p in table if isinstance(p, str))
    if not name:
        return ""
    return f" in [[{name}]]" if isinstance(table[-1], int) else f" in [{name}]"


def _lines(text: str) -> dict[Key, int]:
    """Line of every table, key and array element of valid TOML."""
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}
    for offset, where in _Scanner(text, counts).walk():
        lines.setdefault(where, text.count("\n", 0, offset) + 1)
    return lines


class _Scanner:
    """Walks over valid TOML; strings are skipped as a whole, so that their text can't fool it."""

    def __init__(self, text: str, counts: dict[Key, int]) -> None:
        self.text, self.at, self.counts = text, 0, counts

    def walk(self) -> Iterator[tuple[int, Key]]:
        """Yield the offset of every table, key and array element, with its path."""
        table: Key = ()
        while self._skip() < len(self.text):
            start = self.at
            if self.text[self.at] == "[":
                table = self._header()
                yield start, table
            else:
                yield from self._pair(table)

    def _skip(self) -> int:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.at

    def _header(self) -> Key:
        double = self.text.startswith("[[", self.at)
        self.at += 2 if double else 1
        table: Key = ()
        names = self._dotted()
        for position, name in enumerate(names):
            table = (*table, name)
            if double and position == len(names) - 1:
                self.counts[table] = self.counts.get(table, -1) + 1
            if table in self.counts:
                table = (*table, self.counts[table])
        self.at += 2 if double else 1
        return table

    def _dotted(self) -> list[str]:
        names: list[str] = []
        while True:
            self._skip()
            found = _STRING.match(self.text, self.at) or _BARE.match(self.text, self.at)
            if found is None:
                return names
            raw = found[0]
            names.append(raw if raw[0] not in "\"'" else str(tomllib.loads(f"k={raw}")["k"]))
            self.at = found.end()
            if self.text[self._skip()] != ".":
                return names
            self.at += 1

    def _pair(self, table: Key) -> Iterator[tuple[int, Key]]:
        start = self.at
        where = table
        for name in self._dotted():
            where = (*where, name)
            yield start, where
        self.at += 1  # the equals sign
        yield from self._value(where)

    def _value(self, where: Key) -> Iterator[tuple[int, Key]]:
        self._skip()
        first = self.text[self.at]
        if first == "[":
            self.at += 1
            index = 0
            while self.text[self._skip()] != "]":
                yield self.at, (*where, index)
                yield from self._value((*where, index))
                index += 1
                self._comma()
            self.at += 1
        elif first == "{":
            self.at += 1
            while self.text[self._skip()] != "}":
                yield from self._pair(where)
                self._comma()
            self.at += 1
        else:
            found = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            self.at = found.end() if found else self.at + 1

    def _comma(self) -> None:
        if self.text[self._skip()] == ",":
            self.at += 1
