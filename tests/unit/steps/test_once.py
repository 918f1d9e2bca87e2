"""``run_once`` ends in every situation, with an alarm wherever something is left that a service would wait for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from emflow.config import Bytes, ScanSettings, SchedulerSettings, TransferSettings
from emflow.errors import NoSpace, SubmitError, Unavailable
from emflow.pipeline import Pipeline, load_looks, open_pipeline
from emflow.prober import Prober
from emflow.records import AcquisitionState, JobState, JobStatus, Resources, SchedulerPhase
from emflow.schedulers.null import NullScheduler
from emflow.steps.context import open_alarms

A, J = AcquisitionState, JobState
QUICK = ScanSettings(active_s=0.05, recent_s=0.1, whole_s=0.2, settle_s=0.05, stable_s=0.2, stall_s=30, quarantine_s=60)


class Moody(NullScheduler):
    """The null scheduler, but one of its parts raises for ever, or every job vanishes."""

    name: ClassVar[str] = "moody"

    def __init__(self, *, refuses: Exception | None = None, silent: bool = False, loses: bool = False) -> None:
        super().__init__()
        self.refuses, self.silent, self.loses = refuses, silent, loses

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        if self.refuses is not None:
            raise self.refuses
        return f"lost-{name}" if self.loses or self.silent else super().submit(name, folder, resources)

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        if self.silent:
            raise Unavailable("the scheduler does not answer")
        if self.loses:
            return {n: JobStatus(scheduler_id=s, phase=SchedulerPhase.GONE) for n, s in jobs.items()}
        return super().poll(jobs)


@pytest.fixture
def once(make_bench):
    """Run once over a bench whose clock is the real one; returns the alarms that are left."""

    def run(bench, *, shares: bool = True) -> dict[str, str]:
        bench.clock, bench.scan = time.monotonic, QUICK
        bench.open(shares=shares)
        woken = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            bench.context.wake = lambda: os.eventfd_write(woken, 1)
            Pipeline(bench.context, woken).run_once()
        finally:
            os.close(woken)
        return dict(bench.context.alarms)

    return run


def test_nothing_there(make_bench, once) -> None:
    assert once(make_bench()) == {}


def test_everything_is_carried_to_its_end(make_bench, once) -> None:
    bench = make_bench()
    for n in range(5):
        bench.save(f"{n}.npy")
    (bench.share / "nonsense.npy").write_bytes(b"nonsense")
    assert once(bench) == {}
    assert len(bench.results) == 5
    assert bench.state("nonsense.npy") is A.QUARANTINED


def test_only_incomplete_files(make_bench, once) -> None:
    bench = make_bench()
    os.truncate(bench.save(), 300)
    (bench.share / "empty.npy").touch()
    assert once(bench) == {}
    assert (bench.state(), bench.state("empty.npy")) == (A.GROWING, A.GROWING)


def test_a_file_that_a_program_keeps_open(make_bench, once) -> None:
    bench = make_bench()
    with bench.save().open("r+b"):
        assert once(bench) == {}
        assert bench.state() is A.GROWING


def test_a_file_that_vanished(make_bench, once) -> None:
    bench = make_bench().open()
    path = bench.save()
    bench.save("other.npy")
    bench.look()
    path.unlink()
    assert once(bench) == {}
    assert bench.state("other.npy") is A.DONE


def test_a_share_that_is_missing(make_bench, once) -> None:
    bench = make_bench()
    bench.share.rmdir()
    assert list(once(bench)) == ["share share"]


def test_a_share_that_is_gone_from_the_configuration(make_bench, once) -> None:
    bench = make_bench().open()
    bench.save()
    bench.look()
    bench.turn()
    assert bench.state() is A.READY
    assert list(once(bench, shares=False)) == ["share share"]


def test_no_room(make_bench, once) -> None:
    bench = make_bench(transfer=TransferSettings(min_free=Bytes(1 << 60)))
    bench.save()
    assert list(once(bench)) == ["disk runs"]
    assert bench.state() is A.READY


@pytest.mark.parametrize(
    ("scheduler", "alarms", "state"),
    [
        (Moody(refuses=Unavailable("no answer")), ["scheduler"], A.STAGED),
        (Moody(refuses=SubmitError("limit", transient=True)), ["scheduler"], A.STAGED),
        (Moody(refuses=NoSpace("no room to start")), ["disk runs"], A.STAGED),
        (Moody(refuses=SubmitError("no such partition")), [], A.QUARANTINED),
        (Moody(silent=True), ["scheduler poll"], A.STAGED),
        (Moody(loses=True), [], A.QUARANTINED),
    ],
    ids=["away", "refused for now", "no room", "refused", "silent", "every attempt vanishes"],
)
def test_a_scheduler_that_does_not_do_it(make_bench, once, scheduler, alarms: list[str], state: A) -> None:
    bench = make_bench(scheduler=scheduler, scheduling=SchedulerSettings(use="null", ranks=1, attempts=2, poll_s=0.05))
    bench.save()
    assert list(once(bench)) == alarms
    assert bench.state() is state


def test_headers_that_cannot_be_read_because_no_process_starts(make_bench, once) -> None:
    with Prober({"npy": "no_such_module:Npy"}) as broken:
        bench = make_bench(prober=broken)
        bench.save()
        (alarm,) = once(bench).values()
    assert "does not start" in alarm
    assert bench.state() is A.GROWING


def test_a_result_that_cannot_be_published(make_bench, once) -> None:
    bench = make_bench()
    (bench.folder / "results").write_text("a file where a folder should be")
    bench.save()
    assert len(once(bench)) == 1
    assert bench.state() is A.STAGED


@pytest.mark.needs_root
def test_a_full_disk_of_the_journal(make_bench, once) -> None:
    bench = make_bench()
    state = bench.folder / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(state)], check=True)
    try:
        once(bench)
        for n in range(400):
            (bench.share / f"{n}.npy").touch()
        with (state / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        woken = os.eventfd(0, os.EFD_NONBLOCK)
        pipeline = Pipeline(bench.context, woken)
        pipeline.run_once()
        assert list(bench.context.alarms) == ["journal"]
        (state / "ballast").unlink()
        pipeline.run_once()
        os.close(woken)
        assert bench.context.alarms == {}
        assert len(bench.journal.acquisitions()) == 400
        bench.close()
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


def test_alarms_of_an_earlier_service_are_over_when_the_next_one_does_not_find_them(make_bench, once) -> None:
    bench = make_bench()
    bench.share.rmdir()
    once(bench)
    assert list(open_alarms(bench.journal)) == ["share share"]
    bench.close()
    bench.share.mkdir()
    bench.save()
    with open_pipeline(msgspec.structs.replace(bench.context.config, watch=bench.context.config.watch)) as pipeline:
        pipeline.run_once()
        assert open_alarms(pipeline.context.journal) == {}
        assert pipeline.context.journal.counts()[0][A.DONE] == 1


def test_what_another_process_moved_is_taken_up(make_bench, once) -> None:
    bench = make_bench()
    (bench.share / "scan.npy").write_bytes(b"nonsense")
    once(bench)
    assert bench.state() is A.QUARANTINED
    with (bench.share / "scan.npy").open("r+b") as file:
        np.save(file, np.ones((2, 3, 4, 5), np.uint16))
    bench.journal.move_acquisition(bench.one().id, A.QUARANTINED, A.GROWING)
    load_looks(bench.context)
    assert list(bench.context.looks) == [bench.one().id]
