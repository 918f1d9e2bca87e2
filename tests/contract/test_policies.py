"""What every registered policy must hold to, built in or not, shown a result of the simulated microscope."""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from emflow import registry
from emflow.agent.protocol import Decision, Policy, Step, Verdict
from emflow.microscope.protocol import Action, Batch, Command, Set, from_wire, to_wire
from emflow.microscope.simulated.backend import SimulatedMicroscope
from emflow.recipes import load_recipe
from mpi_kernels import engine, plan
from mpi_kernels.contract import Axis
from mpi_kernels.formats.choose import choose
from mpi_kernels.ranks import Ranks

NAMES = registry.names("policies")
ENOUGH = 40
"""Decisions after which a policy that is shown the same broken result must have given up."""

every_policy = pytest.mark.parametrize("name", NAMES)


class Reduced:
    """A result in memory: what the engine made of a file with a policy's recipe."""

    def __init__(self, path: Path, recipe: str, settings: Mapping[str, float]) -> None:
        formats = {n: registry.load("formats", n)() for n in registry.names("formats")}
        chosen, header = choose(str(path), formats)
        made = plan.make(load_recipe(recipe, relative_to=path.parent), header)
        source = formats[chosen].open(str(path))
        found = engine.reduce(made, source, Ranks())
        source.close()
        assert found is not None
        self.job, self.coverage, self.quality = "0123456789abcdef-01", 1.0, "OK"
        self.settings, self.scalars = dict(settings), found.scalars
        self.arrays = {f"{s}/{n}": a for s, arrays in found.arrays.items() for n, a in arrays.items()}
        self._axes = {
            f"{s.spec.name}/{n}": plan.output_axes(o, made.header) for s in made.steps for n, o in s.outputs.items()
        }

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def axes(self, name: str) -> tuple[Axis, ...]:
        return self._axes[name]


def policy_called(name: str, **parameters: Any) -> Policy:
    policy: Policy = msgspec.convert(parameters, registry.load("policies", name), strict=True)
    return policy


@functools.cache
def first_result(name: str) -> tuple[Reduced, dict[str, float], Decision]:
    """What the first decision of a policy with its defaults leads to, and the controls then."""
    policy = policy_called(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "share").mkdir()
        microscope = SimulatedMicroscope(folder / "share", folder / "state", {"seed": 5, "clock": "scan"})
        decision = policy.decide(None, microscope.read(), ())
        for number, action in enumerate(flat(decision.actions)):
            if isinstance(action, Set):
                microscope.set(action.values)
            else:
                acquired = microscope.acquire(action, f"scan{number}", "trace", threading.Event())
        result = Reduced(folder / "share" / acquired.path, policy.recipe, microscope.read())
        return result, dict(microscope.read()), decision


def flat(actions: tuple[Action, ...]) -> Iterator[Any]:
    for action in actions:
        yield from action.actions if isinstance(action, Batch) else (action,)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


def check(decision: Decision, policy: Policy) -> None:
    """What holds for every decision, whatever it rests on."""
    assert isinstance(decision, Decision)
    assert decision.reason
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision
    assert all(math.isfinite(n) for n in numbers(msgspec.to_builtins(decision)))
    for number, action in enumerate(decision.actions):
        command = Command(id=f"e0123456789ab-0000-{number:02d}", trace="t", action=action, epoch=1, not_after_s=1.0)
        assert from_wire(Command, to_wire(command)) == command
    moved = {control for a in flat(decision.actions) if isinstance(a, Set) for control in a.values}
    assert moved <= set(policy.controls)
    assert decision.trusted or not moved
    assert decision.merit is None or decision.merit_unit


def test_the_catalogue_has_the_built_in_ones() -> None:
    assert {"correct_aberrations", "threshold"} <= set(NAMES)


@every_policy
def test_it_is_a_frozen_struct_with_defaults(name: str) -> None:
    cls = registry.load("policies", name)
    assert isinstance(policy_called(name), Policy)
    assert cls.__struct_config__.frozen
    assert cls.__struct_config__.forbid_unknown_fields
    assert cls.__doc__
    for field in msgspec.structs.fields(cls):
        assert f"{field.name}" in cls.__doc__, f"{field.name} is not documented"
    assert msgspec.convert(msgspec.to_builtins(cls()), cls) == cls()


@every_policy
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="no_such_parameter"):
        policy_called(name, no_such_parameter=1)


@every_policy
def test_its_recipe_and_controls_exist(name: str, tmp_path: Path) -> None:
    policy = policy_called(name)
    assert load_recipe(policy.recipe, relative_to=tmp_path).reductions
    _, settings, _ = first_result(name)
    assert policy.controls
    assert set(policy.controls) <= set(settings)
    assert len(set(policy.controls)) == len(policy.controls)


@every_policy
def test_the_first_decision_acquires_something(name: str) -> None:
    _, settings, decision = first_result(name)
    policy = policy_called(name)
    check(decision, policy)
    assert decision.verdict is Verdict.GO_ON
    assert decision.trusted
    assert any(not isinstance(a, Set) for a in flat(decision.actions))
    assert policy.decide(None, settings, ()) == decision


@every_policy
def test_it_decides_from_a_result_and_is_pure(name: str) -> None:
    result, settings, first = first_result(name)
    policy = policy_called(name)
    history = (Step(number=0, decision=first, settings={}, receipts=()),)
    before = {n: a.tobytes() for n, a in result.arrays.items()}
    decisions = [policy.decide(result, dict(settings), history) for _ in range(2)]
    decisions.append(policy_called(name).decide(result, dict(settings), history))
    check(decisions[0], policy)
    assert len({msgspec.json.encode(d) for d in decisions}) == 1
    assert decisions[0].trusted
    assert {n: a.tobytes() for n, a in result.arrays.items()} == before
    assert policy == policy_called(name)


@every_policy
def test_a_broken_result_moves_nothing_and_ends_it_at_last(name: str) -> None:
    result, settings, first = first_result(name)
    policy = policy_called(name)
    broken = object.__new__(Reduced)
    vars(broken).update(vars(result))
    broken.quality = "INVALID"
    broken.arrays = {n: np.full(a.shape, np.nan) for n, a in result.arrays.items()}
    broken.scalars = {r: dict.fromkeys(s) for r, s in result.scalars.items()}
    history = [Step(number=0, decision=first, settings={}, receipts=())]
    while history[-1].decision.verdict is Verdict.GO_ON and len(history) < ENOUGH:
        decision = policy.decide(broken, dict(settings), tuple(history))
        check(decision, policy)
        assert not decision.trusted
        history.append(Step(number=len(history), decision=decision, settings=dict(settings), receipts=()))
    assert history[-1].decision.verdict is Verdict.GIVE_UP


@every_policy
def test_it_says_whether_part_of_a_scan_will_do(name: str) -> None:
    policy = policy_called(name)
    assert policy.accepts_partial(1.0) is True
    assert isinstance(policy.accepts_partial(0.5), bool)


@every_policy
def test_the_reference_names_its_parameters_with_their_defaults(name: str) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "policies.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \| .+ \|$", section, re.MULTILINE)
    plain = msgspec.to_builtins(policy_called(name))
    assert {parameter: json.loads(default) for parameter, default in rows} == json.loads(json.dumps(plain))
