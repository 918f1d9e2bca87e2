"""The command line: quick help, exit codes, JSON with stable keys, and errors in one line."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from emflow.cli import COMMANDS, main
from emflow.journal import Journal
from emflow.journal_schema import STEPS
from emflow.records import AcquisitionState, JobState

HEAVY = {"rich", "msgspec", "numpy", "sqlite3", "h5py", "xxhash", "mpi4py", "matplotlib", "tomllib", "subprocess"}
GOOD = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)

TOML = """\
[[watch]]
root = "share"
[scan]
active_s = 0.05
recent_s = 0.1
whole_s = 0.5
settle_s = 0.1
stable_s = 0.2
[transfer]
min_free = "1 MiB"
[scheduler]
use = "null"
ranks = 1
"""

Emflow = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a configuration and an empty share."""
    (tmp_path / "share").mkdir()
    (tmp_path / "emflow.toml").write_text(TOML)
    return tmp_path


class Done(NamedTuple):
    """What a command said."""

    stdout: str
    stderr: str


@pytest.fixture
def emflow(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Emflow]:
    """Run a command there, in this process; its exit code is compared, and nothing else than our errors comes out."""
    logger = logging.getLogger("emflow")
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.chdir(here)

    def run(*arguments: str, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["emflow", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        done = Done(*capsys.readouterr())
        assert ended.value.code == code, done
        return done

    yield run
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


# --- help


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["-h"]])
def test_help_imports_nothing_heavy(emflow, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "emflow", *arguments], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in imported
    assert not {name.partition(".")[0] for name in imported} & HEAVY
    assert {n for n in imported if n.startswith(("emflow", "mpi_kernels"))} <= {
        "emflow",
        "emflow.cli",
        "emflow.errors",
        "emflow.__main__",
        "mpi_kernels",
        "mpi_kernels.errors",
    }


