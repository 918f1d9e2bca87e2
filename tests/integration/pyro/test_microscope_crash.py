"""kill -9 of the microscope's server at every fsync and rename: nothing is executed twice, and every answer is true."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from emflow.errors import Unavailable
from emflow.microscope import sidecar
from emflow.microscope.answers import Intent
from emflow.microscope.limits import actions_of
from emflow.microscope.protocol import Acquired, Batch, Camera, Command, Outcome, Receipt, Scan4d, Set

pytestmark = [pytest.mark.needs_strace, pytest.mark.timeout(900)]

SCAN = Scan4d(shape=(2, 2), step_nm=1.0, exposure_us=10.0)
ACTIONS = (
    Set(values={"C10_nm": 11.0}),
    SCAN,
    Batch(actions=(Set(values={"C10_nm": 22.0}), Camera(frames=2, exposure_us=1.0), Set(values={"C12a_nm": 3.0}))),
    Set(values={"C10_nm": 1e9}),  # refused, and remembered
)


def strace(*options: str) -> tuple[str, ...]:
    return ("strace", "-f", "-qq", "-o", "strace.log", *options, "--")


def play(scope: Any, order: Callable[..., Command]) -> list[Command]:
    """Send all commands to a server that may die meanwhile; those that were sent."""
    client = scope.client(patience_s=0.0)
    sent: list[Command] = []
    try:
        epoch = client.take_lease().epoch
        for number, action in enumerate(ACTIONS):
            sent.append(order(number, action, epoch=epoch))
            client.execute(sent[-1])
        client.stop("end")
        scope.client("operator", patience_s=0.0).release("end")
    except Unavailable:
        pass
    return sent


def check(scope: Any, order: Callable[..., Command], sent: list[Command]) -> Counter[str]:
    """After a restart: what was told is true, what is sent again is not done again."""
    client, operator = scope.client(), scope.client("operator", "ann")
    before = client.status()
    outcomes: Counter[str] = Counter()
    for command in sent:
        receipt = client.receipt(command.id)
        outcomes[receipt.code if receipt.code == "never-seen" else receipt.outcome.value] += 1
        true(scope, command, receipt, before.controls)
    if before.mode.value == "stopped":
        operator.release("the test goes on")
    epoch = operator.take_lease().epoch
    for number, action in enumerate(ACTIONS):
        command = order(number, action, epoch=epoch)
        again = operator.execute(command)
        assert again.final
        assert operator.execute(command) == again
    begun = Counter(scope.done())
    assert max(begun.values(), default=0) <= 1, begun
    assert max(Counter(scope.done("set")).values()) <= 1, scope.done("set")
    return outcomes


def true(scope: Any, command: Command, receipt: Receipt, controls: dict[str, float]) -> None:
    """Whether a receipt says what the instrument's own log and files say."""
    actions = command.action.actions if isinstance(command.action, Batch) else (command.action,)
    sets = [json.dumps(a.values, sort_keys=True) for a in actions if isinstance(a, Set)]
    begun = [name for name in scope.done() if name.startswith(command.id)]
    notes = [path.name for path in scope.share.glob(f"{command.id}*{sidecar.SUFFIX}")]
    assert sorted(sidecar.sidecar_path(scope.share / a.path).name for a in receipt.acquired) == sorted(notes)
    if receipt.code in ("never-seen", "limits"):
        assert not begun
        assert not set(sets) & set(scope.done("set"))
    elif receipt.outcome is Outcome.DONE:
        assert len(notes) == len(actions) - len(sets)
        assert set(sets) <= set(scope.done("set"))
    else:
        assert (receipt.outcome, receipt.code) == (Outcome.UNKNOWN, "restart")
        assert receipt.after == controls


