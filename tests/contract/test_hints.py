"""What every source of hints must keep: it may be lossy, and the loop around it finds everything all the same."""

import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emflow.watch.hints import RESCAN, Hints, NoHints
from emflow.watch.inotify import InotifyHints
from emflow.watch.scan import Scanner

SOURCES: dict[str, Callable[[Path], Hints]] = {"none": lambda root: NoHints(), "inotify": InotifyHints}

WRITER = """
import os, pathlib, sys
root = pathlib.Path(sys.argv[1])
for i in range(30):
    folder = root / str(i % 7) / str(i)
    folder.mkdir(parents=True)
    for j in range(10):
        (folder / f"{j}.part").write_bytes(b"1" * j)
        (folder / f"{j}.part").rename(folder / f"{j}.mib")
"""


@pytest.fixture(params=SOURCES)
def hints(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hints]:
    made = SOURCES[request.param](tmp_path)
    made.arm()
    yield made
    made.close()
    made.close()


def settle(hints: Hints) -> None:
    while hints.wait(0):
        pass


def test_keeps_the_protocol(hints: Hints) -> None:
    assert isinstance(hints, Hints)
    assert hints.degraded == ""
    assert isinstance(hints.live, bool)


def test_waits_no_longer_than_asked(hints: Hints) -> None:
    settle(hints)
    start = time.monotonic()
    assert hints.wait(0.05) == frozenset()
    assert 0.04 <= time.monotonic() - start < 5
    assert hints.closed() == frozenset()


def test_wake_ends_a_wait_from_another_thread(hints: Hints) -> None:
    settle(hints)
    threading.Timer(0.05, hints.wake).start()
    start = time.monotonic()
    assert hints.wait(30) == frozenset()
    assert time.monotonic() - start < 10


def test_many_wakes_are_one(hints: Hints) -> None:
    settle(hints)
    for _ in range(100_000):
        hints.wake()
    assert hints.wait(30) == frozenset()
    start = time.monotonic()
    hints.wait(0.05)
    assert time.monotonic() - start >= 0.04


def test_the_descriptor_is_readable_when_there_is_something(hints: Hints) -> None:
    settle(hints)
    assert select.select([hints.fileno()], [], [], 0)[0] == []
    hints.wake()
    assert select.select([hints.fileno()], [], [], 5)[0] == [hints.fileno()]
    settle(hints)
    assert select.select([hints.fileno()], [], [], 0)[0] == []


def test_wake_after_close_is_harmless(hints: Hints) -> None:
    hints.close()
    hints.wake()


def test_the_loop_finds_everything_that_another_process_writes(hints: Hints, tmp_path: Path) -> None:
    scanner = Scanner(tmp_path, match=["*.mib"], active_s=0.02, recent_s=0.05, whole_s=0.2)
    found: list[bytes] = []
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    deadline = time.monotonic() + 30
    while len(found) < 300 and time.monotonic() < deadline:
        dirty = hints.wait(max(0.0, min(1.0, scanner.next_due() - time.monotonic())))
        scanner.mark(dirty, hints.closed())
        found += [s.relpath for s in scanner.scan()]
    assert writer.wait(10) == 0
    assert sorted(found) == sorted(f"{i % 7}/{i}/{j}.mib".encode() for i in range(30) for j in range(10))


def test_rescan_is_not_an_empty_set() -> None:
    assert RESCAN
    assert frozenset() != RESCAN
