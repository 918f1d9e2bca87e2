"""The catalogue of plug-ins: what is installed, what a wrong name says, and that a stranger's plug-in is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from emflow import registry
from emflow.errors import ConfigError
from emflow.registry import Group
from mpi_kernels.protocols import Format, Reduction

GROUPS: tuple[Group, ...] = get_args(Group)


def test_built_ins_use_the_same_door() -> None:
    assert {"local", "null"} <= set(registry.names("schedulers"))
    assert {"npy", "raw", "hdf5", "merlin", "empad"} <= set(registry.names("formats"))
    assert {"virtual_image", "pattern", "centre_of_mass"} <= set(registry.names("reductions"))


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GROUPS for n in registry.names(g)])
def test_every_plug_in_loads_and_is_documented(group: Group, name: str) -> None:
    found = registry.load(group, name)
    assert isinstance(found, type)
    assert found.__doc__
    assert registry.target(group, name) == f"{found.__module__}:{found.__qualname__}"
    if group == "formats":
        assert isinstance(found(), Format)
    if group == "reductions":
        assert issubclass(found, Reduction)


def test_names_are_sorted_and_no_plug_in_is_listed_twice() -> None:
    for group in GROUPS:
        names = registry.names(group)
        assert list(names) == sorted(set(names))


def test_a_module_and_attribute_is_its_own_target() -> None:
    assert registry.target("formats", "mine.own:Format") == "mine.own:Format"
    assert registry.load("schedulers", "emflow.schedulers.null:NullScheduler").name == "null"


@pytest.mark.parametrize(("name", "hint"), [("locla", "did you mean 'local'"), ("zzz", "known: local, null")])
def test_wrong_name_says_what_was_meant_and_what_is_known(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.target("schedulers", name)
    assert hint in str(caught.value)
    assert "known: " in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("name", ["no_such_module_here:Thing", "emflow.registry:Nothing"])
def test_plug_in_that_does_not_load_names_itself(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be loaded") as caught:
        registry.load("formats", name)
    assert name in str(caught.value)


def test_plug_in_of_another_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "strange.py").write_text('class Strange:\n    """A scheduler."""\n')
    information = tmp_path / "strange-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[emflow.schedulers]\nstrange = strange:Strange\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from emflow import registry\n"
        "assert 'strange' not in sys.modules\n"
        "assert 'strange' in registry.names('schedulers') and 'local' in registry.names('schedulers')\n"
        "assert 'strange' not in sys.modules, 'a plug-in is loaded before it is used'\n"
        "print(registry.load('schedulers', 'strange').__doc__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("A scheduler.\n", "")
