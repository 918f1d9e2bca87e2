"""The desk and its worker where threads meet: what begins, what is blanked and what is told in the awkward moments."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from emflow.microscope import sidecar
from emflow.microscope.answers import Answers
from emflow.microscope.client import LeaseKeeper
from emflow.microscope.desk import Desk
from emflow.microscope.happenings import Happenings
from emflow.microscope.lease import Holder
from emflow.microscope.orders import Order
from emflow.microscope.protocol import (
    Acquired,
    Batch,
    Command,
    InstrumentError,
    Lease,
    Outcome,
    Receipt,
    Scan4d,
    Set,
)
from emflow.microscope.server import MicroscopeServer
from emflow.microscope.settings import default
from emflow.microscope.simulated.backend import SimulatedMicroscope
from emflow.microscope.worker import Worker, misplaced

AGENT, OPERATOR = Holder(role="agent", name="a"), Holder(role="operator", name="o")
SCAN = Scan4d(shape=(2, 2), step_nm=1.0, exposure_us=10.0)


class Awkward(SimulatedMicroscope):
    """A simulated microscope that can be disturbed from inside."""

    def __init__(self, folder: Path, state: Path) -> None:
        super().__init__(folder, state, {"detector_shape": [8, 8], "hidden": {"C10_nm": 1.0}})
        self.on_set: Callable[[], Any] = lambda: None
        self.on_open: Callable[[], Any] = lambda: None
        self.stuck = 0
        self.kind, self.dose_factor = "", 1.0
        self.scans = 0

    def set(self, values: Any) -> None:
        super().set(values)
        self.on_set()

    def blank(self, blanked: bool) -> None:
        if self.stuck:
            self.stuck -= 1
            raise InstrumentError("the blanker is stuck")
        super().blank(blanked)
        if not blanked:
            self.on_open()

    def acquire(self, action: Any, name: str, trace: str, abort: threading.Event) -> Acquired:
        self.scans += 1
        made = super().acquire(action, name, trace, abort)
        return msgspec.structs.replace(made, kind=self.kind or made.kind, dose_e=self.dose_factor * made.dose_e)


class Place:
    """A desk without its watcher, whose clock stands still unless it is moved."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1000.0
        self.folder, self.share, self.state = folder, folder / "share", folder / "state"
        for each in (self.share, self.state):
            each.mkdir()
        self.backend = Awkward(self.share, self.state / "backend")
        self.answers, self.events = Answers(self.state), Happenings(self.state)
        settings = default(folder)
        settings = msgspec.structs.replace(
            settings, limits=msgspec.structs.replace(settings.limits, max_total_dose_e=5000.0)
        )
        self.desk = Desk(settings, self.backend, self.answers, self.events, lambda: self.now_s)
        self.desk.beam.settle()
        self.threads: list[threading.Thread] = []

    def command(self, number: int, action: Any, epoch: int) -> Command:
        name = f"e0123456789ab-0000-{number:02d}"
        return Command(id=name, trace=name, action=action, epoch=epoch, not_after_s=1e12)

    def work(self) -> None:
        self.threads.append(Worker(self.desk, self.share))
        self.threads[-1].start()

    def watch(self) -> None:
        self.threads.append(threading.Thread(target=self.desk.watch_lease, daemon=True))
        self.threads[-1].start()

    def done(self, order: Order | Receipt) -> Receipt:
        assert isinstance(order, Order)
        with self.desk.changed:
            assert self.desk.changed.wait_for(lambda: order.receipt is not None, 20)
        assert order.receipt is not None
        return order.receipt

    def close(self) -> None:
        with self.desk.changed:
            self.desk.closing = True
            self.desk.changed.notify_all()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        self.events.close()
        self.answers.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def test_nothing_begins_under_a_lease_that_went_while_the_beam_was_opened(place: Place) -> None:
    taken: list[Lease] = []

    def pre_empted() -> None:
        thread = threading.Thread(target=lambda: taken.append(place.desk.take(OPERATOR)))
        thread.start()
        until = time.monotonic() + 10
        while place.desk.lease.holder != OPERATOR:
            assert time.monotonic() < until
            time.sleep(0.001)
        place.threads.append(thread)

    epoch = place.desk.take(AGENT).epoch
    place.backend.on_open = pre_empted
    order = place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code, place.backend.scans) == (Outcome.ABORTED, "lease", 0)
    place.threads[-1].join(10)
    assert taken[0].epoch == epoch + 1


