"""What the service says on stderr: lines for people, or one JSON object a line; set up by the command line only."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from emflow.errors import printable

FIELDS = ("acquisition", "job", "alarm")
"""Extra fields of a record, as in ``log.info("done", extra={"job": name})``."""


class Lines(logging.Formatter):
    """``12:00:01 WARNING message [0123456789abcdef-01]``, and below it a traceback's lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Lay one record out."""
        when = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        about = next((str(getattr(record, f)) for f in ("job", "acquisition") if hasattr(record, f)), "")
        text = _escaped(record.getMessage())
        line = f"{when} {record.levelname:<7} {text}" + (
            f" [{printable(about)}]" if about and about not in text else ""
        )
        return "\n".join([line, *(f"  {_escaped(part)}" for part in _traceback(record))])


class Objects(logging.Formatter):
    """One JSON object a line, in ASCII; times are UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Lay one record out."""
        said: dict[str, str | list[str]] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _escaped(record.getMessage()),
        }
        said |= {name: printable(str(getattr(record, name))) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            said["traceback"] = [_escaped(part) for part in _traceback(record)]
        return json.dumps(said)


def set_up(*, level: str, as_json: bool = False, stream: TextIO | None = None) -> logging.Handler:
    """Send emflow's log to a stream, stderr by default; called again, it replaces what it did before.

    Parameters
    ----------
    level : str
        ``debug``, ``info``, ``warning`` or ``error``, in any case.
    as_json : bool
        One JSON object a line.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Objects() if as_json else Lines())
    handler.set_name("emflow")
    logger = logging.getLogger("emflow")
    for old in [h for h in logger.handlers if h.get_name() == "emflow"]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False  # another package's set-up would print every line twice
    return handler


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[0] is None:
        return []
    return logging.Formatter().formatException(record.exc_info).splitlines()


def _escaped(text: str) -> str:
    r"""Make a whole message printable; text that was made printable before keeps its escapes as they are.

    `printable` escapes its own backslash too, so a path that went through it would gain one at each step.
    """
    return "".join(c if c.isprintable() else printable(c) for c in text)
