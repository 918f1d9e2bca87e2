"""Recipes: the built-in ones load in full, and what is wrong in one's own is told with its line."""

import sys
from pathlib import Path

import pytest

from emflow.errors import ConfigError
from emflow.recipes import load_recipe, recipe_names
from mpi_kernels import jsonfile
from mpi_kernels.contract import Orientation, Recipe, ReductionSpec

ONE = '[[reduction]]\nuse = "pattern"\nname = "pattern"\n'


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipes_load_and_cross_hosts(name, tmp_path):
    recipe = load_recipe(name, relative_to=tmp_path)
    assert recipe.name == name
    assert all(":" in spec.use for spec in recipe.reductions)
    assert jsonfile.decode(Recipe, jsonfile.encode(recipe)) == recipe


def test_the_default_is_the_usual_first_look(tmp_path):
    recipe = load_recipe("default", relative_to=tmp_path)
    assert [spec.name for spec in recipe.reductions] == [
        "bright_field",
        "dark_field",
        "pattern",
        "centre_of_mass",
        "radial_profile",
        "image",
    ]
    assert recipe.reductions[1].parameters == {"shape": "annulus"}


def test_ones_own_by_path_relative_to_the_configuration(tmp_path):
    (tmp_path / "mine").mkdir()
    text = 'name = "mine"\nscan_shape = [3, 4]\norientation = { flip_y = true }\n' + ONE
    text += (
        '[[reduction]]\nuse = "virtual_image"\nname = "haadf"\n[reduction.parameters]\nshape = "annulus"\ninner = 3\n'
    )
    (tmp_path / "mine" / "r.toml").write_text(text)
    expected = Recipe(
        name="mine",
        scan_shape=(3, 4),
        orientation=Orientation(flip_y=True),
        reductions=(
            ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="pattern"),
            ReductionSpec(
                use="mpi_kernels.reductions.virtual_image:VirtualImage",
                name="haadf",
                parameters={"shape": "annulus", "inner": 3},
            ),
        ),
    )
    assert load_recipe("mine/r.toml", relative_to=tmp_path) == expected
    assert load_recipe(str(tmp_path / "mine" / "r.toml"), relative_to=tmp_path / "elsewhere") == expected


def test_a_plug_in_in_full_that_lives_on_the_nodes_only(tmp_path):
    (tmp_path / "r.toml").write_text('name = "r"\n[[reduction]]\nuse = "site_only.kernels:Strain"\nname = "strain"\n')
    [spec] = load_recipe("r.toml", relative_to=tmp_path).reductions
    assert spec.use == "site_only.kernels:Strain"
    assert "site_only" not in sys.modules


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (ONE, 1, "'name' is missing"),
        ('name = "r"\nreduction = []\n', 2, "a recipe needs a [[reduction]]"),
        ('name = "R r"\n' + ONE, 1, "'R r' can't name a recipe"),
        ('name = "r"\n\n' + ONE.replace('"pattern"', '"patern"', 1), 4, "is called 'patern'. did you mean 'pattern'?"),
        ('name = "r"\n' + ONE + ONE, 7, "name 'pattern' is already the one of line 4"),
        ('name = "r"\n' + ONE.replace('name = "pattern"', 'name = "a/b"'), 4, "'a/b' can't name a reduction"),
        ('name = "r"\n' + ONE.replace("name =", "nam ="), 4, "unknown key 'nam' in [[reduction]]; did you mean"),
        ('name = "r"\norientation = { flip = true }\n' + ONE, 2, "unknown key 'flip' in [orientation]"),
        ('name = "r"\nscan_shape = [0, 3]\n' + ONE, 2, "scan_shape is [scan_y, scan_x] or [frames], got [0, 3]"),
        ('name = "r"\nscan_shape = [1, 2, 3]\n' + ONE, 2, "scan_shape is"),
        ('name = "r"\nscan_shape = ["3"]\n' + ONE, 2, "scan_shape: expected int, got str"),
        ('name = "r"\n' + ONE + "[reduction.parameters]\nvariance = true\nvarance = 1\n", 7, "unknown field 'varance'"),
        ('name = "r"\n' + ONE + "parameters = { variance = 2 }\n", 5, "expected bool, got 2"),
        ('name = "r"\n' + ONE + "[reduction.parameters]\nvariance = nan\n", 6, "nan can't be a parameter"),
        ('name = "r"\n' + ONE + "[reduction.parameters]\nx = [1,\n 2024-01-01]\n", 7, "01 can't be a parameter"),
    ],
)
def test_wrong_recipes_are_told_with_the_line(tmp_path, text, line, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe("r.toml", relative_to=tmp_path)
    where, _, said = str(caught.value).partition(": ")
    assert message in said, said
    assert where == f"{tmp_path / 'r.toml'}:{line}", said


def test_unknown_names_are_told_what_was_meant(tmp_path):
    told = r"no recipe is called 'defualt'; did you mean 'default'\? known: aberrations, default"
    with pytest.raises(ConfigError, match=told):
        load_recipe("defualt", relative_to=tmp_path)
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        load_recipe("missing.toml", relative_to=tmp_path)


MASK = 'name = "r"\n[[reduction]]\nuse = "virtual_image"\nname = "m"\nparameters = { shape = "mask", file = "FILE" }\n'


@pytest.mark.parametrize(
    ("written", "meant"),
    [("mask.npy", "recipes/mask.npy"), ("../masks/m.npy", "masks/m.npy"), ("/data/m.npy", "/data/m.npy")],
)
def test_a_mask_belongs_to_the_folder_of_its_recipe(tmp_path, monkeypatch, written, meant):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.toml").write_text(MASK.replace("FILE", written))
    for relative_to, path in ((tmp_path, "recipes/r.toml"), (Path("/"), str(tmp_path / "recipes" / "r.toml"))):
        [spec] = load_recipe(path, relative_to=relative_to).reductions
        assert spec.parameters["file"] == str(tmp_path / meant)
    monkeypatch.chdir(tmp_path / "recipes")
    [spec] = load_recipe("./r.toml", relative_to=Path()).reductions
    assert spec.parameters["file"] == str(tmp_path / meant)


@pytest.mark.parametrize(
    ("use", "name"),
    [("pacbed", "file"), ("mpi_kernels.reductions.pacbed:Pacbed", "file"), ("count_electrons", "dark")],
)
def test_other_files_belong_to_the_folder_of_their_recipe(tmp_path, use, name):
    (tmp_path / "recipes").mkdir()
    text = f'name = "r"\n[[reduction]]\nuse = "{use}"\nname = "p"\nparameters = {{ {name} = "grain.npy" }}\n'
    (tmp_path / "recipes" / "r.toml").write_text(text)
    [spec] = load_recipe("recipes/r.toml", relative_to=tmp_path).reductions
    assert spec.parameters == {name: str(tmp_path / "recipes" / "grain.npy")}


def test_the_known_parameters_are_listed_once(tmp_path):
    (tmp_path / "r.toml").write_text(MASK.replace("file =", "fiel ="))
    with pytest.raises(ConfigError) as caught:
        load_recipe("r.toml", relative_to=tmp_path)
    assert "'fiel'" in str(caught.value)
    assert str(caught.value).count("angles") == 1