def test_a_command_whose_lease_is_gone_does_not_open_the_beam_under_that_of_another(place: Place) -> None:
    epoch = place.desk.take(AGENT).epoch
    place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    with place.desk.changed:
        place.desk.running = place.desk.queue.popleft()  # as the worker does
    assert place.desk.take(OPERATOR).epoch == epoch + 1
    place.desk.beam.settle(opening=True)
    assert place.backend.blanked()


def test_a_lease_that_ran_out_counts_before_anybody_watches(place: Place) -> None:
    """A computer that slept: the worker may be the first to wake up."""
    epoch = place.desk.take(AGENT).epoch
    order = place.desk.admit(place.command(1, Set(values={"C10_nm": 5.0}), epoch), AGENT)
    place.now_s += 10.0
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code) == (Outcome.REFUSED, "lease")
    assert (place.backend.read()["C10_nm"], place.backend.blanked(), place.desk.lease.holder) == (0.0, True, None)


def test_a_command_that_waited_too_long_is_not_begun(place: Place) -> None:
    epoch = place.desk.take(AGENT).epoch
    late = msgspec.structs.replace(place.command(1, Set(values={"C10_nm": 5.0}), epoch), not_after_s=place.now_s - 0.5)
    told = place.desk.admit(late, AGENT)  # it isn't even queued
    assert isinstance(told, Receipt)
    assert (told.outcome, told.reason) == (Outcome.EXPIRED, "its time was over 0.500 s ago")
    soon = msgspec.structs.replace(place.command(2, Set(values={"C10_nm": 5.0}), epoch), not_after_s=place.now_s + 5)
    order = place.desk.admit(soon, AGENT)
    place.now_s += 6.0
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code, receipt.began_ns) == (Outcome.EXPIRED, "expired", 0)
    assert place.backend.read()["C10_nm"] == 0.0
    assert place.desk.admit(soon, AGENT) == receipt


def test_an_open_beam_is_blanked_when_the_lease_runs_out_between_two_commands(place: Place) -> None:
    server = MicroscopeServer(place.desk, "awkward", 1)
    epoch = place.desk.take(AGENT).epoch
    place.work()
    assert place.done(place.desk.admit(place.command(1, SCAN, epoch), AGENT)).outcome is Outcome.DONE
    place.now_s += 9.9
    place.desk.lapse()
    assert not place.backend.blanked()
    place.watch()
    place.now_s += 0.1
    until = time.monotonic() + 10
    while server.status()["mode"] != "hold" or not place.backend.blanked():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert server.status()["reason"] == "the lease of agent a ran out"


def test_what_waits_under_an_older_epoch_is_never_begun(place: Place) -> None:
    """The same agent, started again, takes the lease again: what its predecessor sent is fenced off."""
    epoch = place.desk.take(AGENT).epoch
    command = place.command(1, Set(values={"C10_nm": 5.0}), epoch)
    order = place.desk.admit(command, AGENT)
    again = place.desk.take(AGENT).epoch
    place.work()
    receipt = place.done(order)
    assert (again, receipt.outcome, receipt.code) == (epoch + 1, Outcome.REFUSED, "epoch")
    assert place.desk.admit(command, AGENT).code == "epoch"  # type: ignore[union-attr]
    assert place.backend.read()["C10_nm"] == 0.0


