"""The log: whole lines only, each on the disk, none changed."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow.agent.log import LOG_FILE, ExperimentLog, LogError, read_log
from emflow.agent.protocol import Decision, Ending
from emflow.agent.records import Decided, Ended, Received, Recovered, Resumed, Seen, Told, planned
from emflow.microscope.protocol import Batch, Outcome, Receipt, Scan, Scan4d, Set

SCAN = Scan(shape=(4, 4), step_nm=0.1, dwell_us=1.5)
RECORDS = (
    Resumed(host="here", pid=7),
    Seen(job="0" * 16 + "-01", acquisition="0" * 16, command="", path="a/b", scalars={"x": {"y": None, "z": 0.1}}),
    Decided(
        number=0,
        by="policy",
        based_on=(),
        settings={"C10_nm": -0.0},
        decision=Decision(reason="\u2026\U0001f600 \n", actions=(SCAN, Set(values={"C10_nm": 1e-300}))),
        commands=planned("e0123456789ab", 0, (SCAN, Set(values={"C10_nm": 1e-300}))),
    ),
    Told(what="pause", by="anna", number=0),
    Received(receipt=Receipt(command="x", outcome=Outcome.DONE, after={"C10_nm": 1 / 3})),
    Recovered(number=0, reason="", settings={}, afresh=False),
    Ended(ending=Ending.TARGET, reason="there"),
)


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    with ExperimentLog(tmp_path) as log:
        log.append(RECORDS[0], active_s=1.5)
        log.append(*RECORDS[1:], active_s=2.0)
        written = list(log.lines)
    assert read_log(tmp_path / LOG_FILE) == written
    assert [line.record for line in written] == list(RECORDS)
    assert [line.active_s for line in written] == [1.5] + [2.0] * (len(RECORDS) - 1)
    with ExperimentLog(tmp_path) as again:
        assert again.lines == written
        again.append(RECORDS[0])
    assert len(read_log(tmp_path / LOG_FILE)) == len(RECORDS) + 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("log")
    with ExperimentLog(folder) as log:
        log.append(*RECORDS)
    return (folder / LOG_FILE).read_bytes()


def test_cut_anywhere_leaves_the_whole_lines(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / LOG_FILE
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert len(read_log(path)) == lines
        with ExperimentLog(tmp_path) as log:
            assert len(log.lines) == lines
            log.append(RECORDS[0])
        assert [line.record for line in read_log(path)] == [*RECORDS[:lines], RECORDS[0]]


@given(data=st.data())
def test_any_other_change_is_told(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("changed") / LOG_FILE
    at = data.draw(st.integers(0, len(whole) - 2))
    value = data.draw(st.integers(0, 255).filter(lambda b: b != whole[at] and bytes([b]) != b"\n"))
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    if whole[at : at + 1] == b"\n" and at > whole.rfind(b"\n", 0, at + 1):
        return
    with pytest.raises(LogError):
        read_log(path)


def test_lines_that_change_places(tmp_path: Path, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    path = tmp_path / LOG_FILE
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(LogError, match=r":1: this line"):
        read_log(path)


def test_a_trace_is_that_of_the_scan_that_follows() -> None:
    move, batch = Set(values={"C10_nm": 1.0}), Batch(actions=(Set(values={"C10_nm": 1.0}), SCAN))
    four = Scan4d(shape=(2, 2), step_nm=1.0, exposure_us=1.0)
    commands = planned("e0123456789ab", 3, (move, move, SCAN, move, four, batch, Batch(actions=(move,)), move))
    ids = [f"e0123456789ab-0003-{n:02d}" for n in range(8)]
    assert [c.id for c in commands] == ids
    assert [c.trace for c in commands] == [ids[2]] * 3 + [ids[4]] * 2 + [ids[5], ids[6], ids[7]]


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Files may not grow beyond a size: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("left", [0, 1, 25])
def test_a_full_disk_leaves_whole_lines(tmp_path: Path, left: int) -> None:
    with ExperimentLog(tmp_path) as log:
        log.append(RECORDS[0])
        before = log.path.read_bytes()
        with room(len(before) + left), pytest.raises(LogError, match="can't be written down"):
            log.append(*RECORDS[1:3])
        assert log.path.read_bytes() == before
        assert len(log.lines) == 1
        log.append(RECORDS[-1])
        assert [line.record for line in read_log(log.path)] == [RECORDS[0], RECORDS[-1]]
