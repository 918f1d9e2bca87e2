"""Lines of events: whole, in order, and readable after a crash or a full disk."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mpi_kernels.errors import FormatError
from mpi_kernels.events import EventLog, host_name, read_events


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with EventLog(tmp_path, "data", "trace", "job") as log:
        first = log.write("claimed", ranks=2)
        second = log.write("written", subject="other", trace="more", text="a\nb\udcff")
    assert log.path.name == f"events-{host_name()}-{os.getpid()}.jsonl"
    found = list(read_events(log.path))
    assert found == [first, second]
    assert [e.seq for e in found] == [0, 1]
    assert (found[1].subject, found[1].trace, found[1].attrs) == ("other", "more", {"text": "a\nb\udcff"})
    assert found[0].mono_ns <= found[1].mono_ns


def test_a_process_id_that_comes_back_goes_on_counting(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with EventLog(tmp_path, "data", "t", "s") as log:
            log.write(name)
    assert [(e.seq, e.name) for e in read_events(log.path)] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_last_line_is_left_out_and_the_next_starts_afresh(tmp_path: Path, cut: int) -> None:
    with EventLog(tmp_path, "data", "t", "s") as log:
        log.write("whole")
        log.write("torn", attrs={"nested": {}})
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert [e.name for e in read_events(log.path)] == ["whole"]
    with EventLog(tmp_path, "data", "t", "s") as log:
        log.write("after")
    names = [e.name for e in read_events(log.path)]
    assert names == (["whole", "torn", "after"] if cut == 1 else ["whole", "after"])


def test_a_whole_line_that_is_no_event_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"v":1,"name":"x"}\n')
    with pytest.raises(FormatError, match="missing"):
        list(read_events(tmp_path / "e.jsonl"))


def test_a_hostile_host_name_stays_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "../../etc/a b")
    with EventLog(tmp_path, "data", "t", "s") as log:
        log.write("x")
    assert log.path.parent == tmp_path
    assert list(tmp_path.iterdir()) == [log.path]
