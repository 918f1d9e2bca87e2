"""What a recipe may ask of a header, and what it is told when it may not."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_kernels import plan
from mpi_kernels.contract import Axis, Orientation, Recipe
from mpi_kernels.errors import MissingData, RecipeError
from mpi_kernels.plugins import load, make_format, make_reduction
from mpi_kernels.protocols import Output
from mpi_kernels.reductions.pattern import Pattern

NM = Axis(name="x", scale=2.0, unit="nm")


def make(kernel: SimpleNamespace, shape: tuple[int, ...], *names: str, **recipe: object) -> plan.Plan:
    facts = {"scan_axes": (NM,) * (len(shape) - 2)} if recipe.pop("calibrated", False) else {}
    kind = {2: "image", 3: "stack", 4: "4d"}[len(shape)]
    source = kernel.Memory(np.zeros(shape, np.uint8), kind, **facts)
    specs = tuple(kernel.spec(n) for n in names or ("pattern",))
    return plan.make(Recipe(name="test", reductions=specs, **recipe), source.header)


def test_the_recipes_scan_shape_wins(kernel: SimpleNamespace) -> None:
    made = make(kernel, (12, 4, 4), scan_shape=(3, 4), calibrated=True)
    assert (made.header.kind, made.header.scan_shape, made.header.scan_axes) == ("4d", (3, 4), ())
    assert any("calibration is dropped" in w for w in made.warnings)
    back = make(kernel, (3, 4, 4, 4), scan_shape=(12,))
    assert (back.header.kind, back.header.scan_shape) == ("stack", (12,))


@pytest.mark.parametrize("shape", [(3, 5), (13,), (2, 2, 3), (-3, -4), (0,), ()])
def test_a_scan_shape_that_does_not_fit(kernel: SimpleNamespace, shape: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="12 frames"):
        make(kernel, (12, 4, 4), scan_shape=shape)


def test_a_square_number_of_frames_is_no_scan_but_is_mentioned(kernel: SimpleNamespace) -> None:
    made = make(kernel, (16, 4, 4))
    assert made.header.kind == "stack"
    assert any("scan_shape = [4, 4]" in w for w in made.warnings)
    assert make(kernel, (15, 4, 4)).warnings == ()


def test_what_does_not_apply_is_skipped_and_listed(kernel: SimpleNamespace) -> None:
    assert make(kernel, (4, 4), "pattern", "image").skipped == ("pattern",)
    assert make(kernel, (2, 4, 4), "pattern", "image").skipped == ("image",)
    with pytest.raises(RecipeError, match="applies to data of kind 'image'") as caught:
        make(kernel, (4, 4), "pattern")
    assert caught.value.next_step == "pattern is for 4d, stack"


@pytest.mark.parametrize("name", ["", "a/b", "entry", "process", "1a", "a b", "é", "x" * 64, "a\n"])
def test_names_that_a_result_cannot_have(kernel: SimpleNamespace, name: str) -> None:
    recipe = Recipe(name="r", reductions=(kernel.spec("pattern", name or "x").__class__(use="a:b", name=name),))
    with pytest.raises(RecipeError, match="no name for a reduction"):
        plan.make(recipe, kernel.Memory(np.zeros((2, 2, 2)), "stack").header)


def test_two_reductions_of_one_name(kernel: SimpleNamespace) -> None:
    with pytest.raises(RecipeError, match="two reductions"):
        make(kernel, (2, 2, 2), "pattern", "pattern")


def test_no_frames_is_missing_data(kernel: SimpleNamespace) -> None:
    with pytest.raises(MissingData, match="no frames"):
        make(kernel, (0, 2, 2))


def test_transposing_takes_calibrations_along(kernel: SimpleNamespace) -> None:
    axes = (Axis(name="qy", scale=1.0), Axis(name="qx", scale=3.0))
    source = kernel.Memory(np.zeros((2, 3, 5), np.uint8), "stack", det_axes=axes)
    turned = plan.oriented_header(source.header, Orientation(transpose=True, flip_x=True))
    assert turned.det_shape == (5, 3)
    assert turned.det_axes == (Axis(name="qy", scale=3.0), Axis(name="qx", scale=1.0))


def test_axes_of_outputs(kernel: SimpleNamespace) -> None:
    header = kernel.Memory(np.zeros((2, 3, 5, 4), np.uint8), "4d").header
    names = lambda **o: [a.name for a in plan.output_axes(Output(**o), header)]  # noqa: E731
    assert names(over="scan") == ["scan_y", "scan_x"]
    assert names(over="frame", shape=(5, 4)) == ["det_y", "det_x"]
    assert names(over="scan", shape=(7,), axes=(NM,)) == ["scan_y", "scan_x", "x"]
    assert names(over="frame", shape=(7,)) == ["index_0"]


@pytest.mark.parametrize("target", ["", "os", "os:", ":path", "os:path:x", "os.path", "../x:y", "os:system()"])
def test_targets_of_another_form(target: str) -> None:
    with pytest.raises(RecipeError, match="is not module:attr"):
        load(target)


@pytest.mark.parametrize("target", ["no_such_module_at_all:X", "mpi_kernels.contract:NoSuch"])
def test_targets_that_are_not_there(target: str) -> None:
    with pytest.raises(RecipeError, match="can't be loaded"):
        load(target)


def test_parameters_are_strict_and_the_valid_ones_are_named(kernel: SimpleNamespace) -> None:
    with pytest.raises(RecipeError, match=r"radus.*radius.*parameters of .*VirtualImage: shape, centre, radius"):
        make_reduction(kernel.spec("virtual_image", radus=3.0))
    with pytest.raises(RecipeError, match="expected"):
        make_reduction(kernel.spec("virtual_image", radius="3"))
    with pytest.raises(RecipeError, match="not a Reduction"):
        make_reduction(kernel.spec("mpi_kernels.contract:Axis"))
    with pytest.raises(RecipeError, match="not a Format"):
        make_format("mpi_kernels.contract:Axis")
    assert make_reduction(kernel.spec("virtual_image", centre=[1, 2])).centre == (1.0, 2.0)


def test_importing_the_kernels_loads_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import mpi_kernels.__main__, mpi_kernels.reductions.pattern;"
        "print(*sorted({'h5py', 'mpi4py', 'emflow', 'scipy', 'matplotlib', 'hdf5plugin'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["", "a/b", "é", "scalars", "events"])
def test_names_that_an_output_cannot_have(kernel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Pattern, "outputs", lambda *_: {name: Output(over="frame")})
    with pytest.raises(RecipeError, match="is no name for an output"):
        make(kernel, (2, 4, 4), "pattern")