@pytest.mark.parametrize("how", ["lease", "stop", "abort"])
def test_a_batch_ends_where_the_lease_or_a_stop_finds_it_in_a_set(place: Place, how: str) -> None:
    epoch = place.desk.take(AGENT).epoch

    def disturb() -> None:
        if how == "lease":
            place.now_s += 10.0
        elif how == "stop":
            place.desk.stop("smoke")
        else:
            place.desk.abort("enough")

    place.backend.on_set = disturb
    batch = Batch(actions=(Set(values={"C10_nm": 5.0}), Set(values={"C10_nm": 6.0}), SCAN))
    order = place.desk.admit(place.command(1, batch, epoch), AGENT)
    place.work()
    receipt = place.done(order)
    code = {"lease": "lease", "stop": "stopped", "abort": "aborted"}[how]
    assert (receipt.outcome, receipt.code, receipt.after["C10_nm"]) == (Outcome.ABORTED, code, 5.0)
    assert (place.backend.scans, place.backend.blanked()) == (0, True)


def test_a_server_that_ends_gives_no_lease_and_leaves_no_beam(place: Place) -> None:
    epoch = place.desk.take(AGENT).epoch
    order = place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    place.work()
    assert place.done(order).outcome is Outcome.DONE
    assert not place.backend.blanked()  # its holder may go on
    with place.desk.changed:
        place.desk.closing = True
        place.desk.changed.notify_all()
    given = place.desk.take(OPERATOR)
    assert (given.epoch, given.code, given.reason) == (0, "busy", "the server ends")
    place.desk.beam.settle()
    assert place.backend.blanked()


def test_a_beam_that_does_not_open_gives_no_dark_scan(place: Place) -> None:
    epoch = place.desk.take(AGENT).epoch
    place.backend.stuck = 1
    order = place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code, place.backend.scans) == (Outcome.FAILED, "instrument", 0)
    assert receipt.reason == "the beam can't be opened: the server's log says why"


def test_a_beam_that_is_not_blanked_by_a_stop_is_told_and_tried_again(place: Place) -> None:
    server = MicroscopeServer(place.desk, "awkward", 1)
    epoch = place.desk.take(AGENT).epoch
    order = place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    place.work()
    place.done(order)
    place.backend.stuck = 1
    place.desk.stop("smoke")
    status = server.status()
    assert (status["mode"], status["blanked"]) == ("stopped", False)
    assert status["reason"] == "smoke; the beam can't be blanked: the server's log says why"
    place.watch()
    until = time.monotonic() + 10
    while not place.backend.blanked():
        assert time.monotonic() < until
        time.sleep(0.01)
    until = time.monotonic() + 10
    while server.status()["reason"] != "smoke":
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_stop_that_a_full_disk_did_not_take_is_recorded_later(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        place.desk.stop("smoke")
    assert "can't be recorded" in MicroscopeServer(place.desk, "awkward", 1).status()["reason"]
    assert b"smoke" not in place.answers.path.read_bytes()
    place.watch()
    until = time.monotonic() + 10
    while place.desk.latch_trouble:
        assert time.monotonic() < until
        time.sleep(0.01)
    again = Answers(place.state)
    assert (again.latch.stopped, again.latch.reason) == (True, "smoke")
    again.close()
    time.sleep(1.5)
    assert place.answers.path.read_bytes().count(b'"latch"') == 1  # once


def test_a_scan_that_is_told_in_no_words_of_ours_is_not_believed(place: Place) -> None:
    """What can't be read back would make the whole memory unreadable at the next start."""
    epoch = place.desk.take(AGENT).epoch
    place.backend.kind = "hologram"
    order = place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code, receipt.acquired) == (Outcome.FAILED, "backend", ())
    assert not list(place.share.glob("*.emflow.json"))
    again = Answers(place.state)
    found = again.find(receipt.command)
    assert found is not None
    assert found.receipt == receipt
    again.close()


