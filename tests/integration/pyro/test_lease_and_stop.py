"""Lease, STOP and abort: who may command, and how everything ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from emflow import rpc_wire
from emflow.errors import NotAllowed
from emflow.microscope.client import LeaseKeeper
from emflow.microscope.protocol import OBJECT, Batch, Mode, Outcome, Scan4d, Set, Status
from emflow.rpc import Refused

SCAN = Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=10.0)


def until(status: Callable[[], Status], holds: Callable[[Status], bool], timeout_s: float = 10.0) -> Status:
    """The first status of which something holds."""
    end = time.monotonic() + timeout_s
    while not holds(found := status()):
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


def busy(status: Status) -> bool:
    return status.mode is Mode.BUSY


def test_who_gets_it(scope, order) -> None:
    one, other = scope.client(name="one"), scope.client(name="two")
    viewer, operator = scope.client("viewer", "eve"), scope.client("operator", "ann")
    assert (viewer.take_lease().epoch, viewer.take_lease().code) == (0, "not-allowed")
    first = one.take_lease()
    assert (first.holder, first.ttl_s) == ("one", 5.0)
    denied = other.take_lease()
    assert (denied.epoch, denied.code) == (0, "lease")
    assert "agent one holds it" in denied.reason
    again = one.take_lease()
    assert again.epoch == first.epoch + 1
    assert one.renew(first.epoch).code == "epoch"  # fenced
    assert one.renew(again.epoch).epoch == again.epoch
    assert other.renew(again.epoch).code == "lease"  # not theirs
    assert scope.client("operator", "one").execute(order(1, SCAN, epoch=again.epoch)).code == "lease"
    taken = operator.take_lease()  # an operator pre-empts
    assert taken.epoch == again.epoch + 1
    assert one.renew(again.epoch).code == "epoch"
    assert one.take_lease().code == "lease"
    assert scope.client("operator", "bob").take_lease().epoch == taken.epoch + 1


def test_commands_need_it(scope, order) -> None:
    client = scope.client()
    command = order(1, SCAN, epoch=1)
    assert client.execute(command).code in ("lease", "epoch")
    lease = client.take_lease()
    assert client.execute(order(1, SCAN, epoch=lease.epoch + 1)).code == "epoch"
    assert scope.client("viewer").execute(order(1, SCAN, epoch=lease.epoch)).code == "not-allowed"
    assert scope.done() == []
    assert client.execute(order(1, SCAN, epoch=lease.epoch)).outcome is Outcome.DONE  # none of them was remembered


def test_epoch_rises_over_restarts(scope) -> None:
    epochs = []
    for _ in range(3):
        epochs += [scope.client(name=f"a{len(epochs)}", role="operator").take_lease().epoch for _ in range(2)]
        scope.kill()
        scope.configure()
        scope.start()
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("on_lease_lost", ["finish", "abort"])
def test_lost_while_a_scan_runs(make_scope, order, on_lease_lost: str) -> None:
    scope = make_scope(seconds=1.2, lease_s=0.4, on_lease_lost=on_lease_lost).start()
    client, viewer = scope.client(), scope.client("viewer")
    epoch = client.take_lease().epoch
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.execute, order(1, SCAN, epoch=epoch))
        until(viewer.status, busy)
        waiting = pool.submit(scope.client().execute, order(2, SCAN, epoch=epoch))
        refused = waiting.result(5)
        receipt = running.result(5)
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "lease")
    if on_lease_lost == "finish":
        assert (receipt.outcome, len(receipt.acquired)) == (Outcome.DONE, 1)
    else:
        assert (receipt.outcome, receipt.code, receipt.acquired) == (Outcome.ABORTED, "lease", ())
    status = until(viewer.status, lambda s: s.mode is Mode.HOLD)
    assert (status.blanked, status.holder, status.lease_left_s) == (True, "", 0.0)
    assert "ran out" in status.reason
    assert client.renew(epoch).code == "lease"
    assert client.execute(order(3, SCAN, epoch=epoch)).code == "lease"
    # the same role resumes, and the next acquisition opens the beam
    with LeaseKeeper(client) as keeper:
        assert keeper.epoch > epoch
        status = viewer.status()
        assert (status.mode, status.blanked) == (Mode.READY, True)
        assert client.execute(order(4, Set(values={"C10_nm": 1.0}), epoch=keeper.epoch)).outcome is Outcome.DONE
        assert viewer.status().blanked
        again = client.execute(order(2, SCAN, epoch=keeper.epoch))  # what was queued was never done: its id is free
        assert (again.outcome, viewer.status().blanked) == (Outcome.DONE, False)
    assert until(viewer.status, lambda s: s.mode is Mode.HOLD).blanked  # given back


def test_lost_lease_ends_a_batch_after_the_scan_that_runs(make_scope, order) -> None:
    scope = make_scope(seconds=0.8, lease_s=0.3).start()
    client = scope.client()
    batch = Batch(actions=(SCAN, Set(values={"C10_nm": 1.0})))
    receipt = client.execute(order(1, batch, epoch=client.take_lease().epoch))
    assert (receipt.outcome, receipt.code, len(receipt.acquired)) == (Outcome.ABORTED, "lease", 1)
    assert (scope.done("set"), client.status().blanked) == ([], True)


def test_operator_pre_empts_a_running_agent(make_scope, order) -> None:
    scope = make_scope(seconds=30.0, on_lease_lost="abort").start()
    client, operator = scope.client(), scope.client("operator", "ann")
    epoch = client.take_lease().epoch
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.execute, order(1, SCAN, epoch=epoch))
        until(operator.status, busy)
        assert operator.take_lease().epoch > epoch
        receipt = running.result(5)
    assert (receipt.outcome, receipt.code) == (Outcome.ABORTED, "lease")
    assert "operator ann took the lease" in receipt.reason
    status = until(operator.status, lambda s: not busy(s))
    assert (status.mode, status.holder) == (Mode.READY, "ann")


def test_keeper_renews_while_a_long_command_runs(make_scope, order) -> None:
    scope = make_scope(seconds=1.5, lease_s=0.4).start()
    client = scope.client()
    with LeaseKeeper(client) as keeper:
        assert client.execute(order(1, SCAN, epoch=keeper.epoch)).outcome is Outcome.DONE
        assert not keeper.lost.is_set()
        assert client.status().mode is Mode.READY
    with pytest.raises(Refused, match="agent two holds it"), LeaseKeeper(scope.client(name="two")):
        LeaseKeeper(client)


def test_keeper_tells_that_it_is_lost(make_scope) -> None:
    scope = make_scope(lease_s=0.5).start()
    keeper = LeaseKeeper(scope.client())
    scope.client("operator", "ann").take_lease()
    assert keeper.lost.wait(3)
    assert "operator ann" in keeper.reason
    keeper.close()
    keeper = LeaseKeeper(scope.client("operator", "ann"))
    scope.kill()  # no answer for as long as it lasts
    assert keeper.lost.wait(3)
    keeper.close()


def test_keeper_of_a_server_that_hangs(make_scope) -> None:
    scope = make_scope(lease_s=0.6).start()
    keeper = LeaseKeeper(scope.client())
    os.kill(scope.pid, signal.SIGSTOP)
    try:
        assert keeper.lost.wait(3)
    finally:
        os.kill(scope.pid, signal.SIGCONT)
    keeper.close()


def test_stop_ends_everything_and_latches_over_a_restart(make_scope, order) -> None:
    scope = make_scope(seconds=60.0).start()
    client, viewer, operator = scope.client(), scope.client("viewer", "eve"), scope.client("operator", "ann")
    with LeaseKeeper(client) as keeper, ThreadPoolExecutor(3) as pool:
        running = pool.submit(client.execute, order(1, SCAN, epoch=keeper.epoch))
        until(scope.done, bool)  # busy is told a moment before the instrument begins
        waiting = [pool.submit(scope.client().execute, order(n, SCAN, epoch=keeper.epoch)) for n in (2, 3)]
        until(viewer.status, lambda s: s.queued == 2)
        began = time.monotonic()
        viewer.stop("smoke")  # anybody may
        receipts = [future.result(5) for future in (running, *waiting)]
        assert time.monotonic() - began < 2
        assert [(r.outcome, r.code) for r in receipts] == [(Outcome.ABORTED, "stopped")] + 2 * [
            (Outcome.REFUSED, "stopped")
        ]
        status = viewer.status()
        assert (status.mode, status.blanked, status.queued) == (Mode.STOPPED, True, 0)
        assert status.reason == "viewer eve: smoke"
        assert client.execute(order(4, SCAN, epoch=keeper.epoch)).code == "stopped"
        with pytest.raises(NotAllowed, match="only an operator"):
            client.release("please")
        with pytest.raises(NotAllowed, match="only an operator"):
            viewer.release("please")
    scope.kill()
    scope.configure()
    scope.start()
    status = viewer.status()
    assert (status.mode, status.reason, status.blanked) == (Mode.STOPPED, "viewer eve: smoke", True)
    epoch = client.take_lease().epoch
    assert client.execute(order(5, SCAN, epoch=epoch)).code == "stopped"
    assert operator.release("looked at it").mode is Mode.READY
    assert client.execute(order(5, SCAN, epoch=epoch)).outcome is Outcome.DONE
    scope.kill()
    scope.configure()
    scope.start()
    assert viewer.status().mode is Mode.READY
    assert scope.done() == [order(n, SCAN, epoch=1).id for n in (1, 5)]


def test_abort_ends_one_command_and_the_next_follows(make_scope, order) -> None:
    scope = make_scope(seconds=3.0).start()
    client, viewer = scope.client(), scope.client("viewer")
    with LeaseKeeper(client) as keeper, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.execute, order(1, SCAN, epoch=keeper.epoch))
        until(viewer.status, busy)
        second = pool.submit(scope.client().execute, order(2, Set(values={"C10_nm": 4.0}), epoch=keeper.epoch))
        until(viewer.status, lambda s: s.queued == 1)
        with pytest.raises(NotAllowed):
            viewer.abort("bored")
        client.abort("enough")
        assert (first.result(2).outcome, first.result().reason) == (Outcome.ABORTED, "agent one: enough")
        assert second.result(2).outcome is Outcome.DONE
        assert client.abort("nothing runs").mode is Mode.READY
    assert not list(scope.share.glob("*.emflow.json"))
    assert client.receipt(first.result().command) == first.result()  # final


def test_fast_lane_does_not_wait_for_the_scan(make_scope, order) -> None:
    scope = make_scope(seconds=5.0).start()
    client, viewer = scope.client(), scope.client("viewer")
    with LeaseKeeper(client) as keeper, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.execute, order(1, SCAN, epoch=keeper.epoch))
        until(viewer.status, busy)
        began = time.monotonic()
        for _ in range(20):
            assert viewer.status().mode is Mode.BUSY
            viewer.limits()
            viewer.events(0)
            viewer.receipt(order(1, SCAN, epoch=1).id)
            assert client.renew(keeper.epoch).epoch == keeper.epoch
        assert time.monotonic() - began < 2.0
        assert not running.done()
        client.abort("seen enough")
        assert running.result(2).outcome is Outcome.ABORTED
        assert time.monotonic() - began < 4.0


def test_queue_is_bounded(make_scope, order) -> None:
    scope = make_scope(seconds=30.0, max_queue=2).start()
    client = scope.client()
    epoch = client.take_lease().epoch
    with ThreadPoolExecutor(3) as pool:
        futures = []
        for number in (1, 2, 3):
            futures.append(pool.submit(scope.client().execute, order(number, SCAN, epoch=epoch)))
            until(client.status, lambda s, n=number: s.mode is Mode.BUSY and s.queued == n - 1)
        assert client.execute(order(4, SCAN, epoch=epoch)).code == "busy"
        client.stop("done")
        assert len([f.result(5) for f in futures]) == 3


def test_events_are_waited_for(scope, order) -> None:
    client, viewer = scope.client(), scope.client("viewer")
    _, after = viewer.events(0)
    timer = threading.Timer(0.3, client.take_lease)
    timer.start()
    began = time.monotonic()
    events, following = viewer.events(after, wait_s=10.0)
    assert ([e.name for e in events], following) == (["lease"], after + 1)
    assert 0.2 < time.monotonic() - began < 5
    timer.join(10)  # the event is told before the lease is: a client that is closed meanwhile would be a failed thread
    assert viewer.events(10**9)[0]  # another server's number: all that there is


def test_dose_budget_counts_over_a_restart(make_scope, order) -> None:
    scope = make_scope(max_total_dose_e=40_000.0).start()
    client = scope.client()
    epoch = client.take_lease().epoch
    assert client.execute(order(1, SCAN, epoch=epoch)).dose_e == 16_000.0
    scope.kill()
    scope.configure(max_total_dose_e=40_000.0)
    scope.start()
    epoch = client.take_lease().epoch
    assert client.execute(order(2, SCAN, epoch=epoch)).outcome is Outcome.DONE
    over = client.execute(order(3, SCAN, epoch=epoch))
    assert (over.outcome, over.code) == (Outcome.REFUSED, "limits")
    assert "dose_e" in over.reason


def test_moves_per_minute(make_scope, order) -> None:
    scope = make_scope(per_minute=3).start()
    client = scope.client()
    epoch = client.take_lease().epoch
    codes = [client.execute(order(n, Set(values={"C10_nm": float(n)}), epoch=epoch)).code for n in range(1, 6)]
    assert codes == ["", "", "", "limits", "limits"]
    assert client.execute(order(7, Set(values={"C10_nm": 3.0}), epoch=epoch)).code == ""  # no move
    assert scope.done("set")[-1] == '{"C10_nm": 3.0}'


def test_moves_per_minute_over_a_restart(make_scope, order) -> None:
    scope = make_scope(per_minute=3).start()
    client = scope.client()
    epoch = client.take_lease().epoch
    batch = Batch(actions=(Set(values={"C10_nm": 1.0}), Set(values={"C10_nm": 2.0})))
    assert client.execute(order(1, batch, epoch=epoch)).outcome is Outcome.DONE
    scope.kill()
    scope.configure(per_minute=3)
    scope.start()
    epoch = client.take_lease().epoch
    codes = [client.execute(order(n, Set(values={"C10_nm": float(n)}), epoch=epoch)).code for n in (3, 4)]
    assert codes == ["", "limits"]


def test_stop_gets_through_whoever_waits(scope, order) -> None:
    """More clients than there are connections, each in a call that waits as long as it may."""
    pyro5 = rpc_wire.pyro()
    client = scope.client()
    client.stop("before")  # its connection is there: the crowd may push it out
    scope.client("operator", "ann").release("go on")
    _, after = client.events(0)
    crowd = []
    try:
        for _ in range(rpc_wire.CONNECTIONS + 30):
            proxy = pyro5.api.Proxy(f"PYRO:{OBJECT}@{scope.address}")
            proxy._pyroHandshake = {"emflow": 1, "role": "viewer", "name": "crowd"}
            try:
                proxy._pyroBind()
                call = pyro5.serializers.serializers["serpent"].dumpsCall(OBJECT, "events", (after, 30.0), {})
                sent = pyro5.protocol.SendingMessage(pyro5.protocol.MSG_INVOKE, 0, 1, 1, call)
                proxy._pyroConnection.send(sent.data)
            except (pyro5.errors.CommunicationError, OSError):
                continue  # pushed out by the others
            finally:
                crowd.append(proxy)
        began = time.monotonic()
        said = scope.emflow("stop", "--address", scope.address, "-m", "smoke", "--json")
        assert said.returncode == 0, said.stderr
        assert client.stop("smoke").mode is Mode.STOPPED
        assert time.monotonic() - began < 10
    finally:
        for proxy in crowd:
            proxy._pyroRelease()
