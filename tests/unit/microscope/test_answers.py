"""The server's memory: what is written is there again, torn or not."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from emflow import rpc_wire
from emflow.errors import Busy, JournalError
from emflow.microscope.answers import Answer, Answers, Epoch, Intent, Latch, digest_of, refused
from emflow.microscope.happenings import AT_ONCE, Happenings
from emflow.microscope.protocol import Command, Outcome, Receipt, Set
from emflow.microscope.state_lock import StateLock

ACTION = Set(values={"C10_nm": 1.0, "C12a_nm": 2.0})


def named(number: int) -> str:
    return f"e0123456789ab-{number // 100:04d}-{number % 100:02d}"


def intent(number: int) -> Intent:
    command = Command(id=named(number), trace="t", action=ACTION, epoch=1, not_after_s=1.0)
    return Intent(command=command, doses_e=(0.0,), before={"C10_nm": 0.0}, admitted_ns=1, began_ns=2)


def answer(number: int, dose_e: float = 1.5) -> Answer:
    receipt = Receipt(command=named(number), outcome=Outcome.DONE, dose_e=dose_e, reason="ü\u2028")
    return Answer(receipt=receipt, action=digest_of(ACTION))


def test_everything_is_there_again(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    lines = [intent(1), answer(1), intent(2), Epoch(epoch=7, role="agent", holder="a", wall_ns=1), intent(3), answer(3)]
    for line in [*lines, Latch(stopped=True, reason="smoke", wall_ns=1)]:
        answers.append(line)
    assert answers.find(named(1)) == answer(1)
    answers.close()
    again = Answers(tmp_path)
    assert [again.find(named(n)) for n in (1, 2, 3)] == [answer(1), None, answer(3)]
    assert (again.epoch, again.latch.stopped, again.spent_e) == (7, True, 3.0)
    assert again.open_intents == {named(2): intent(2)}
    again.append(answer(2))
    assert (again.find(named(2)), again.open_intents) == (answer(2), {})
    again.close()


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    answers = Answers(tmp_path)
    answers.append(answer(1))
    answers.append(answer(2))
    answers.close()
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Answers(tmp_path)
    assert (again.find(named(1)), again.find(named(2))) == (answer(1), None)
    again.append(answer(3))
    again.close()
    last = Answers(tmp_path)
    assert (last.find(named(3)), last.spent_e) == (answer(3), 3.0)
    last.close()


def test_damage_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers(tmp_path)
    answers.append(answer(1))
    answers.append(answer(2))
    answers.close()
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    with pytest.raises(JournalError, match=r"answers.jsonl:1: not a line"):
        Answers(tmp_path)
    assert path.read_bytes() == b"x" + whole[1:]


def test_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A real one: the limit on the size of files, in a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        answers = Answers(tmp_path)
        answers.append(answer(1))
        size = answers.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        try:
            answers.append(answer(2))
            said = b"it worked"
        except OSError as error:
            said = str(error.errno == errno.EFBIG and answers.find(named(2)) is None).encode()
        os.write(write, said)
        os._exit(0)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(read, 100) == b"True"
    os.close(read)
    again = Answers(tmp_path)
    assert (again.find(named(1)), again.find(named(2))) == (answer(1), None)
    again.close()


def test_a_torn_line_that_could_not_be_cut_off_is_cut_off_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        """The file on a disk that takes half a line, and then nothing, not even a truncation."""

        def __init__(self, file: Any) -> None:
            self.file, self.fails = file, True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:20] if self.fails else data))

        def truncate(self, size: int) -> None:
            if self.fails:
                raise OSError(errno.EIO, "broken")
            self.file.truncate(size)

    def full(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    answers = Answers(tmp_path)
    answers.append(answer(1))
    failing = Failing(answers._file)
    answers._file = failing  # type: ignore[assignment]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                answers.append(answer(2))
    failing.fails = False
    answers.append(answer(3))
    assert (answers.find(named(1)), answers.find(named(2)), answers.find(named(3))) == (answer(1), None, answer(3))
    answers.close()
    again = Answers(tmp_path)
    assert (again.find(named(2)), again.find(named(3))) == (None, answer(3))
    again.close()


def test_what_was_begun_within_the_last_minute_is_known(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    now = msgspec.structs.replace(intent(2), began_ns=time.time_ns())
    for line in (intent(1), now, answer(2)):
        answers.append(line)
    assert answers.recent == []
    answers.close()
    again = Answers(tmp_path)
    assert again.recent == [now]
    again.close()


def test_found_from_many_threads_while_it_grows(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    wrong: list[object] = []

    def look() -> None:
        for number in range(150):
            found = answers.find(named(number % 50))
            if found is not None and found.receipt.command != named(number % 50):
                wrong.append(found)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(50):
        answers.append(answer(number))
    for thread in threads:
        thread.join()
    assert not wrong
    assert answers.find(named(49)) == answer(49)
    answers.close()


def test_digest_is_of_the_action_alone() -> None:
    assert digest_of(ACTION) == digest_of(Set(values={"C12a_nm": 2.0, "C10_nm": 1.0}))
    assert digest_of(ACTION) != digest_of(Set(values={"C10_nm": 1.0}))


def test_refusals_that_are_not_remembered() -> None:
    assert not refused("x", "lease", "").final
    assert refused("x", "limits", "").final


def test_event_numbers_go_on_over_restarts(tmp_path: Path) -> None:
    first = Happenings(tmp_path)
    for number in range(AT_ONCE + 5):
        first.write("began", f"c{number}", "t")
    events, following = first.after(0, 0.0)
    assert (len(events), following) == (AT_ONCE, AT_ONCE)
    rest, end = first.after(following, 0.0)
    assert ([e["subject"] for e in rest], end) == ([f"c{n}" for n in range(AT_ONCE, AT_ONCE + 5)], AT_ONCE + 5)
    first.close()
    second = Happenings(tmp_path)
    second.write("ended", "after", "t")
    events, end = second.after(AT_ONCE + 3, 0.0)
    assert [e["subject"] for e in events] == [f"c{AT_ONCE + 3}", f"c{AT_ONCE + 4}", "after"]
    assert second.after(end, 0.0) == ([], end)
    second.close()


def test_long_events_come_in_more_replies(tmp_path: Path) -> None:
    """Whatever people write into their reasons, a reply fits into a message."""
    events = Happenings(tmp_path)
    for number in range(520):
        events.write("stopped", "microscope", "", reason="\U0001f600" * 564, n=number)
    seen: list[int] = []
    number, following = -1, 0
    while following != number:
        number = following
        found, following = events.after(number, 0.0)
        assert len(rpc_wire.pack({"events": found, "next": following})) <= rpc_wire.MAX_MESSAGE
        seen += [event["attrs"]["n"] for event in found]
    assert seen == list(range(520))
    events.close()


def test_one_server_for_one_folder(tmp_path: Path) -> None:
    with StateLock(tmp_path):
        with pytest.raises(Busy, match=f"process {os.getpid()} serves") as raised:
            StateLock(tmp_path)
        assert (raised.value.pid, raised.value.exit_code) == (os.getpid(), 75)
    with StateLock(tmp_path):
        pass
