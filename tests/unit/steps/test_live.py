"""Acquisitions that are copied and reduced while they are written, by real jobs on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.config import Bytes, ScanSettings, SchedulerSettings, TransferSettings
from emflow.records import ACTIVE_JOB_STATES, AcquisitionState, JobState
from emflow.schedulers.local import LocalScheduler
from emflow.synthetic import write_empad, write_merlin, write_npy, write_raw
from emflow.transfer import digest_of
from mpi_kernels.exact import ExactScan

A, J = AcquisitionState, JobState
SCAN = ExactScan((8, 12), (16, 16), "uint16", seed=3)
EMPAD = ExactScan((16, 16), (128, 128), "float32", seed=2)  # ranks share floats in groups of frames
FORMATS: dict[str, Callable[[Path], Path]] = {
    "npy": lambda f: write_npy(SCAN, f / "scan.npy"),
    "raw": lambda f: write_raw(SCAN, f / "scan.raw"),
    "merlin": lambda f: write_merlin(SCAN, f / "scan.mib"),
    "empad": lambda f: write_empad(EMPAD, f / "scan_x16_y16.raw"),
}


@pytest.fixture
def growing(make_bench) -> Iterator[object]:
    """A bench that copies and reduces what grows, with jobs as processes of their own."""
    bench = make_bench(
        scheduler=LocalScheduler(grace_s=1.0),
        scheduling=SchedulerSettings(use="local", ranks=1),
        transfer=TransferSettings(min_free=Bytes(0), live=True),
        scan=ScanSettings(active_s=0.02, recent_s=0.1, whole_s=0.3, settle_s=0.1, stable_s=0.2, stall_s=300),
    )
    yield bench.open()
    for entry in bench.context.live.values():
        entry.copy.stop()
    bench.scheduler.cancel(*(job.scheduler_id for job in bench.journal.jobs_in(ACTIVE_JOB_STATES)))


class Writer:
    """A detector that writes a file in pieces; its further files are there before."""

    def __init__(self, bench, tmp_path: Path, name: str = "npy") -> None:
        away = tmp_path / "away"
        away.mkdir()
        self.source = FORMATS[name](away)
        self.bytes = self.source.read_bytes()
        self.path = bench.share / self.source.name
        for other in away.iterdir():
            if other != self.source:
                (bench.share / other.name).write_bytes(other.read_bytes())
        self.file = self.path.open("wb")
        self.at = 0

    def write(self, part: float) -> None:
        """Go on to a part of the whole."""
        until = int(part * len(self.bytes))
        self.file.write(self.bytes[self.at : until])
        self.file.flush()
        self.at = until

    def close(self) -> None:
        self.write(1.0)
        self.file.close()


def until(bench, condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < end, f"{what}: {bench.context.alarms}, {bench.context.live}"
        bench.turn(0.02)
        time.sleep(0.01)


def running(bench, writer: Writer, part: float = 0.4) -> None:
    """The job follows, and has done something."""
    writer.write(part)
    name = writer.path.name
    until(bench, lambda: list(bench.folder.glob("runs/*/*/01/partial-*.json")), "no partial result")
    assert bench.state(name) is A.GROWING
    assert [job.state for job in bench.jobs(name)] == [J.RUNNING]


def done(bench, writer: Writer, attempts: int) -> None:
    """It is done after so many attempts, and the result is that of the bytes that lie on the share."""
    name = writer.path.name
    until(bench, lambda: bench.state(name) is A.DONE, "not done")
    jobs = bench.jobs(name)
    assert [job.state for job in jobs] == [J.FAILED] * (attempts - 1) + [J.REDUCED]
    kept = bench.context.runs.read_acquisition(bench.one(name).day, bench.one(name).id)
    assert Path(kept.transfer.path).read_bytes() == writer.path.read_bytes()
    again = [(bench.share / os.fsdecode(m.relpath), m.relpath, m.suffix) for m in kept.transfer.members]
    assert digest_of(again).digest == bench.one(name).digest
    result = bench.context.runs.read_result(bench.job_folder(name))
    assert (result.source_digest, result.partial) == (bench.one(name).digest, False)


def maps(path: Path) -> dict[str, np.ndarray]:
    """All data of a result file, by path."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf" else None
            )
        )
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_what_grows_is_reduced_meanwhile_with_the_bits_of_a_whole_file(
    growing, make_bench, tmp_path: Path, name: str
) -> None:
    writer = Writer(growing, tmp_path, name)
    running(growing, writer)
    ready = growing.context.runs.newest_ready(next(growing.folder.glob("runs/*/*")))[1]
    assert not ready.complete
    assert 0 < ready.frames < (EMPAD if name == "empad" else SCAN).count
    for part in (0.6, 0.61, 0.9):
        writer.write(part)
        growing.turn(0.02)
    writer.close()
    done(growing, writer, attempts=1)
    assert growing.told(growing.one(writer.path.name).id) == ["noticed", "ready", "staged", "done"]
    usual = make_bench().open()
    for path in growing.share.iterdir():
        (usual.share / path.name).write_bytes(path.read_bytes())
    usual.work(40)
    live, whole = (maps(b.job_folder(writer.path.name) / "result.h5") for b in (growing, usual))
    data = [key for key in whole if "/data" in key or "image" in key or "sum" in key]
    assert live.keys() == whole.keys()
    assert data
    for key in data:
        np.testing.assert_array_equal(live[key], whole[key])