def sweep(make_scope: Any, order: Any, names: tuple[str, ...], most: int = 1000) -> Counter[str]:
    """Kill at the n-th call of each kind, for every n that a thread reaches while all commands are played."""
    counting = make_scope().start(*strace("-e", f"trace={','.join(names)}"))
    assert len(play(counting, order)) == len(ACTIONS)
    assert counting.end() in (0, -15)
    calls = (counting.folder / "strace.log").read_text()
    outcomes: Counter[str] = Counter()
    for name in names:
        reached = Counter(re.findall(rf"^(\d+) +{name}\(", calls, re.MULTILINE))
        for n in range(1, min(max(reached.values(), default=0), most) + 1):
            scope = make_scope()
            scope.start(*strace("-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={n}"), wait=False)
            sent = play(scope, order) if scope.wait_for_address() else []
            if scope.process.poll() is None and n == max(reached.values()):
                scope.end()  # the last one may be that of the end
            scope.process.wait(20)
            assert scope.process.returncode in (-9, 137), f"the kill at {name} {n} did not fire: {scope.log}"
            scope.configure()
            scope.start()
            outcomes += check(scope, order, sent)
            outcomes["kills"] += 1
            scope.close()
    return outcomes


def test_killed_at_every_fsync_and_rename(make_scope, order) -> None:
    outcomes = sweep(make_scope, order, ("fsync", "rename"))
    assert outcomes["kills"] >= 8
    assert outcomes["done"]
    assert outcomes["unknown"]  # killed between an intent and its act


@pytest.mark.slow
def test_killed_at_every_write(make_scope, order) -> None:
    outcomes = sweep(make_scope, order, ("write",))
    assert outcomes["kills"] >= 15
    assert outcomes["done"]
    assert outcomes["unknown"]
    assert outcomes["never-seen"]  # killed before the intent


def test_torn_last_line_and_damaged_line(scope, order) -> None:
    client = scope.client()
    epoch = client.take_lease().epoch
    receipts = [client.execute(order(n, action, epoch=epoch)) for n, action in enumerate(ACTIONS)]
    scope.kill()
    file = scope.state / "answers.jsonl"
    whole = file.read_bytes()
    for torn in (b'{"line":"int', whole.splitlines()[1], b"\xff"):
        file.write_bytes(whole + torn)
        scope.configure()
        scope.start()
        assert [client.receipt(r.command) for r in receipts] == receipts
        scope.kill()
        assert file.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    scope.configure()
    scope.start(wait=False)
    assert scope.process.wait(20) == 1
    assert "answers.jsonl:3: not a line of the microscope's memory" in scope.log


def test_the_beam_is_blanked_before_anything_else_can_fail(make_scope, order) -> None:
    """A server that was killed in mid-scan has left the beam open; the next one may not even come up."""
    scope = make_scope()
    for folder in (scope.share, scope.state / "backend"):
        folder.mkdir(parents=True)
    command = order(1, SCAN, epoch=1)
    intent = Intent(command=command, doses_e=(4000.0,), before={}, admitted_ns=1, began_ns=2)
    (scope.state / "answers.jsonl").write_bytes(msgspec.json.encode(intent) + b"\n")
    made = Acquired(
        name=command.id, path=f"{command.id}.npy", kind="4d", scan_shape=(2, 2), det_shape=(2, 2), frames=4, dose_e=4e3
    )
    (scope.share / made.path).write_bytes(b"data")
    (scope.state / "backend" / "newest.json").write_bytes(msgspec.json.encode(made))
    (scope.share / f"{command.id}.emflow.json").mkdir()  # so its note can't be written
    scope.start(wait=False)
    assert scope.process.wait(20) != 0
    assert (scope.state / "backend" / "done.log").read_text().splitlines() == ["start", "blank", "close"]


def test_two_servers_of_one_state_folder(make_scope) -> None:
    scope = make_scope().start()
    second = scope.emflow("serve")
    assert second.returncode == 75
    assert f"process {scope.process.pid} serves this microscope" in second.stderr
    scope.kill()
    scope.configure()
    scope.start()  # kill -9 leaves nothing locked
    assert scope.client().status().mode.value == "ready"


