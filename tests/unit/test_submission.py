"""``emflow check --submit`` where there is no Slurm, its exit codes, and the systemd unit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import emflow.cli

Main = Callable[[list[str]], int]
UNIT = Path(__file__).parents[2] / "slurm" / "emflow.service"


def configured(folder: Path, text: str) -> str:
    path = folder / "emflow.toml"
    path.write_text(f'[[watch]]\nroot = "share"\n{text}\n')
    return str(path)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command line, with its exit code."""

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["emflow", *arguments])
        with pytest.raises(SystemExit) as ended:
            emflow.cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


def test_the_local_scheduler_shows_its_command(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = configured(tmp_path, "[scheduler]\nranks = 1")
    assert main(["-c", file, "check", "--submit"]) == 0
    shown = capsys.readouterr().out
    assert "reduce.sbatch" in shown
    assert "EMFLOW_RANKS=1" in shown
    assert shown.endswith("nothing was sent; it would be taken\n")
    assert "#SBATCH" not in shown
    assert not (tmp_path / "runs").exists()
    assert main(["-c", file, "--verbose", "check", "--submit"]) == 0
    assert "#SBATCH --no-requeue" in capsys.readouterr().out


def test_what_would_be_refused_ends_with_69(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = configured(tmp_path, '[scheduler]\nuse = "null"\nranks = 2')
    assert main(["-c", file, "check", "--submit"]) == 69
    assert capsys.readouterr().out.endswith("nothing was sent; it would be REFUSED\n")
    assert main(["-c", file, "check", "--submit", "--json"]) == 69
    assert json.loads(capsys.readouterr().out)["said"] == "it has one rank"


def test_json_says_all_of_it(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", configured(tmp_path, ""), "check", "--submit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["command"][0] == "bash"
    assert Path(found["script"]).read_text() == found["text"]
    assert found["environment"]["EMFLOW_PYTHON"] == sys.executable
    assert {"key": "ranks", "value": "2", "origin": "[scheduler]"} in found["settings"]
    assert set(found) == {
        *("ok", "scheduler", "profile", "settings", "command", "environment", "script", "text", "said", "remarks")
    }


@pytest.mark.needs_slurm
def test_where_slurm_can_not_be_asked_the_command_is_shown_all_the_same(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # one that is not there is looked for 40 s long
    (tmp_path / "slurm.conf").write_text("Garbage=1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    (tmp_path / "setup.sh").touch(mode=0o644)
    (tmp_path / "setup.sh").chmod(0o646)
    own = '[scheduler]\nuse = "slurm"\n[slurm]\nsite = "perlmutter"\nsetup = "setup.sh"\ncontainer = "none.sif"'
    assert main(["-c", configured(tmp_path, own), "check", "--submit"]) == 69
    shown = capsys.readouterr().out
    assert "--constraint=cpu" in shown
    assert re.search(r"qos +regular +profile perlmutter\n", shown)
    assert re.search(r"answer +\S", shown)
    assert "setup.sh can be written by everybody: chmod o-w" in shown
    assert "none.sif: No such file or directory on this machine" in shown


def test_a_profile_that_is_wrong_ends_with_78(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = '[scheduler]\nuse = "slurm"\n[slurm]\nsite = "perlmuter"'
    assert main(["-c", configured(tmp_path, own), "check", "--submit"]) == 78
    assert "did you mean 'perlmutter'" in capsys.readouterr().err


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/emflow/bin/emflow", sys.executable)
    (tmp_path / "emflow.service").write_text(text)
    command = [program, "verify", "--man=no", str(tmp_path / "emflow.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "emflow.service" in line]
    assert (done.returncode, said) == (0, [])
    # and it does look
    (tmp_path / "emflow.service").write_text(text.replace("ProtectSystem=", "ProtectSytem="))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ProtectSytem" in done.stdout + done.stderr


def test_the_unit_stops_where_a_new_start_would_not_help() -> None:
    text = UNIT.read_text(encoding="utf-8")
    keys = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert keys["RestartPreventExitStatus"].split() == ["75", "77", "78"]
    assert keys["SuccessExitStatus"].split() == ["130", "143"]
    assert keys["KillMode"] == "process"
    assert keys["WorkingDirectory"] == keys["ReadWritePaths"]