def test_a_writer_that_goes_back_is_noticed_and_the_whole_is_done_as_usual(growing, tmp_path: Path) -> None:
    writer = Writer(growing, tmp_path)
    running(growing, writer)
    writer.write(1.0)
    writer.file.seek(200)
    writer.file.write(b"\x07" * 64)  # within the first frame, which the live job has seen
    writer.file.close()
    done(growing, writer, attempts=2)
    assert growing.jobs()[0].reason.startswith("live: ")
    assert "changed since" in growing.jobs()[0].reason


def test_a_file_that_is_begun_again_is_done_as_usual(growing, tmp_path: Path) -> None:
    writer = Writer(growing, tmp_path)
    running(growing, writer)
    writer.file.seek(0)
    writer.file.truncate()
    writer.at = 0
    writer.write(0.2)
    until(growing, lambda: growing.jobs()[0].state is J.FAILED, "the live job was not ended")
    assert growing.state() is A.GROWING
    writer.close()
    done(growing, writer, attempts=2)


def test_a_writer_that_falls_silent_ends_the_live_job(growing, tmp_path: Path) -> None:
    writer = Writer(growing, tmp_path)
    running(growing, writer)
    growing.turn(1.0)
    growing.turn(400.0)
    until(growing, lambda: growing.jobs()[0].state is J.FAILED, "the live job was not ended")
    assert growing.state() is A.STALLED
    assert "STALLED" in growing.jobs()[0].reason
    writer.close()
    done(growing, writer, attempts=2)


def test_a_service_that_was_killed_ends_its_live_job_and_does_it_as_usual(growing, tmp_path: Path) -> None:
    writer = Writer(growing, tmp_path)
    running(growing, writer)
    for entry in growing.context.live.values():
        entry.copy.stop()  # a kill ends its threads too
    growing.open()
    growing.turn()
    assert growing.jobs()[0].state is J.FAILED
    assert "started anew" in growing.jobs()[0].reason
    writer.close()
    done(growing, writer, attempts=2)


def test_it_is_off_unless_it_is_asked_for(growing, tmp_path: Path) -> None:
    growing.transfer = TransferSettings(min_free=Bytes(0))
    growing.open()
    writer = Writer(growing, tmp_path)
    writer.write(0.4)
    for _ in range(20):
        growing.turn(0.02)
    assert growing.jobs() == []
    writer.close()
    done(growing, writer, attempts=1)


def test_a_folder_that_a_lost_journal_knew_of_is_left_alone(growing, tmp_path: Path) -> None:
    writer = Writer(growing, tmp_path)
    running(growing, writer)
    folder = growing.job_folder()
    for entry in growing.context.live.values():
        entry.copy.stop()
    growing.scheduler.cancel(growing.jobs()[0].scheduler_id)
    growing.journal.close()
    for path in (growing.folder / "state").iterdir():
        path.unlink()
    growing.open()
    writer.close()
    until(growing, lambda: growing.journal.latest("share", b"scan.npy"), "not noticed")
    until(growing, lambda: growing.state() is A.DONE, "not done")
    (job,) = growing.jobs()
    assert (job.attempt, folder.name) == (2, "01")