def test_what_a_restart_finds(make_scope, order) -> None:
    """Intents without an answer are judged by files and values; the instrument does nothing for it."""
    cases = [
        (Set(values={"C10_nm": 7.0}), Outcome.DONE),
        (Set(values={"C10_nm": 7.4}), Outcome.DONE),  # within the tolerance
        (Set(values={"C10_nm": 8.0}), Outcome.UNKNOWN),
        (SCAN, Outcome.DONE),
        (SCAN, Outcome.UNKNOWN),  # no note
        (Batch(actions=(Set(values={"C10_nm": 99.0}), SCAN)), Outcome.DONE),  # the scan proves the set before it
        (Batch(actions=(SCAN, Set(values={"C10_nm": 99.0}))), Outcome.UNKNOWN),
        (Batch(actions=(SCAN, Set(values={"C10_nm": 99.0}), Set(values={"C10_nm": 7.0}))), Outcome.DONE),
        (Batch(actions=(SCAN, SCAN)), Outcome.UNKNOWN),  # the note of the first only
    ]
    scope = make_scope()
    for folder in (scope.share, scope.state / "backend"):
        folder.mkdir(parents=True)
    (scope.state / "backend" / "controls.json").write_text('{"C10_nm": 7.0, "C12a_nm": 0.0}')
    noted = {3: [""], 5: ["-01"], 6: ["-00"], 7: ["-00"], 8: ["-00"]}
    commands = [order(n, action, epoch=1) for n, (action, _) in enumerate(cases)]
    lines = []
    for n, command in enumerate(commands):
        doses = tuple(0.0 if isinstance(a, Set) else 4000.0 for a in actions_of(command.action))
        intent = Intent(command=command, doses_e=doses, before={}, admitted_ns=1, began_ns=2)
        lines.append(msgspec.json.encode(intent) + b"\n")
        for suffix in noted.get(n, []):
            name = f"{command.id}{suffix}"
            (scope.share / f"{name}.npy").write_bytes(b"data")
            made = Acquired(
                name=name, path=f"{name}.npy", kind="4d", scan_shape=(2, 2), det_shape=(2, 2), frames=4, dose_e=1.0
            )
            sidecar.write(scope.share, sidecar.Sidecar.of(command, made))
    (scope.state / "answers.jsonl").write_bytes(b"".join(lines))
    scope.start()
    client = scope.client()
    receipts = [client.execute(command) for command in commands]
    assert [r.outcome for r in receipts] == [outcome for _, outcome in cases]
    assert {r.reason for r in receipts if r.outcome is Outcome.DONE} == {"confirmed after a restart"}
    assert all(r.after["C10_nm"] == 7.0 for r in receipts)
    assert [len(r.acquired) for r in receipts] == [0, 0, 0, 1, 0, 1, 1, 1, 1]
    assert (receipts[3].acquired[0].dose_e, receipts[8].dose_e) == (4000.0, 8000.0)  # what is not known counts whole
    assert (scope.done(), scope.done("set")) == ([], [])


def test_a_whole_scan_that_got_no_note_gets_it_after_the_restart(make_scope, order) -> None:
    """Killed between the instrument's end and the note: the instrument itself says that the scan is whole."""
    scope = make_scope()
    for folder in (scope.share, scope.state / "backend"):
        folder.mkdir(parents=True)
    command = order(1, SCAN, epoch=1)
    intent = Intent(command=command, doses_e=(4000.0,), before={}, admitted_ns=1, began_ns=2)
    (scope.state / "answers.jsonl").write_bytes(msgspec.json.encode(intent) + b"\n")
    made = Acquired(
        name=command.id, path=f"{command.id}.npy", kind="4d", scan_shape=(2, 2), det_shape=(2, 2), frames=4, dose_e=4e3
    )
    (scope.share / made.path).write_bytes(b"data")
    (scope.state / "backend" / "newest.json").write_bytes(msgspec.json.encode(made))
    scope.start()
    receipt = scope.client().execute(command)
    assert (receipt.outcome, receipt.acquired) == (Outcome.DONE, (made,))
    assert sidecar.read(scope.share / made.path) == sidecar.Sidecar.of(command, made)
    assert scope.done() == []
