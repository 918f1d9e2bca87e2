"""The tests' own rules: a missing need is a skip with its reason, a required one a failure, a stray process too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project with our conftest, and a machine without peers."""
    shutil.copy(CONFTEST, pytester.path / "conftest.py")
    markers = "\n    ".join(f"{m}: test" for m in ("slow", "needs_mpi", "needs_peers", "needs_data"))
    pytester.makeini(f"[pytest]\naddopts = -ra --strict-markers -p no:cacheprovider\nmarkers =\n    {markers}\n")
    monkeypatch.delenv("EMFLOW_REQUIRE", raising=False)
    monkeypatch.delenv("EMFLOW_PEERS_PYTHON", raising=False)
    return pytester


def test_missing_need_is_a_skip_that_says_how_to_get_it(inner: pytest.Pytester) -> None:
    inner.makepyfile("import pytest\n@pytest.mark.needs_peers\ndef test_it(): raise SystemExit('must not run')")
    result = inner.runpytest_subprocess()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*SKIPPED*needs peers: EMFLOW_PEERS_PYTHON is not set*pip install*"])


def test_missing_need_that_is_required_fails(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMFLOW_REQUIRE", "peers")
    inner.makepyfile("import pytest\n@pytest.mark.needs_peers\ndef test_it(): pass\ndef test_other(): pass")
    result = inner.runpytest_subprocess()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*EMFLOW_REQUIRE demands 'peers'*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("value", ["perrs", "mpi,strcae"])
def test_unknown_requirement_is_refused(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("EMFLOW_REQUIRE", value)
    inner.makepyfile("def test_it(): pass")
    result = inner.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*EMFLOW_REQUIRE: unknown*known: mpi*"])


def test_peers_without_a_package_are_missing(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "python"  # an interpreter without site-packages has none of the peers
    fake.write_text(f'#!/bin/sh\nexec {shutil.which("python3")} -S -E "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("EMFLOW_PEERS_PYTHON", str(fake))
    inner.makepyfile("import pytest\n@pytest.mark.needs_peers\ndef test_it(): pass")
    inner.runpytest_subprocess().stdout.fnmatch_lines(["*SKIPPED*can't import hyperspy silx emdfile*"])


def test_real_data_fixture_skips_where_the_folder_is_absent(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMFLOW_TEST_DATA", str(tmp_path / "absent"))
    inner.makepyfile("def test_it(reference): raise SystemExit('must not run')")
    inner.runpytest_subprocess().assert_outcomes(skipped=1)
    monkeypatch.setenv("EMFLOW_REQUIRE", "data")
    inner.runpytest_subprocess().assert_outcomes(errors=1)


def test_slow_tests_run_only_when_asked_for(inner: pytest.Pytester) -> None:
    inner.makepyfile("import pytest\n@pytest.mark.slow\ndef test_slow(): pass\ndef test_quick(): pass")
    inner.runpytest_subprocess().assert_outcomes(passed=1, deselected=1)
    inner.runpytest_subprocess("-m", "not slow").assert_outcomes(passed=1, deselected=1)
    inner.runpytest_subprocess("-m", "slow").assert_outcomes(passed=1, deselected=1)
    inner.runpytest_subprocess("--slow").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.Popen(['sleep', '600'])",  # a child
        "subprocess.run(['sh', '-c', 'setsid sleep 600 >/dev/null 2>&1 &'])",  # an orphan with our environment
        "subprocess.run(['sh', '-c', 'setsid sleep 600 >/dev/null 2>&1 &'], env={'PATH': '/bin'}, cwd=tmp_path)",
    ],
    ids=["child", "orphan", "orphan without environment"],
)
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["", "workers"])
def test_process_left_running_fails_the_run(inner: pytest.Pytester, start: str, workers: tuple[str, ...]) -> None:
    conftest = inner.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace("GRACE_S = 5.0", "GRACE_S = 0.2"))
    inner.makepyfile(f"import subprocess\ndef test_it(tmp_path):\n    global p\n    p = {start}")
    result = inner.runpytest_subprocess("-W", "ignore", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*PROCESSES LEFT RUNNING*", "*: sleep 600"])
    pid = int(result.stdout.str().partition("the run has failed")[2].split(":")[0].split()[-1])
    assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_token_reaches_what_the_tests_start() -> None:
    assert os.environ["EMFLOW_TEST_RUN"].startswith(f"{os.getpid()}.")
