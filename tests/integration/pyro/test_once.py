"""One command is executed once: the same id many times, dying clients, cut connections, servers that end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from emflow.errors import Unavailable
from emflow.microscope import sidecar
from emflow.microscope.protocol import Batch, Camera, Mode, Outcome, Scan, Scan4d, Set, to_wire

SCAN = Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=10.0)
CAMERA = Camera(frames=3, exposure_us=10.0)


def test_a_scan_with_its_note_and_its_events(scope, order) -> None:
    client = scope.client()
    epoch = client.take_lease().epoch
    batch = Batch(actions=(Set(values={"C10_nm": 100.0}), SCAN, Set(values={"C12a_nm": -5.0}), CAMERA))
    command = order(1, batch, epoch=epoch, expects={"C10_nm": 0.3})
    receipt = client.execute(command)
    assert (receipt.outcome, receipt.reason) == (Outcome.DONE, "")
    assert (receipt.before["C10_nm"], receipt.after["C10_nm"], receipt.after["C12a_nm"]) == (0.0, 100.0, -5.0)
    assert [one.name for one in receipt.acquired] == [f"{command.id}-01", f"{command.id}-03"]
    assert receipt.dose_e == 19000.0 == client.status().dose_e
    assert receipt.admitted_ns <= receipt.began_ns <= receipt.ended_ns
    for one in receipt.acquired:
        note = sidecar.read(scope.share / one.path)
        assert (note.command, note.trace, note.complete) == (command.id, "trace", True)
        assert np.load(scope.share / one.path).shape == (*note.scan_shape, *note.det_shape)
        assert sidecar.command_of(one.path.encode()) == command.id
    events, following = client.events(0)
    of_it = [event for event in events if event.subject == command.id]
    assert [event.name for event in of_it] == ["admitted", "began", "written", "noted", "written", "noted", "ended"]
    assert {(event.trace, event.plane) for event in of_it} == {("trace", "control")}
    assert of_it[-1].attrs == {"outcome": "done", "code": ""}
    assert client.events(following) == ([], following)


def test_the_same_id_five_times_at_once(make_scope, order) -> None:
    scope = make_scope(seconds=0.5).start()
    holder = scope.client()
    command = order(1, SCAN, epoch=holder.take_lease().epoch)
    clients = [holder, *(scope.client() for _ in range(4))]
    with ThreadPoolExecutor(5) as pool:
        receipts = list(pool.map(lambda client: client.execute(command), clients))
    assert len({receipt.ended_ns for receipt in receipts}) == 1
    assert receipts[0].outcome is Outcome.DONE
    assert scope.done() == [command.id]
    assert holder.execute(command) == receipts[0] == holder.receipt(command.id)
    assert scope.done() == [command.id]


def test_another_action_under_a_used_id_is_refused_and_the_first_answer_stands(scope, order) -> None:
    client = scope.client()
    epoch = client.take_lease().epoch
    first = client.execute(order(1, Set(values={"C10_nm": 5.0}), epoch=epoch))
    second = client.execute(order(1, Set(values={"C10_nm": 6.0}), epoch=epoch))
    assert (second.outcome, second.code) == (Outcome.REFUSED, "id-reused")
    assert client.receipt(first.command) == first
    assert client.status().controls["C10_nm"] == 5.0


def test_never_seen_is_said_and_not_remembered(scope, order) -> None:
    client = scope.client()
    command = order(1, SCAN, epoch=client.take_lease().epoch)
    receipt = client.receipt(command.id)
    assert (receipt.code, receipt.final) == ("never-seen", False)
    assert client.execute(command).outcome is Outcome.DONE


def test_client_killed_in_mid_call(make_scope, order) -> None:
    scope = make_scope(seconds=1.0).start()
    client = scope.client()
    command = order(1, SCAN, epoch=client.take_lease().epoch)
    code = (
        "import sys, json; from emflow.microscope.client import MicroscopeClient;"
        "from emflow.microscope.protocol import Command, from_wire;"
        "c = MicroscopeClient(sys.argv[1], role='agent', name='one');"
        "print('sends', flush=True); c.execute(from_wire(Command, json.loads(sys.argv[2])))"
    )
    import json

    arguments = [sys.executable, "-c", code, scope.address, json.dumps(to_wire(command))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout.readline() == "sends\n"
        until = time.monotonic() + 10
        while client.status().mode is not Mode.BUSY and time.monotonic() < until:
            time.sleep(0.01)
        victim.kill()
    assert client.receipt(command.id).outcome is Outcome.RUNNING
    assert client.execute(command).outcome is Outcome.DONE  # it waits for the one that runs
    assert scope.done() == [command.id]


def cut_in_mid_command(scope, relay, order, seconds: float, *, cut_s: float) -> None:
    client = scope.client(patience_s=cut_s + 20)
    way = relay(scope.port)
    far = scope.client(address=way.address, patience_s=cut_s + 20)
    command = order(1, SCAN, epoch=client.take_lease().epoch)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(far.execute, command)
        until = time.monotonic() + 10
        while client.status().mode is not Mode.BUSY and time.monotonic() < until:
            time.sleep(0.01)
        way.cut()
        time.sleep(cut_s)
        way.mend()
        receipt = answer.result(60)
    assert receipt.outcome is Outcome.DONE
    assert scope.done() == [command.id]


@pytest.mark.parametrize("cut_s", [0.05, 1.5])
def test_connection_cut(make_scope, relay, order, cut_s: float) -> None:
    cut_in_mid_command(make_scope(seconds=0.7).start(), relay, order, 0.7, cut_s=cut_s)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("cut_s", [10.0, 60.0])
def test_connection_cut_for_long(make_scope, relay, order, cut_s: float) -> None:
    cut_in_mid_command(make_scope(seconds=2.0).start(), relay, order, 2.0, cut_s=cut_s)


def test_reply_lost_after_the_command_ended(scope, relay, order) -> None:
    """The request goes through, the reply does not: it is asked for, not sent again."""
    way = relay(scope.port)
    near, far = scope.client(), scope.client(address=way.address)
    command = order(1, Set(values={"C10_nm": 7.0}), epoch=near.take_lease().epoch)
    assert far.status().controls["C10_nm"] == 0.0
    stop = threading.Event()

    def cutting() -> None:
        while not stop.is_set():
            if near.receipt(command.id).code != "never-seen":
                way.cut()
                stop.set()

    thread = threading.Thread(target=cutting)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(far.execute, command)
        thread.join(10)
        time.sleep(0.2)
        way.mend()
        assert answer.result(20).outcome is Outcome.DONE
    assert scope.done("set") == ['{"C10_nm": 7.0}']


def test_server_killed_and_started_again_in_mid_command(make_scope, order) -> None:
    scope = make_scope(seconds=5.0).start()
    client = scope.client()
    command = order(1, Batch(actions=(Set(values={"C10_nm": 3.0}), SCAN)), epoch=client.take_lease().epoch)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.execute, command)
        until = time.monotonic() + 10
        while not scope.done() and time.monotonic() < until:
            time.sleep(0.01)
        scope.kill()
        scope.configure(seconds=0.0)
        scope.start()
        receipt = answer.result(30)
    assert (receipt.outcome, receipt.code) == (Outcome.UNKNOWN, "restart")
    assert (receipt.before["C10_nm"], receipt.after["C10_nm"], receipt.acquired) == (0.0, 3.0, ())
    assert scope.done() == [f"{command.id}-01"]
    assert client.execute(command) == receipt
    names = [e.name for e in client.events(0)[0] if e.subject == command.id]
    assert names == ["admitted", "began", "ended"]  # events go on over the restart


def test_server_hangs_and_goes_on(make_scope, order) -> None:
    scope = make_scope(lease_s=30.0).start()
    client = scope.client()
    command = order(1, SCAN, epoch=client.take_lease().epoch)
    scope.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.execute, command)
            time.sleep(0.5)
            assert not answer.done()
            scope.process.send_signal(signal.SIGCONT)
            assert answer.result(20).outcome is Outcome.DONE
    finally:
        scope.process.send_signal(signal.SIGCONT)
    assert scope.done() == [command.id]


def test_no_server(scope, order) -> None:
    client = scope.client(patience_s=0.3)
    epoch = client.take_lease().epoch
    scope.kill()
    began = time.monotonic()
    with pytest.raises(Unavailable, match="no answer from"):
        client.execute(order(1, SCAN, epoch=epoch))
    assert 0.3 <= time.monotonic() - began < 5


def test_expired_and_expects(scope, order) -> None:
    client = scope.client()
    lease = client.take_lease()
    late = client.execute(order(1, SCAN, epoch=lease.epoch, not_after_s=lease.now_s - 1))
    assert (late.outcome, late.final) == (Outcome.EXPIRED, True)
    elsewhere = client.execute(order(2, SCAN, epoch=lease.epoch, expects={"C10_nm": 0.6}))
    assert (elsewhere.outcome, elsewhere.code) == (Outcome.REFUSED, "expects")
    assert "C10_nm" in elsewhere.reason
    assert client.execute(order(3, SCAN, epoch=lease.epoch, expects={"C9_nm": 0.0})).code == "expects"
    assert scope.done() == []
    assert client.receipt(late.command) == late
    assert client.receipt(elsewhere.command) == elsewhere


def test_answers_are_remembered_over_a_restart(scope, order) -> None:
    client = scope.client()
    epoch = client.take_lease().epoch
    commands = [order(1, SCAN, epoch=epoch), order(2, Set(values={"C10_nm": 9e9}), epoch=epoch)]
    receipts = [client.execute(command) for command in commands]
    assert [r.code for r in receipts] == ["", "limits"]
    scope.kill()
    scope.configure()
    scope.start()
    assert [client.execute(command) for command in commands] == receipts
    assert client.status().dose_e == 16000.0
    assert scope.done() == [commands[0].id]


@pytest.mark.parametrize(
    ("refuse", "outcome", "code", "reason"),
    [
        ("acquire", Outcome.FAILED, "instrument", "the camera is warm"),
        ("dose", Outcome.REFUSED, "limits", "frames: too many for this camera"),
        ("bug", Outcome.FAILED, "backend", "RuntimeError in the backend; the server's log says more"),
    ],
)
def test_instrument_that_fails(make_scope, order, refuse: str, outcome: Outcome, code: str, reason: str) -> None:
    scope = make_scope(refuse=refuse).start()
    client = scope.client()
    epoch = client.take_lease().epoch
    receipt = client.execute(order(1, SCAN, epoch=epoch))
    assert (receipt.outcome, receipt.code, receipt.reason) == (outcome, code, reason)
    assert client.execute(order(2, Set(values={"C10_nm": 1.0}), epoch=epoch)).outcome is Outcome.DONE  # it goes on
    assert ("/a/secret/path" in scope.log) == (refuse == "bug")


def test_first_action_that_fails_ends_a_batch(make_scope, order) -> None:
    scope = make_scope(refuse="set").start()
    client = scope.client()
    batch = Batch(actions=(CAMERA, Set(values={"C10_nm": 1.0}), Scan(shape=(2, 2), step_nm=1.0, dwell_us=1.0)))
    receipt = client.execute(order(1, batch, epoch=client.take_lease().epoch))
    assert (receipt.outcome, receipt.code, receipt.reason) == (Outcome.FAILED, "instrument", "the lens is cold")
    assert [one.kind for one in receipt.acquired] == ["stack"]
    assert receipt.dose_e == 3000.0
    assert len(scope.done()) == 1


@pytest.mark.parametrize("path", ["../elsewhere.npy", "/etc/passwd", "other.npy", "a\\b.npy"])
def test_backend_that_names_another_file_is_not_believed(make_scope, order, path: str) -> None:
    scope = make_scope(misplace=path).start()
    client = scope.client()
    receipt = client.execute(order(1, SCAN, epoch=client.take_lease().epoch))
    assert (receipt.outcome, receipt.code) == (Outcome.FAILED, "backend")
    assert not list(Path(scope.folder).rglob("*.emflow.json"))


def test_control_that_reads_nan(make_scope, order) -> None:
    scope = make_scope(nan=True).start()
    client = scope.client()
    epoch = client.take_lease().epoch
    assert "C12a_nm" not in client.status().controls
    assert client.execute(order(1, SCAN, epoch=epoch)).outcome is Outcome.DONE
    refused = client.execute(order(2, Set(values={"C12a_nm": 1.0}), epoch=epoch))
    assert (refused.code, "C12a_nm" in refused.reason) == ("limits", True)
    scope.kill()
    scope.configure(nan=True)
    scope.start()
    assert client.receipt(refused.command) == refused
