"""Whatever is sent: nothing outside the envelope ever reaches the instrument, and it is refused by its name."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.microscope.client import LeaseKeeper
from emflow.microscope.protocol import Outcome, Receipt, Scan4d, from_wire, to_wire
from emflow.rpc import Connection, Refused

SCAN = Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=10.0)
NUMBERS = itertools.count()

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-1100, 1100),
    st.integers(),
    st.sampled_from([True, False, None, "1", "nan", [], {}, 1e308, -0.0, 10**400, 1000.0000001, 501.0]),
)
names = st.sampled_from(["C10_nm", "C12a_nm", "stage_x_nm", "C9_nm", "__class__", "", "C10_nm "])
sets = st.builds(lambda values: {"verb": "set", "values": values}, st.dictionaries(names, numbers, max_size=3))
shapes = st.one_of(st.tuples(st.integers(-1, 300), st.integers(-1, 300)), numbers, st.lists(numbers, max_size=3))
scans = st.builds(
    lambda verb, shape, step, time: {"verb": verb, "shape": shape, "step_nm": step, "exposure_us": time},
    st.sampled_from(["scan4d", "scan", "camera", "launch"]), shapes, numbers, numbers,
)  # fmt: skip
singles = st.one_of(sets, scans)
actions = st.one_of(
    singles,
    st.builds(lambda inner: {"verb": "batch", "actions": inner}, st.lists(singles, max_size=4)),
    st.recursive(st.none() | numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(action=actions, expects=st.dictionaries(names, numbers, max_size=1))
def send(server: Connection, epoch: int, action: Any, expects: Any) -> None:
    number = next(NUMBERS)
    wire = {"id": f"e0123456789ab-{number // 100:04d}-{number % 100:02d}", "trace": "t", "action": action,
            "epoch": epoch, "not_after_s": 1e12, "expects": expects}  # fmt: skip
    try:
        receipt = from_wire(Receipt, server.call("execute", wire, 20.0))
    except Refused as error:
        if error.code != "malformed":
            raise
        return
    except TypeError:
        return  # what can't even be sent
    assert receipt.outcome in (Outcome.DONE, Outcome.REFUSED, Outcome.FAILED)
    if receipt.outcome is Outcome.REFUSED:
        assert receipt.code in ("malformed", "limits", "expects")
        assert receipt.reason


def test_nothing_outside_the_envelope_reaches_the_instrument(scope) -> None:
    operator = scope.client("operator", "ann")
    with LeaseKeeper(operator) as keeper:
        send(operator._connection, keeper.epoch)
        assert not keeper.lost.is_set()
    now = {"C10_nm": 0.0, "C12a_nm": 0.0}
    moved = [json.loads(line) for line in scope.done("set")]
    for values in moved:
        for name, value in values.items():
            assert -1000 <= value <= 1000
            assert abs(value - now[name]) <= 500
            now[name] = value
    assert moved, "the fuzz never sent anything that is allowed"
    assert operator.status().mode.value == "hold"
    assert "Traceback" not in scope.log, scope.log


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"C10_nm": math.nan}, "malformed", ("action.values.C10_nm", "nan")),
        ({"C10_nm": math.inf}, "malformed", ("action.values.C10_nm", "inf")),
        ({"C10_nm": True}, "malformed", ("action.values.C10_nm", "True")),
        ({"C10_nm": "5"}, "malformed", ("action.values.C10_nm", "5")),
        ({"C10_nm": None}, "malformed", ("action.values.C10_nm", "None")),
        ({"C10_nm": 1000.5}, "limits", ("C10_nm", "1000.5", "1000")),
        ({"C10_nm": -1e300}, "limits", ("C10_nm", "-1e+300", "-1000")),
        ({"C10_nm": 501.0}, "limits", ("C10_nm", "501.0", "500")),
        ({"stage_x_nm": 1.0}, "limits", ("stage_x_nm", "C10_nm, C12a_nm")),
        ({"C9_nm": 1.0}, "limits", ("C9_nm",)),
        ({}, "limits", ("no control",)),
        ({"C10_nm": 1.0, "C12a_nm": 1e9}, "limits", ("C12a_nm", "1000")),
    ],
)
def test_refused_by_name(scope, order, values: dict[str, Any], code: str, words: tuple[str, ...]) -> None:
    client = scope.client()
    wire = to_wire(order(1, SCAN, epoch=client.take_lease().epoch)) | {"action": {"verb": "set", "values": values}}
    receipt = from_wire(Receipt, client._connection.call("execute", wire, 5.0))
    assert (receipt.outcome, receipt.code) == (Outcome.REFUSED, code)
    assert all(word in receipt.reason for word in words), receipt.reason
    assert scope.done("set") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_nm": 11.0}, ("step_nm", "11.0", "10")),
        ({"step_nm": 0.0}, ("step_nm", "0.0")),
        ({"exposure_us": 2e6}, ("exposure_us", "2000000.0")),
        ({"shape": [512, 512]}, ("frames", "262144", "65536")),
    ],
)
def test_acquisition_refused_by_name(scope, order, change: dict[str, Any], words: tuple[str, ...]) -> None:
    client = scope.client()
    wire = to_wire(order(1, SCAN, epoch=client.take_lease().epoch))
    wire["action"] |= change
    receipt = from_wire(Receipt, client._connection.call("execute", wire, 5.0))
    assert (receipt.outcome, receipt.code) == (Outcome.REFUSED, "limits")
    assert all(word in receipt.reason for word in words), receipt.reason
    assert scope.done() == []


@pytest.mark.parametrize(
    "change",
    [
        {"id": "e0123456789ab"},
        {"id": "../../etc/passwd"},
        {"id": 7},
        {"id": "e0123456789ab-0000-01\n"},
        {"expects": {"C10_nm\n": 0.0}},
        {"epoch": 1.5},
        {"epoch": True},
        {"trace": "a\nb"},
        {"trace": "\ud800"},
        {"trace": "x" * 65},
        {"v": 2},
        {"not_after_s": float("nan")},
        {"expects": {"C10_nm": float("inf")}},
        {"action": {"verb": "batch", "actions": [{"verb": "batch", "actions": []}]}},
        {"action": {"verb": "batch", "actions": []}},
        {"action": {"verb": "set", "values": {"C10_nm": 1.0}, "more": 1}},
        {"surplus": 1},
    ],
)
def test_malformed_commands(scope, order, change: dict[str, Any]) -> None:
    client = scope.client()
    wire = to_wire(order(1, SCAN, epoch=client.take_lease().epoch)) | change
    try:
        receipt = from_wire(Receipt, client._connection.call("execute", wire, 5.0))
    except UnicodeEncodeError:
        pytest.skip("a lone surrogate can't even be sent by this client")
    assert (receipt.outcome, receipt.code, receipt.final) == (Outcome.REFUSED, "malformed", False)
    assert receipt.reason
    assert scope.done() == []


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("events", (0, 10**400)),
        ("events", (10**400, -(10**400))),
        ("events", (0, "x")),
        ("receipt", ("e0123456789ab-0000-01", 10**400)),
        ("receipt", ("\x1b[2J" * 1000, None)),
        ("lease", ("renew", 10**400)),
        ("lease", ("give_back", True)),
        ("lease", (["take"], 0)),
        ("execute", (7, float("nan"))),
        ("abort", ({"a": 1},)),
    ],
)
def test_odd_arguments_are_no_bug_of_the_server(scope, method: str, arguments: tuple[Any, ...]) -> None:
    client = scope.client()
    client.take_lease()  # so that there is an event, and nothing waits for one
    server, said = client._connection, "answered"
    try:
        server.call(method, *arguments)
    except Refused as error:
        said = error.code
    assert said in ("answered", "malformed")
    assert "Traceback" not in scope.log, scope.log
