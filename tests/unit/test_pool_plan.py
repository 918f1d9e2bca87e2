"""What is done about the pools that there are: a table of situations, and the rules behind it over random ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emflow.records import EndCause
from emflow.schedulers.pool_folder import Closed
from emflow.schedulers.pool_plan import (
    LONGEST_PAUSE_S,
    Plan,
    Seen,
    choose,
    is_old,
    pause_s,
    plan,
    relay_time_s,
    successors,
)

WALLTIME_S, RELAY_S = 3600.0, 300.0


def pool(name: str, standing: Any = "idle", left_s: float | None = 3000.0, **facts: Any) -> Seen:
    return Seen(name=name, standing=standing, ranks=2, walltime_s=WALLTIME_S, left_s=left_s, **facts)


OLD = pool("old", left_s=200.0)


@pytest.mark.parametrize(
    ("pools", "count", "due"),
    [
        ([], 1, Plan(start=1)),
        ([], 3, Plan(start=3)),
        ([pool("a")], 1, Plan()),
        ([pool("a")], 2, Plan(start=1)),
        ([pool("a", "queued", None)], 1, Plan()),
        ([pool("a", "starting", None)], 1, Plan()),
        ([pool("a", "draining")], 1, Plan(start=1)),
        ([pool("a", "silent")], 1, Plan(start=1)),
        ([OLD], 1, Plan(start=1)),
        ([OLD, pool("next", "queued", None)], 1, Plan()),
        ([OLD, pool("next", "starting", None)], 1, Plan()),
        ([OLD, pool("next")], 1, Plan(drain=("old",))),
        ([OLD, pool("next", "working")], 1, Plan(drain=("old",))),
        ([dataclasses.replace(OLD, standing="draining"), pool("next")], 1, Plan()),
        ([OLD, pool("second", left_s=100.0), pool("next")], 2, Plan(start=1, drain=("old",))),
        ([pool("a"), pool("b"), pool("c")], 1, Plan()),  # somebody asked for more
    ],
)
def test_what_is_due(pools: list[Seen], count: int, due: Plan) -> None:
    assert plan(pools, count, RELAY_S) == due


STANDINGS = st.sampled_from(["queued", "starting", "idle", "working", "draining", "silent"])


@st.composite
def situations(draw: st.DrawFn) -> list[Seen]:
    found = []
    for number in range(draw(st.integers(0, 6))):
        standing = draw(STANDINGS)
        left_s = None if standing in ("queued", "starting") else draw(st.floats(0, WALLTIME_S))
        found.append(pool(f"{number}", standing, left_s))
    return found


@settings(deadline=None)
@given(situations(), st.integers(1, 4))
@example([OLD, pool("over", left_s=0.0), pool("next")], 2)
@example([pool("over", left_s=0.0), OLD, pool("next")], 2)
def test_nobody_is_drained_before_somebody_else_takes_tasks(pools: list[Seen], count: int) -> None:
    due = plan(pools, count, RELAY_S)
    taking = [p for p in pools if p.takes]
    left = [p for p in taking if p.name not in due.drain]
    assert len(left) >= min(count, len(taking))
    assert all(is_old(p, RELAY_S) for p in pools if p.name in due.drain)
    young = [p for p in pools if p.standing not in ("draining", "silent") and not is_old(p, RELAY_S)]
    assert len(young) + due.start >= count
    assert not due.start or len(young) + due.start == count


def test_a_relay_time_longer_than_the_walltime_does_not_replace_pools_at_once() -> None:
    assert relay_time_s(60.0, 300.0) == 30.0
    fresh = Seen(name="a", standing="idle", ranks=2, walltime_s=60.0, left_s=59.0)
    assert plan([fresh], 1, 300.0) == Plan()


def test_the_best_pool_has_the_least_to_do_and_then_the_most_time() -> None:
    pools = [pool("a", left_s=100.0), pool("b", left_s=2000.0), pool("c", "working"), pool("d", "draining")]
    names = [p.name for p in choose(pools, 2, {"b": 1, "c": 1})]
    assert names == ["a", "c", "b"]
    assert [p.name for p in choose(pools, 2, {})] == ["c", "b", "a"]
    assert choose(pools, 3, {}) == []
    assert len(choose(pools, 1, {})) == 3


def test_a_pool_takes_nothing_once_its_warning_is_over() -> None:
    assert pool("a", left_s=61.0, warn_s=60.0).takes
    assert not pool("a", left_s=60.0, warn_s=60.0).takes
    assert not pool("a", "silent").takes


def test_successors_are_those_who_stay() -> None:
    assert successors([OLD, pool("next", "queued", None)], RELAY_S) == {"old": "next"}
    assert successors([OLD], RELAY_S) == {}
    assert successors([pool("a"), pool("b")], RELAY_S) == {}


def test_the_pause_grows_with_pools_that_die_young_and_ends_with_one_that_does_not() -> None:
    young, grown = Closed(reason="", wall_ns=1, young=True), Closed(reason="", wall_ns=1, cause=EndCause.TIMEOUT)
    assert pause_s([]) == 0.0
    assert [pause_s([young] * n) for n in (1, 2, 3)] == [2.0, 4.0, 8.0]
    assert pause_s([young] * 40) == LONGEST_PAUSE_S
    assert pause_s([young, young, grown]) == 0.0
    assert pause_s([grown, young]) == 2.0
