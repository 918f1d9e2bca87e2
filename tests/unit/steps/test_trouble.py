"""Trouble that a review found: each of these once ended the loop, held others up, or published something wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from emflow.records import AcquisitionState, JobState, JobStatus, Resources
from emflow.schedulers.null import NullScheduler
from emflow.steps.examine import examine
from emflow.steps.follow import follow
from emflow.steps.stage import stage
from mpi_kernels import jsonfile
from mpi_kernels.contract import RESULT_H5

A, J = AcquisitionState, JobState


class Meddling(NullScheduler):
    """Runs a job in process, and lets a test change its run folder before anybody looks."""

    name: ClassVar[str] = "meddling"

    def __init__(self) -> None:
        super().__init__()
        self.meddle: list[object] = []

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        key = super().submit(name, folder, resources)
        if self.meddle:
            self.meddle.pop(0)(folder)  # type: ignore[operator]
        return key


@pytest.fixture
def meddled(make_bench):
    bench = make_bench(scheduler=Meddling()).open()
    bench.save()
    return bench


@pytest.mark.parametrize("attrs", ['{"x":NaN}', '{"x":1e999}', '{"x":-Infinity}'])
def test_a_bad_event_is_left_out_and_the_rest_is_kept(meddled, attrs: str) -> None:
    def add(folder: Path) -> None:
        log = next(folder.glob("events-*.jsonl"))
        line = json.loads(log.read_text().splitlines()[0]) | {"seq": 99, "name": "odd"}
        with log.open("a") as file:
            file.write(json.dumps(line | {"attrs": "ATTRS"}).replace('"ATTRS"', attrs) + "\n")

    meddled.scheduler.meddle = [add]
    meddled.work()
    assert meddled.state() is A.DONE
    names = {e.name for _, e in meddled.journal.events(trace=meddled.one().trace) if e.plane == "data"}
    assert "written" in names
    assert "odd" not in names


@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
def test_a_result_file_that_is_not_the_manifests_is_a_failed_attempt(meddled, how: str) -> None:
    def spoil(folder: Path) -> None:
        result = folder / RESULT_H5
        if how == "cut":
            os.truncate(result, 100)
        elif how == "changed":
            result.write_bytes(bytes(result.stat().st_size))
        else:
            result.unlink()

    meddled.scheduler.meddle = [spoil]
    meddled.work()
    assert meddled.state() is A.DONE
    assert [j.state for j in meddled.jobs()] == [J.FAILED, J.REDUCED]
    assert "result.json was written for" in meddled.jobs()[0].reason


def test_a_result_that_is_gone_before_it_was_published_needs_a_person(make_bench) -> None:
    bench = make_bench().open()
    bench.save()
    bench.look()
    while not (bench.journal.latest("share", b"scan.npy") and any(j.state is J.REDUCED for j in bench.jobs())):
        bench.turn(0.5)
        if bench.state() is A.STAGED and bench.jobs():
            follow(bench.context)
    shutil.rmtree(bench.job_folder())
    bench.work()
    assert bench.state() is A.QUARANTINED
    assert "gone" in bench.one().reason


def test_a_result_of_other_bytes_is_final(meddled) -> None:
    def forge(folder: Path) -> None:
        manifest = json.loads((folder / "result.json").read_text())
        jsonfile.publish(folder / "result.json", json.dumps(manifest | {"source_digest": "0" * 32}).encode())

    meddled.scheduler.meddle = [forge]
    meddled.work()
    assert meddled.state() is A.QUARANTINED
    assert "other bytes" in meddled.one().reason
    assert meddled.results == []


def test_a_run_folder_that_was_cleaned_away_holds_nobody_up(bench) -> None:
    bench.save("a.npy")
    bench.work()
    acquisition = bench.one("a.npy")
    shutil.rmtree(bench.context.runs.acquisition_folder(acquisition.day, acquisition.id))
    with bench.journal.transaction():  # what `emflow retry` of an earlier version, or a race with the cleaning, does
        bench.journal.move_acquisition(acquisition.id, A.DONE, A.STAGED)
    os.utime(bench.share / "a.npy", (1, 1))
    bench.save("b.npy", np.ones((2, 2, 3, 4), np.uint8))
    bench.work()
    assert bench.state("b.npy") is A.DONE
    assert bench.journal.acquisition(acquisition.id).state in (A.QUARANTINED, A.SUPERSEDED, A.DONE)


def test_many_that_wait_do_not_starve_one_that_can_go(make_bench) -> None:
    """More staged acquisitions of a share that is gone than any page holds, and one fresh file."""
    bench = make_bench().open()
    context = bench.context
    for n in range(150):
        bench.save(f"old{n:03}.npy", np.full((2, 2, 3, 4), n, np.uint8))
    bench.look()
    while bench.journal.counts()[0][A.READY] + bench.journal.counts()[0][A.GROWING]:
        examine(context)
        stage(context)
        for future in list(context.transfers.values()):
            future.result()
        bench.clock.now += 1.0
    assert bench.journal.counts()[0][A.STAGED] == 150
    for acquisition in bench.journal.acquisitions({A.STAGED}):
        context.back_off(acquisition.id, 1e6)
    bench.save("fresh.npy")
    bench.work(60)
    assert bench.state("fresh.npy") is A.DONE


def test_a_touched_file_is_read_but_not_copied_again(bench) -> None:
    path = bench.save()
    bench.work()
    os.utime(path, (5, 5))
    bench.work()
    assert bench.state() is A.SUPERSEDED
    assert bench.one().generation == 1
    copies = list((bench.folder / "runs").rglob("*.npy"))
    assert len(copies) == 1


def test_a_link_that_is_retried_is_set_aside_again_and_not_followed(bench) -> None:
    secret = bench.folder / "secret.npy"
    np.save(secret, np.ones((2, 2, 3, 4), np.uint8))
    (bench.share / "link.npy").symlink_to(secret)
    bench.work()
    assert bench.state("link.npy") is A.QUARANTINED
    bench.journal.move_acquisition(bench.one("link.npy").id, A.QUARANTINED, A.GROWING)
    bench.open().work()
    assert bench.state("link.npy") is A.QUARANTINED
    assert "symbolic link" in bench.one("link.npy").reason
    assert not list((bench.folder / "runs").rglob("*.npy"))


def test_a_sidecar_that_is_a_link_is_refused(bench) -> None:
    np.zeros((2, 3, 4, 5), np.uint8).tofile(bench.share / "scan.raw")
    described = bench.folder / "elsewhere.json"
    described.write_text(json.dumps({"shape": [2, 3, 4, 5], "dtype": "|u1"}))
    (bench.share / "scan.json").symlink_to(described)
    bench.work()
    assert bench.state("scan.raw") is A.QUARANTINED
    assert "symbolic link" in bench.one("scan.raw").reason


class Buggy(NullScheduler):
    """Leaves a job out of its answer, as a plug-in with a bug might."""

    name: ClassVar[str] = "buggy"

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        return {}

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        return "nothing"


def test_a_bug_in_a_plug_in_is_an_alarm_and_the_loop_goes_on(make_bench) -> None:
    bench = make_bench(scheduler=Buggy()).open()
    bench.save()
    bench.work(10)
    (job,) = bench.jobs()
    assert job.state is J.SUBMITTED
    assert "KeyError" in bench.context.alarms[f"trouble {job.name}"]
