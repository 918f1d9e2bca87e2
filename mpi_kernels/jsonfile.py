"""Strict JSON for the records of :mod:`mpi_kernels.contract`, and files that are whole or not there; stdlib only."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from mpi_kernels.errors import FormatError

T = TypeVar("T")


def encode(record: Any) -> bytes:
    """One record as a line of JSON (no newline); text that is not valid Unicode survives as escaped surrogates."""
    return json.dumps(dataclasses.asdict(record), allow_nan=False, separators=(",", ":")).encode("ascii")


def decode(cls: type[T], data: bytes | str, *, path: str | os.PathLike[str] | None = None) -> T:
    """A record from JSON; unknown, missing or mistyped fields raise `FormatError` that names the field."""
    try:
        value = json.loads(data, parse_constant=_not_a_number)
    except ValueError as error:
        raise FormatError(f"not JSON: {error}", path=path) from error
    except RecursionError as error:
        raise FormatError("not JSON of ours: nested too deeply", path=path) from error
    return from_plain(cls, value, path=path)


def from_plain(cls: type[T], value: Any, *, path: str | os.PathLike[str] | None = None) -> T:
    """A record from dicts and lists, as strict as `decode`."""
    try:
        return typing.cast(T, _convert(cls, value, cls.__name__))
    except _Mismatch as error:
        raise FormatError(str(error), path=path) from None


def read(cls: type[T], path: str | os.PathLike[str]) -> T:
    """Read one record; FileNotFoundError passes through."""
    return decode(cls, Path(path).read_bytes(), path=path)


def publish(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that a reader sees whole or not at all, also after a power cut: `replace`, fsync of the folder."""
    replace(path, data)
    sync_folder(Path(path).parent)


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: temporary, fsync, rename."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in a folder survive a power cut; Windows opens no folders, and has NTFS's own journal for them."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _not_a_number(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is no JSON")


class _Mismatch(Exception):
    pass


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, where)
    if origin is typing.Literal:
        known = any(value == a and type(value) is type(a) for a in args)
        return value if known else _fail(where, f"one of {args}", value)
    if origin is tuple:
        return _tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            _fail(where, "a table", value)
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is type(None):
        return None if value is None else _fail(where, "null", value)
    return value if type(value) is kind else _fail(where, kind.__name__, value)


def _record(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _fail(where, "a table", value)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in value:
        if name not in fields:
            raise _Mismatch(f"{where}: unknown field {name!r}; known are {', '.join(fields)}")
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _Mismatch(f"{where}: field {name!r} is missing")
    if "v" in fields and value.get("v", fields["v"].default) != fields["v"].default:
        raise _Mismatch(f"{where}: version {value['v']!r} is not {fields['v'].default}, which this emflow reads")
    return cls(**{name: _convert(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        if type(value) is option or (option is type(None) and value is None):
            return value
    for option in options:
        try:
            return _convert(option, value, where)
        except _Mismatch:
            continue
    return _fail(where, " or ".join(getattr(o, "__name__", str(o)) for o in options), value)


def _tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        _fail(where, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        _fail(where, f"{len(args)} values", value)
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _fail(where: str, wanted: str, value: Any) -> typing.NoReturn:
    raise _Mismatch(f"{where}: expected {wanted}, got {value!r:.80}")
