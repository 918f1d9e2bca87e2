"""What the controller has forgotten is looked for in the accounting: sacct's output is recorded, see recorded/README.

The cluster of the tests has none, so that the real sacct says that it is off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cluster import Cluster
from emflow.records import EndCause, SchedulerPhase

pytestmark = pytest.mark.needs_slurm
KEY = "0123456789abcdef"


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a line of bash in the place of sacct; its calls are counted in the file that is returned."""

    def arrange(body: str) -> Path:
        folder, calls = tmp_path / "path", tmp_path / "calls"
        folder.mkdir()
        (folder / "sacct").write_text(f"#!/bin/bash\necho \"$*\" >>'{calls}'\n{body}\n")
        (folder / "sacct").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return calls

    return arrange


def test_jobs_that_the_controller_forgot_are_known_to_the_accounting(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, sacct: Callable[[str], Path]
) -> None:
    recorded = jobs.recorded / "22.05"
    calls = sacct(f"cat '{recorded}/sacct.txt'")
    ids = {line.split("|")[1]: line.split("|")[0] for line in (recorded / "sacct.txt").read_text().splitlines()}
    scheduler = jobs.make_scheduler(tmp_path)
    said = scheduler.poll(ids | {f"{KEY}-77": "29959690"})
    expected = json.loads((recorded / "expected.json").read_text())["sacct"]
    for number, (state, nodes, elapsed_s) in expected.items():
        one = said[f"{KEY}-{number}"]
        assert (one.phase.value, one.cause.value, one.nodes, one.elapsed_s) == (*state, nodes, elapsed_s)
    assert said[f"{KEY}-77"].phase is SchedulerPhase.GONE, "an id says nothing"
    (call,) = calls.read_text().splitlines()
    assert "-S now-" in call, "without a start sacct looks at today only"
    assert f"{KEY}-77" in call
    assert scheduler.find(f"{KEY}-07", tmp_path) == [ids[f"{KEY}-07"]]
    assert said[f"{KEY}-10"].cause is EndCause.OUT_OF_MEMORY


def test_site_without_accounting_is_asked_once(
    shared: Cluster, jobs: SimpleNamespace, tmp_path: Path, sacct: Callable[[str], Path]
) -> None:
    calls = sacct('PATH=${PATH#*:}; exec sacct "$@"')
    scheduler = jobs.make_scheduler(tmp_path)
    for number in (1, 2):
        assert scheduler.poll({f"{KEY}-0{number}": "17"})[f"{KEY}-0{number}"].phase is SchedulerPhase.GONE
    assert scheduler.find(f"{KEY}-05", tmp_path) == []
    assert len(calls.read_text().splitlines()) == 1
    told = {finding.part: finding for finding in scheduler.check()}["Slurm accounting"]
    assert told.ok
    assert told.found.startswith("off (Slurm accounting storage is disabled): 600 s after its end")


def test_accounting_that_does_not_answer_is_left_alone_for_a_while(
    shared: Cluster,
    jobs: SimpleNamespace,
    tmp_path: Path,
    sacct: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = sacct("echo 'sacct: error: slurm_persist_conn_open: failed to connect' >&2; exit 1")
    scheduler = jobs.make_scheduler(tmp_path)
    for number in (1, 2):
        assert scheduler.poll({f"{KEY}-0{number}": "17"})[f"{KEY}-0{number}"].phase is SchedulerPhase.GONE
    assert len(calls.read_text().splitlines()) == 1
    assert "accounting does not answer" in caplog.text
