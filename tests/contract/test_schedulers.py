"""What every registered scheduler must do, with the real kernels on real, small input."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emflow import registry
from emflow.config import load
from emflow.records import JobStatus, Resources, SchedulerPhase
from emflow.schedulers.pool_report import report
from emflow.schedulers.pool_setup import end_pools
from emflow.schedulers.protocol import Finding, Scheduler
from mpi_kernels import jsonfile
from mpi_kernels.contract import (
    CLAIM_FILE,
    ERROR_FILE,
    JOB_FILE,
    RESULT_FILE,
    RESULT_H5,
    Claim,
    ErrorRecord,
    JobSpec,
    Recipe,
    ReductionSpec,
    ResultManifest,
    SourceSpec,
)

NEEDS = {"slurm": ("slurm", "mpi"), "pyslurm": ("slurm", "mpi", "pyslurm"), "pool": ("mpi",)}
"""What a scheduler needs of the machine, by its name; the fixture of the first need is set up for it."""

SETTINGS = {"pool": 'ranks = 1\n[pool]\nlauncher = "mpiexec"\nwalltime_s = 120\n'}
"""Of the configuration, from [scheduler] on."""

ALIVE = {SchedulerPhase.PENDING, SchedulerPhase.RUNNING}


def every_scheduler() -> Iterator[Any]:
    for name in registry.names("schedulers"):
        yield pytest.param(name, marks=[getattr(pytest.mark, f"needs_{need}") for need in NEEDS.get(name, ())])


@pytest.fixture(params=every_scheduler())
def scheduler(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    if "slurm" in NEEDS.get(request.param, ()):
        for key, value in request.getfixturevalue("slurm").environment.items():
            monkeypatch.setenv(key, value)
    path = tmp_path / "emflow.toml"
    path.write_text(
        f'[[watch]]\nroot = "share"\n[scheduler]\nuse = "{request.param}"\n{SETTINGS.get(request.param, "")}'
    )
    config = load(path)
    made: Scheduler = registry.load("schedulers", request.param).from_config(config)
    try:
        if request.param == "pool":
            eventually(lambda: made.tend() or any(line.state == "idle" for line in report(config).pools))
        yield made
    finally:
        made.close()
        if request.param == "pool":
            end_pools(config)


def acquisition_at(root: Path) -> str:
    """An id that no other test uses: some schedulers outlive a test, and remember its jobs by name."""
    return hashlib.blake2b(bytes(root), digest_size=8).hexdigest()


def job_folder(root: Path, number: int) -> Path:
    return root / "runs" / "2024-05-01" / acquisition_at(root) / f"{number:02d}"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A scan of 2 x 3 frames of 4 x 5 pixels; its sum is known."""
    path = tmp_path / "scan.npy"
    np.save(path, np.arange(2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5))
    return path


def plan(root: Path, source: Path, number: int = 1, ranks: int = 1) -> tuple[str, Path]:
    """A run folder as the service makes it."""
    acquisition = acquisition_at(root)
    name, folder = f"{acquisition}-{number:02d}", job_folder(root, number)
    folder.mkdir(parents=True)
    spec = JobSpec(
        job=name,
        acquisition=acquisition,
        trace=acquisition,
        recipe=Recipe(name="test", reductions=(ReductionSpec(use="mpi_kernels.reductions.pattern:Pattern", name="p"),)),
        source=SourceSpec(path=str(source), format=registry.target("formats", "npy")),
        ranks=ranks,
    )
    jsonfile.publish(folder / JOB_FILE, jsonfile.encode(spec))
    return name, folder


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.02)


def status(scheduler: Scheduler, name: str, scheduler_id: str) -> JobStatus:
    return scheduler.poll({name: scheduler_id})[name]


def ended(scheduler: Scheduler, jobs: dict[str, str]) -> bool:
    return all(said.phase not in ALIVE for said in scheduler.poll(jobs).values())


def test_is_a_scheduler_of_its_name(scheduler: Scheduler, request: pytest.FixtureRequest) -> None:
    assert isinstance(scheduler, Scheduler)
    assert f"[{scheduler.name}]" in request.node.name