def test_help_lists_every_command_with_its_own_first_line(emflow) -> None:
    shown = emflow("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert name in shown
        own = emflow(name, "--help").stdout
        assert own.startswith(f"Usage: emflow {name}")
        first = " ".join(own.split("\n\n")[1].split())
        assert line.split()[0] in first, f"{name}: the list says {line!r}, its own help {first!r}"


def test_a_command_that_is_not_there_is_a_usage_error(emflow) -> None:
    assert "did you mean 'status'" in emflow("statsu", code=2).stderr
    assert "No such command" in emflow("xyzzy", code=2).stderr
    assert "--nowhere" in emflow("status", "--nowhere", code=2).stderr
    assert "ID" in emflow("trace", code=2).stderr
    assert "many" in emflow("status", "-n", "many", code=2).stderr
    assert "--ranks" in emflow("reduce", "-n", "0", "x.npy", code=2).stderr
    assert "256,256" in emflow("reduce", "--scan-shape", "4,x", "x.npy", code=2).stderr
    emflow("completion", "tcsh", code=2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_the_shell_takes(emflow, shell: str) -> None:
    script = emflow("completion", shell).stdout
    assert "_EMFLOW_COMPLETE" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_completion_knows_the_commands(emflow) -> None:
    environment = {**os.environ, "_EMFLOW_COMPLETE": "bash_complete", "COMP_WORDS": "emflow st", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['emflow']; from emflow.cli import main; main()"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.split() == ["plain,status"], done.stderr


# --- JSON


def test_json_has_stable_keys(emflow, here: Path) -> None:
    np.save(here / "share" / "scan.npy", GOOD)
    ran = json.loads(emflow("run", "--once", "--json").stdout)
    assert ran == {"acquisitions": {s.value: int(s == "DONE") for s in AcquisitionState}, "alarms": {}}
    status = json.loads(emflow("status", "--json").stdout)
    assert set(status) == {"service", "acquisitions", "jobs", "node_hours", "backlog", "alarms", "newest"}
    assert status["service"] == {"running": False, "pid": None}
    assert status["jobs"] == {s.value: int(s == "REDUCED") for s in JobState}
    (row,) = status["newest"]
    assert set(row) == {
        *("id", "share", "path", "state", "reason", "format", "kind", "frames"),
        *("job", "job_state", "scheduler_id", "node_hours", "seen_ns", "seconds"),
    }
    assert (row["path"], row["state"], row["frames"], row["job"]) == ("scan.npy", "DONE", 6, row["id"] + "-01")
    for said in (row["id"], row["id"][:5], row["job"], "scan.npy"):
        trace = json.loads(emflow("trace", said, "--json").stdout)
        assert set(trace) == {"acquisition", "events"}
        assert trace["acquisition"]["id"] == row["id"]
    event_keys = {"trace", "subject", "plane", "host", "pid", "seq", "name", "wall_ns", "mono_ns", "attrs", "v"}
    assert all(set(event) == event_keys for event in trace["events"])
    times = [event["wall_ns"] for event in trace["events"]]
    assert times == sorted(times)
    check = json.loads(emflow("check", "--json").stdout)
    assert set(check) == {"ok", "findings"}
    assert all(set(f) >= {"part", "ok", "found"} for f in check["findings"])
    assert emflow("status", "-n", "0").stdout
    assert json.loads(emflow("status", "--json", "-n", "0").stdout)["newest"] == []
    rebuilt = json.loads(emflow("rebuild", "--json").stdout)
    assert (rebuilt["acquisitions"], rebuilt["jobs"], rebuilt["problems"]) == (1, 1, [])


def test_nothing_but_json_on_standard_output(emflow, here: Path) -> None:
    (here / "share" / "bad.npy").write_bytes(b"nonsense")
    done = emflow("-v", "run", "--once", "--json", code=1)
    assert json.loads(done.stdout)["acquisitions"]["QUARANTINED"] == 1
    assert "quarantined" in done.stderr
    failed = emflow("reduce", "missing.npy", "--json", code=1)
    assert json.loads(failed.stdout)["failed"][0]["file"] == "missing.npy"


# --- exit codes


def test_69_where_a_part_is_missing(emflow, here: Path) -> None:
    (here / "share").rmdir()
    assert "share share" in emflow("run", "--once", "--json", code=69).stdout
    check = json.loads(emflow("check", "--json", code=69).stdout)
    (finding,) = [f for f in check["findings"] if not f["ok"]]
    assert finding["part"] == "share share"
    assert "mount it" in finding["fix"]
    assert "MISSING" in emflow("check", code=69).stdout


def test_69_on_a_full_disk(emflow, here: Path) -> None:
    (here / "emflow.toml").write_text(TOML.replace("1 MiB", "100000 TiB"))
    np.save(here / "share" / "scan.npy", GOOD)
    assert json.loads(emflow("run", "--once", "--json", code=69).stdout)["acquisitions"]["READY"] == 1
    assert "ALARM disk" in emflow("status").stdout


def without_rights(here: Path) -> list[str]:
    """Prefix of a command that may not do everything, as root may."""
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []


@pytest.mark.parametrize("what", ["state", "runs", "results", "emflow.toml"])
def test_77_where_the_system_says_no(here: Path, what: str) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root without setpriv may do everything")
    np.save(here / "share" / "scan.npy", GOOD)
    if what != "emflow.toml":
        (here / what).mkdir()
    (here / what).chmod(0)
    done = subprocess.run(
        [*without_rights(here), sys.executable, "-m", "emflow", "run", "--once"],
        capture_output=True,
        text=True,
        cwd=here,
        timeout=50,
    )
    (here / what).chmod(0o755)
    # what stands in the way of an acquisition is an alarm: nothing is wrong with the file
    expected = {"state": 77, "emflow.toml": 77, "runs": 77, "results": 69}[what]
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert what in done.stderr


def test_78_where_the_configuration_is_wrong(emflow, here: Path) -> None:
    assert "emflow init" in emflow("-c", "nowhere.toml", "status", code=78).stderr
    (here / "bad.toml").write_text("[[watch]\n")
    assert "bad.toml" in emflow("-c", "bad.toml", "run", code=78).stderr
    (here / "emflow.toml").write_text(TOML.replace('root = "share"', 'root = "share"\nrecipe = "defualt"'))
    assert "'default'" in emflow("run", "--once", code=78).stderr
    assert "defualt" in emflow("reduce", "-r", "defualt", "x.npy", code=78).stderr


def test_the_configuration_comes_from_the_environment_too(emflow, here: Path, monkeypatch) -> None:
    (here / "emflow.toml").rename(here / "other.toml")
    emflow("check", code=78)
    monkeypatch.setenv("EMFLOW_CONFIG", str(here / "other.toml"))
    emflow("run", "--once")


# --- journals that are not right


@pytest.mark.parametrize("command", [["status"], ["trace", "x"], ["retry", "x"]])
def test_a_journal_that_is_not_there_yet(emflow, here: Path, command: list[str]) -> None:
    done = emflow(*command, code=69)
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [["status"], ["run", "--once"], ["trace", "x"]])
@pytest.mark.parametrize("content", [b"this is no database" * 999, b"SQLite format 3\0" + b"\xff" * 8192])
def test_a_journal_that_is_corrupt(emflow, here: Path, command: list[str], content: bytes) -> None:
    (here / "state").mkdir()
    (here / "state" / "journal.sqlite").write_bytes(content)
    done = emflow(*command, code=1)
    assert "journal.sqlite" in done.stderr
    assert "emflow rebuild" in done.stderr
    assert (here / "state" / "journal.sqlite").read_bytes() == content, "a damaged journal is for a person to look at"


@pytest.mark.parametrize("command", [["status"], ["run", "--once"]])
def test_a_journal_that_is_newer_than_the_program(emflow, here: Path, command: list[str]) -> None:
    (here / "state").mkdir()
    path = here / "state" / "journal.sqlite"
    Journal(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {STEPS[-1].version + 1}")
    connection.close()
    assert "newer" in emflow(*command, code=1).stderr


# --- single commands


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["check"], ["--help"], ["completion", "bash"]])
def test_a_reader_that_has_left_is_no_error(emflow, here: Path, command: list[str]) -> None:
    emflow("run", "--once")
    script = 'exec 3>&1; { "$@" 2>&3; echo "exit $?" >&3; } | true'
    for reader in ("true", "head -1 > /dev/null"):
        done = subprocess.run(
            ["bash", "-c", script.replace("| true", f"| {reader}"), "-", sys.executable, "-m", "emflow", *command],
            capture_output=True,
            text=True,
            cwd=here,
            timeout=50,
        )
        assert done.stderr == ""
        assert [line for line in done.stdout.splitlines() if not line.startswith("exit ")] == []


def test_trace_and_retry_say_what_they_do_not_find(emflow, here: Path) -> None:
    for n in range(3):
        np.save(here / "share" / f"scan{n}.npy", GOOD + n)
    emflow("run", "--once")
    assert "emflow status" in emflow("trace", "nothing-like-it", code=2).stderr
    assert "could be any of" in emflow("trace", "scan", code=2).stderr
    assert "emflow status" in emflow("retry", "nothing-like-it", code=2).stderr
    assert "\\x1b" in emflow("trace", "\x1b[31m", code=2).stderr


def test_retry_when_all_numbers_are_used(emflow, here: Path) -> None:
    np.save(here / "share" / "scan.npy", GOOD)
    emflow("run", "--once")
    connection = sqlite3.connect(here / "state" / "journal.sqlite")
    connection.execute("UPDATE job SET name = acquisition || '-99', attempt = 99")
    connection.commit()
    connection.close()
    assert "99" in emflow("retry", "scan.npy", code=2).stderr


def test_init_never_replaces_a_file_unasked(emflow, here: Path) -> None:
    before = (here / "emflow.toml").read_text()
    assert "--force" in emflow("init", code=2).stderr
    assert (here / "emflow.toml").read_text() == before
    emflow("init", "--force")
    emflow("init", "new.toml", "--root", 'a "quoted" folder')
    emflow("-c", "new.toml", "check", code=0)
    assert (here / 'a "quoted" folder').is_dir()
    assert "taken" in emflow("init", "new2.toml", "--root", str(_taken(here)), code=1).stderr
    assert not (here / "new2.toml").exists()


def _taken(here: Path) -> Path:
    (here / "taken").write_text("a file")
    return here / "taken"


def test_demo_refuses_a_folder_that_is_in_use(emflow, here: Path) -> None:
    assert "not empty" in emflow("demo", "--keep", str(here / "share" / ".."), code=2).stderr
    assert "taken" in emflow("demo", "--keep", str(_taken(here)), code=2).stderr


def test_reduce_never_lets_two_results_have_one_name(emflow, here: Path) -> None:
    (here / "a").mkdir()
    np.save(here / "scan.npy", GOOD)
    np.save(here / "a" / "scan.npy", GOOD)
    done = emflow("reduce", "scan.npy", "a/scan.npy", code=2)
    assert "scan_emflow.h5" in done.stderr
    assert not (here / "scan_emflow.h5").exists()


def test_reduce_goes_on_after_a_file_that_fails(emflow, here: Path) -> None:
    np.save(here / "good.npy", GOOD)
    (here / "bad.npy").write_bytes(b"nonsense")
    (here / "gone_emflow.h5").write_text("an older result whose file is gone")
    done = emflow("reduce", "bad.npy", "gone.npy", "good.npy", "-r", "quick", "--json", code=1)
    said = json.loads(done.stdout)
    assert [f["file"] for f in said["failed"]] == ["bad.npy", "gone.npy"]
    assert [d["file"] for d in said["done"]] == ["good.npy"]
    assert (here / "good_emflow.h5").exists()


# --- what reviews found


def test_once_is_0_only_if_nothing_is_left(emflow, here: Path) -> None:
    np.save(here / "share" / "scan.npy", GOOD)
    assert emflow("run", "--once").stdout.split() == ["DONE", "1"]
    os.truncate(here / "share" / "scan.npy", 200)
    said = emflow("run", "--once", "--json", code=1).stdout
    left = {state for state, n in json.loads(said)["acquisitions"].items() if n} - {"DONE", "SUPERSEDED"}
    assert left


def test_rebuild_asks_whether_runs_is_mounted(emflow, here: Path) -> None:
    np.save(here / "share" / "scan.npy", GOOD)
    emflow("run", "--once")
    (here / "runs").rename(here / "unmounted")
    assert "is runs mounted? Nothing was changed" in emflow("rebuild", code=1).stderr
    assert "DONE" in emflow("status").stdout
    assert emflow("rebuild", "--force").stdout.startswith("0 acquisitions")


def test_reduce_makes_the_folder(emflow, here: Path) -> None:
    for name in ("a", "b"):
        np.save(here / f"{name}.npy", GOOD)
    emflow("reduce", "-r", "quick", "a.npy", "-o", "one/")
    emflow("reduce", "-r", "quick", "a.npy", "b.npy", "-o", "deep/two")
    assert (here / "one" / "a_emflow.h5").exists()
    assert (here / "deep" / "two" / "b_emflow.h5").exists()
    assert "is made" in emflow("reduce", "a.npy", "b.npy", "-o", "a.npy", code=2).stderr
    np.save(here / "c.npy", GOOD[:1, :1])
    assert " 1 frame," in emflow("reduce", "-r", "quick", "c.npy", "-o", "c.h5").stdout


def test_json_of_names_that_are_no_text(emflow, here: Path) -> None:
    name = os.fsdecode(b"bad\xff.npy")
    said = emflow("reduce", name, "--json", code=1).stdout
    assert json.loads(said)["failed"][0]["file"] == "bad\\xff.npy"
    np.save(here / "share" / name, GOOD)
    emflow("run", "--once")
    for command in (["trace", "bad"], ["status"]):
        assert "bad\\\\xff" in emflow(*command, "--json").stdout


def test_status_fits_80_columns(emflow, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    np.save(here / "share" / "scan.npy", GOOD)
    emflow("run", "--once")
    lines = [line.rstrip() for line in emflow("status").stdout.splitlines()]
    assert lines[:2] == ["emflow: service not running", "DONE 1"]
    assert re.fullmatch(r"\d+\.\d{3} node-hours on \d{4}-\d\d-\d\d \(UTC\), 0 waiting", lines[2])
    assert lines[3] == "seconds since first sight:"


def test_check_cuts_nothing_where_it_is_piped(emflow, here: Path) -> None:
    root = here / ("long-" * 40)
    root.mkdir()
    (here / "emflow.toml").write_text(TOML.replace('"share"', f'"{root}"\nshare = "s"'))
    said = emflow("check").stdout
    assert "…" not in said
    assert any(f"{root}: 0 entries" in line for line in said.splitlines())


def test_demo_says_at_once_that_matplotlib_is_missing(emflow, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'emflow[notebook]'" in emflow("demo", "--keep", "kept", "-o", "f/x.png", code=69).stderr
    assert not (here / "kept").exists()
    assert not (here / "f").exists()
