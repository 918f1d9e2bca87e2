"""Run the demonstration: a service and a writer as processes of their own, a live table, a figure at the end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from emflow.demo.writer import SCANS
from emflow.errors import EmflowError
from emflow.journal import Journal
from emflow.records import Acquisition, AcquisitionState
from emflow.timeline import Row, row_of
from mpi_kernels.contract import Event

CONFIGURATION = """\
[[watch]]
root = "microscope"
share = "demo"

[scan]
settle_s = 0.3
stable_s = 1.0

[transfer]
min_free = "64 MiB"

[scheduler]
use = "local"
ranks = 2
poll_s = 0.05
"""
TIME_LIMIT_S = 300.0
TERMINAL = frozenset({AcquisitionState.DONE, AcquisitionState.QUARANTINED, AcquisitionState.STALLED})


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What the demonstration ended with."""

    folder: str
    figure: str
    seconds: float
    acquisitions: list[Row]


def show(folder: Path, figure: Path, update: Callable[[list[Row]], None]) -> Shown:
    """Run it in ``folder`` and draw ``figure``; ``update`` gets the rows several times a second.

    Raises
    ------
    EmflowError
        A process ended early, an acquisition was set aside, or it took too long; the log's end is in the text.
    """
    from emflow.demo.figure import draw

    begin = time.monotonic()
    share = folder / "microscope"
    share.mkdir(parents=True)
    toml = folder / "emflow.toml"
    toml.write_text(CONFIGURATION, encoding="utf-8")
    log = folder / "service.log"
    with log.open("w") as said, contextlib.ExitStack() as running:
        service = running.enter_context(_process(["emflow", "-c", str(toml), "run"], said))
        with _journal(folder / "state" / "journal.sqlite", service, log) as journal:
            writer = running.enter_context(_process(["emflow.demo.writer", str(share)], said))
            rows = _follow(journal, service, writer, log, update)
            journalled = journal.acquisitions()
            chosen = next(a for a in journalled if a.state is AcquisitionState.DONE and a.kind == "4d")
            draw(figure, folder / "results" / f"{chosen.id}_emflow.h5", chosen, _events(journal, chosen))
    return Shown(folder=str(folder), figure=str(figure), seconds=time.monotonic() - begin, acquisitions=rows)


def _events(journal: Journal, acquisition: Acquisition) -> list[Event]:
    return [event for _, event in journal.events(trace=acquisition.trace)]


def _follow(
    journal: Journal,
    service: subprocess.Popen[bytes],
    writer: subprocess.Popen[bytes],
    log: Path,
    update: Callable[[list[Row]], None],
) -> list[Row]:
    end = time.monotonic() + TIME_LIMIT_S
    while True:
        acquisitions = journal.acquisitions()
        rows = [row_of(journal, a) for a in acquisitions]
        update(rows)
        if len(rows) >= len(SCANS) and all(a.state in TERMINAL for a in acquisitions) and writer.poll() is not None:
            break
        if service.poll() is not None or (writer.poll() or 0) != 0 or time.monotonic() > end:
            raise _broken("the demonstration did not end as it should", log)
        time.sleep(0.1)
    bad = [row for row in rows if row.state != AcquisitionState.DONE]
    if bad:
        raise _broken(f"{bad[0].path} ended as {bad[0].state}: {bad[0].reason}", log)
    return rows


def _journal(path: Path, service: subprocess.Popen[bytes], log: Path) -> Journal:
    """The journal, as soon as the service has made it."""
    end = time.monotonic() + 30.0
    while True:
        try:
            return Journal(path, read_only=True)
        except EmflowError as error:
            if service.poll() is not None or time.monotonic() > end:
                raise _broken("the service did not start", log) from error
        time.sleep(0.02)


def _broken(what: str, log: Path) -> EmflowError:
    tail = " | ".join(log.read_text("utf-8", "replace").strip().splitlines()[-5:])
    return EmflowError(f"{what}; the log ends with: {tail}", next_step="Run emflow demo --keep FOLDER and look there")


@contextlib.contextmanager
def _process(module: list[str], said: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this Python that ends with the demonstration; a service ends its own jobs first.

    ``-P``: a folder called emflow where the demonstration is started must not be taken for the package.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with _signals_wait():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *module],
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        yield process
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold signals back that would raise: one that comes inside Popen leaves a process that nobody knows of."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for held in came:
        signal.raise_signal(held)