def test_job_runs_and_has_a_result(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    name, folder = plan(tmp_path, frames)
    assert scheduler.find(name, folder) == []
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    assert scheduler.find(name, folder) == [scheduler_id]
    eventually(lambda: ended(scheduler, {name: scheduler_id}))
    said = status(scheduler, name, scheduler_id)
    assert (said.scheduler_id, said.phase) == (scheduler_id, SchedulerPhase.ENDED)
    manifest = jsonfile.read(ResultManifest, folder / RESULT_FILE)
    assert (manifest.job, manifest.frames, manifest.ranks) == (name, 6, 1)
    assert (folder / RESULT_H5).stat().st_size > 0
    assert not (folder / ERROR_FILE).exists()
    assert scheduler.find(name, folder) == [scheduler_id], "an ended job is still known under its name"


def test_claim_tells_the_scheduler_s_id(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    name, folder = plan(tmp_path, frames)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    eventually(lambda: ended(scheduler, {name: scheduler_id}))
    claim = jsonfile.read(Claim, folder / CLAIM_FILE)
    assert claim.job == name
    assert scheduler.name != "pool" or scheduler_id.startswith("pool:")
    if scheduler.name == "pool":  # ranks that take one job after the other bear the id that they were started with
        assert claim.scheduler_id
        return
    assert claim.scheduler_id in (scheduler_id, "")  # a job in this process has no scheduler's environment
    assert claim.scheduler_id or scheduler.name == "null"


def test_failed_job_has_ended_with_an_error_and_no_result(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    frames.write_bytes(frames.read_bytes()[:-7])
    name, folder = plan(tmp_path, frames)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    eventually(lambda: ended(scheduler, {name: scheduler_id}))
    assert status(scheduler, name, scheduler_id).phase is SchedulerPhase.ENDED
    error = jsonfile.read(ErrorRecord, folder / ERROR_FILE)
    assert (error.job, error.path) == (name, str(frames))
    assert error.next_step or error.frame is not None
    assert not (folder / RESULT_FILE).exists()


def test_two_jobs_at_once_are_told_apart(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    jobs = {}
    for number in (1, 2):
        name, folder = plan(tmp_path, frames, number)
        jobs[name] = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    assert len(set(jobs.values())) == 2
    said = scheduler.poll(jobs)
    assert said.keys() == jobs.keys()
    assert all(said[name].scheduler_id == jobs[name] for name in jobs)
    eventually(lambda: ended(scheduler, jobs))
    for name in jobs:
        folder = job_folder(tmp_path, int(name[-2:]))
        assert jsonfile.read(ResultManifest, folder / RESULT_FILE).job == name


def test_unknown_id_is_gone_and_unknown_name_not_found(scheduler: Scheduler, tmp_path: Path) -> None:
    name = f"{acquisition_at(tmp_path)}-07"
    assert status(scheduler, name, "no-such-job").phase is SchedulerPhase.GONE
    assert scheduler.find(name, tmp_path / "absent") == []
    assert scheduler.poll({}) == {}


def test_cancel_of_ended_and_unknown_jobs_is_no_error(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    name, folder = plan(tmp_path, frames)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    eventually(lambda: ended(scheduler, {name: scheduler_id}))
    scheduler.cancel(scheduler_id, "no-such-job")
    scheduler.cancel()
    assert (folder / RESULT_FILE).exists()


def test_cancelled_job_has_ended_when_cancel_returns(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    name, folder = plan(tmp_path, frames)
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    scheduler.cancel(scheduler_id)
    assert status(scheduler, name, scheduler_id).phase is SchedulerPhase.ENDED
    before = (folder / RESULT_FILE).exists()
    time.sleep(0.3)
    assert (folder / RESULT_FILE).exists() == before, "it went on after cancel"


def test_foreign_claim_is_respected(scheduler: Scheduler, tmp_path: Path, frames: Path) -> None:
    name, folder = plan(tmp_path, frames)
    other = Claim(job=name, host="elsewhere", pid=1, scheduler_id="17", wall_ns=1)
    (folder / CLAIM_FILE).write_bytes(jsonfile.encode(other))
    scheduler_id = scheduler.submit(name, folder, Resources(ranks=1, time_limit_s=60))
    eventually(lambda: ended(scheduler, {name: scheduler_id}))
    assert not (folder / RESULT_FILE).exists()
    assert not (folder / ERROR_FILE).exists()
    assert jsonfile.read(Claim, folder / CLAIM_FILE) == other


def test_check_tells_what_is_there_and_how_to_fix_the_rest(scheduler: Scheduler) -> None:
    for finding in scheduler.check():
        assert isinstance(finding, Finding)
        assert finding.part
        assert finding.found
        assert finding.ok or finding.fix, f"{finding.part} is missing and nobody says what to do"


@pytest.mark.needs_mpi
def test_local_scheduler_uses_as_many_ranks_as_asked_for(tmp_path: Path, frames: Path) -> None:
    local: Scheduler = registry.load("schedulers", "local")()
    assert all(finding.ok for finding in local.check()), local.check()
    name, folder = plan(tmp_path, frames, ranks=2)
    scheduler_id = local.submit(name, folder, Resources(ranks=2, time_limit_s=60))
    eventually(lambda: ended(local, {name: scheduler_id}))
    manifest = jsonfile.read(ResultManifest, folder / RESULT_FILE)
    assert (manifest.ranks, manifest.frames) == (2, 6)
    assert jsonfile.read(Claim, folder / CLAIM_FILE).scheduler_id == scheduler_id
    local.close()
