"""``microscope.toml``: the template loads, and everything wrong is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from emflow.errors import ConfigError
from emflow.microscope.settings import Settings, default, load, template


def written(folder: Path, text: str) -> Path:
    path = folder / "microscope.toml"
    path.write_text(text)
    return path


def test_template_loads_and_is_the_default(tmp_path: Path) -> None:
    assert load(written(tmp_path, template())) == default(tmp_path)


def test_what_the_template_says_is_what_is_used_without_it(tmp_path: Path) -> None:
    server = default(tmp_path).server
    bare = load(written(tmp_path, "")).server
    assert server == bare
    assert (server.folder, server.state) == (str(tmp_path / "share"), str(tmp_path / "microscope-state"))
    assert (server.lease_s, server.on_lease_lost) == (10.0, "finish")


def test_without_a_table_no_control_may_be_set(tmp_path: Path) -> None:
    assert load(written(tmp_path, "[limits]\nmax_frames = 4\n")).limits.controls == {}


def test_parameters_are_passed_as_they_are(tmp_path: Path) -> None:
    text = '[backend]\nuse = "a:B"\n[backend.parameters]\nseed = 4\nmore = { deep = [1, 2] }\n'
    assert load(written(tmp_path, text)).backend.parameters == {"seed": 4, "more": {"deep": [1, 2]}}


CONTROL = "[limits.controls.C10_nm]\nmin = 0.0\nmax = 1.0\nmax_step = 1.0\nper_minute = 1\ntolerance = 0.1\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[server]\nadress = "127.0.0.1:1"', 2, "did you mean 'address'"),
        ('[server]\naddress = "0.0.0.0:1"', 2, "reached from other machines. Until certificates come"),
        ("[server]\nlease_s = 31.0", 2, "server.lease_s"),
        ("[server]\nlease_s = nan", 2, "server.lease_s"),
        ('[server]\non_lease_lost = "fin"', 2, "did you mean 'finish'"),
        ('[server]\nfolder = "a"\nstate = "a/b"', 3, "lie inside each other"),
        ('[server]\nfolder = ""', 2, "expected the path of a folder"),
        ('[backend]\nuse = "simulatd"', 2, "did you mean 'simulated'"),
        ("[limits]\nmax_dose_e = inf", 2, "is no limit"),
        ("[limits]\nmax_dose_e = -1.0", 2, "max_dose_e"),
        ("[limits]\nstep_nm = { min = 1.0 }", 2, "'max' is missing in [limits.step_nm]"),
        ("[limits]\nstep_nm = { min = 2.0, max = 1.0 }", 2, "min 2 is above max 1"),
        ("[limits]\nstep_nm = { min = nan, max = 1.0 }", 2, "nan is no limit"),
        ("[limits]\nstep_nm = { min = 0.0, mx = 1.0 }", 2, "did you mean 'max'"),
        (CONTROL + "max_stp = 3.0", 7, "did you mean 'max_step'"),
        (CONTROL.replace("max_step = 1.0\n", ""), 1, "'max_step' is missing"),
        (CONTROL.replace("per_minute = 1", "per_minute = true"), 5, "per_minute"),
        (CONTROL.replace("max = 1.0", "max = -1.0"), 2, "min 0 is above max -1"),
        (CONTROL.replace("max_step = 1.0", "max_step = 0.0"), 4, "max_step"),
        ("[limit]", 1, "did you mean 'limits'"),
        ("[limits\n", 1, "not TOML"),
    ],
)
def test_everything_wrong_is_told_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}:{line}: ")
    assert words in str(raised.value)


def test_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="emflow microscope init"):
        load(tmp_path / "none.toml")


def test_settings_are_one_record(tmp_path: Path) -> None:
    assert isinstance(default(tmp_path), Settings)
