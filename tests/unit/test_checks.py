"""``emflow check``: what is there is found, what is missing is named with its cure, and nothing raises."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from emflow.checks import EXTRAS, PACKAGES, findings
from emflow.config import Config, load
from emflow.microscope.server import serving
from emflow.microscope.settings import Settings, default
from emflow.runs import lock
from emflow.schedulers.protocol import Finding

TOML = """\
[[watch]]
root = "share"
{watch}
[transfer]
min_free = "{min_free}"
[scheduler]
use = "null"
ranks = 1
[microscope]
address = "{microscope}"
"""


def configured(folder: Path, *, watch: str = "", min_free: str = "1 MiB", microscope: str = "127.0.0.1:1") -> Config:
    (folder / "share").mkdir(exist_ok=True)
    path = folder / "emflow.toml"
    path.write_text(TOML.format(watch=watch, min_free=min_free, microscope=microscope))
    return load(path)


def found(config: Config) -> dict[str, Finding]:
    parts = {f.part: f for f in findings(config)}
    assert all(f.ok or f.fix for f in parts.values()), "what is missing comes with its cure"
    return parts


def missing(config: Config) -> list[str]:
    return [part for part, f in found(config).items() if not f.ok]


def test_where_all_is_well_nothing_is_missing(tmp_path: Path) -> None:
    parts = found(configured(tmp_path))
    assert [p for p, f in parts.items() if not f.ok] == []
    assert {f"package {name}" for name in (*PACKAGES, *EXTRAS)} <= set(parts)
    assert "npy" in parts["formats"].found
    assert "virtual_image" in parts["reductions"].found
    assert "local" in parts["schedulers"].found
    assert "default:" in parts["share share recipe"].found
    assert "0 entries" in parts["share share"].found
    assert "not running" in parts["service"].found
    assert parts["microscope"].found == "no answer at 127.0.0.1:1 (only emflow agent needs it)"


def test_a_microscope_that_serves_and_one_that_may_not_be_asked(tmp_path: Path) -> None:
    with serving(replace_address(default(tmp_path), "127.0.0.1:0")) as address:
        assert found(configured(tmp_path, microscope=address))["microscope"].found == f"simulated at {address}: ready"
    far = found(configured(tmp_path, microscope="0.0.0.0:7763"))["microscope"]
    assert not far.ok
    assert "can be reached from other machines" in far.found


def replace_address(settings: Settings, address: str) -> Settings:
    return msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, address=address))


def test_the_packages_that_are_checked_are_those_that_setup_demands() -> None:
    text = (Path(__file__).parents[2] / "setup.cfg").read_text(encoding="utf-8")
    demanded = text.partition("install_requires =")[2].partition("[options.package_data]")[0]
    names = {line.strip().partition(";")[0].partition(">")[0].strip() for line in demanded.strip().splitlines()}
    assert names == set(PACKAGES)
    for package, extra in EXTRAS.items():
        assert package in text.partition(f"\n{extra} =")[2].partition("\n\n")[0] or f"{extra} = {package}" in text


@pytest.mark.parametrize("name", ["state", "runs"])
def test_a_folder_that_everybody_may_write_to(tmp_path: Path, name: str) -> None:
    config = configured(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name).chmod(0o1777)
    assert missing(config) == [f"folder {name}"]
    assert found(config)[f"folder {name}"].fix == f"chmod o-w {tmp_path / name}"


def test_folders_are_made_and_nothing_is_left_in_them(tmp_path: Path) -> None:
    config = configured(tmp_path)
    found(config)
    for name in ("state", "runs", "results", "experiments"):
        assert list((tmp_path / name).iterdir()) == []


@pytest.mark.parametrize("name", ["state", "runs", "results", "experiments"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    config = configured(tmp_path)
    (tmp_path / name).write_text("a file")
    assert f"folder {name}" in missing(config)
    assert str(tmp_path / name) in found(config)[f"folder {name}"].fix


def test_a_share_that_is_not_mounted(tmp_path: Path) -> None:
    config = configured(tmp_path)
    (tmp_path / "share").rmdir()
    assert missing(config) == ["share share"]
    assert "mount it" in found(config)["share share"].fix


def test_a_recipe_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\n')
    parts = found(configured(tmp_path, watch='recipe = "mine.toml"'))
    assert [p for p, f in parts.items() if not f.ok] == ["share share recipe"]
    assert "mine.toml:1: 'reduction' is missing" in parts["share share recipe"].found


def test_too_little_room(tmp_path: Path) -> None:
    assert missing(configured(tmp_path, min_free="1000000 TiB")) == ["room"]


def test_a_service_that_runs_is_told_with_its_pid(tmp_path: Path) -> None:
    config = configured(tmp_path)
    (tmp_path / "state").mkdir()
    with lock(tmp_path / "state"):
        assert f"pid {os.getpid()}" in found(config)["service"].found


def test_what_a_hostile_name_says_is_printable(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31mb"
    folder.mkdir()
    config = configured(folder)
    assert all((f.found + f.fix).isprintable() for f in found(config).values())
    (folder / "runs").rmdir()
    (folder / "runs").write_text("a file")
    (folder / "share").rmdir()
    parts = found(config)
    assert not parts["folder runs"].ok
    assert not parts["share share"].ok
    assert all((f.found + f.fix).isprintable() for f in parts.values())