@pytest.mark.parametrize("link", ["folder", "file"])
def test_a_scan_behind_a_link_out_of_the_folder_is_not_believed(tmp_path: Path, link: str) -> None:
    share, outside = tmp_path / "share", tmp_path / "outside"
    for each in (share, outside):
        each.mkdir()
    (outside / "x.npy").write_bytes(b"data")
    (share / "in").mkdir()
    (share / "in" / "x.npy").write_bytes(b"data")
    path = {"folder": "out/x.npy", "file": "x.npy"}[link]
    (share / path.split("/")[0]).symlink_to(outside if link == "folder" else outside / "x.npy")
    made = Acquired(name="x", path=path, kind="4d", scan_shape=(1, 1), det_shape=(1, 1), frames=1, dose_e=0.0)
    assert misplaced(share, made, "x") == "the backend wrote outside the folder of scans"
    assert misplaced(share, msgspec.structs.replace(made, path="in/x.npy"), "x") is None


def test_a_batch_ends_where_somebody_has_moved_the_instrument_out_of_reach(place: Place) -> None:
    """What was within one step when it was admitted is not any more: the hand at the panel comes first."""
    epoch = place.desk.take(AGENT).epoch
    by_hand = iter([-2000.0])

    def moved() -> None:
        for value in by_hand:
            place.backend._column.set({"C10_nm": value})

    place.backend.on_set = moved
    batch = Batch(actions=(Set(values={"C10_nm": 100.0}), Set(values={"C10_nm": 200.0})))
    order = place.desk.admit(place.command(1, batch, epoch), AGENT)
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code, receipt.after["C10_nm"]) == (Outcome.FAILED, "limits", -2000.0)
    assert "one step is at most 1500" in receipt.reason


def test_a_batch_ends_when_the_budget_is_spent_sooner_than_planned(place: Place) -> None:
    epoch = place.desk.take(AGENT).epoch
    place.backend.dose_factor = 4.0  # 1200 electrons are planned, and 4800 fall
    order = place.desk.admit(place.command(1, Batch(actions=(SCAN, SCAN)), epoch), AGENT)
    place.work()
    receipt = place.done(order)
    assert (receipt.outcome, receipt.code, len(receipt.acquired)) == (Outcome.FAILED, "limits", 1)
    assert (receipt.dose_e, place.backend.scans, place.answers.spent_e) == (4800.0, 1, 4800.0)
    assert "200 left of 5000" in receipt.reason


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_data_are_on_the_disk_before_their_note_and_the_note_before_the_answer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    real = os.fsync
    note = place.share / "e0123456789ab-0000-01.emflow.json"

    def noting(fd: int) -> None:
        real(fd)
        synced.append((Path(f"/proc/self/fd/{fd}").readlink().name, note.exists()))

    epoch = place.desk.take(AGENT).epoch
    monkeypatch.setattr(os, "fsync", noting)
    order = place.desk.admit(place.command(1, SCAN, epoch), AGENT)
    place.work()
    assert place.done(order).outcome is Outcome.DONE
    assert ("e0123456789ab-0000-01.npy", False) in synced  # under its final name, before the note
    assert synced[-2:] == [("share", True), ("answers.jsonl", True)]
    assert sidecar.read(place.share / "e0123456789ab-0000-01.npy") is not None


def test_keeper_whose_thread_breaks_says_that_the_lease_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from emflow.microscope.client import MicroscopeClient

    def broken(self: Any, epoch: int) -> Lease:
        raise RuntimeError("a bug")

    monkeypatch.setattr(MicroscopeClient, "renew", broken)
    client = MicroscopeClient("127.0.0.1:9", role="agent", name="a", patience_s=0.0)
    keeper = LeaseKeeper(client, Lease(epoch=1, holder="a", ttl_s=0.1))
    assert keeper.lost.wait(5)
    assert "RuntimeError" in keeper.reason
    keeper.close()
    client.close()
    assert "not renewed any more" in caplog.text
