"""Run folders: named by ids only, every file whole or not there, one service for one state folder."""

import json
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow.errors import Busy, SubmitError
from emflow.records import Acquisition, AcquisitionState, Fingerprint, MemberCopy, Transfer
from emflow.runs import AcquisitionFile, RunFolders, failure_reason, holder, lock
from mpi_kernels import jsonfile
from mpi_kernels.contract import Claim, ErrorRecord, Event, JobSpec, Ready, Recipe, ReductionSpec, SourceSpec
from mpi_kernels.errors import FormatError

KEY, DAY = "0123456789abcdef", "2024-05-06"
PRINT = Fingerprint(size=1, mtime_ns=2**70, ctime_ns=-3)


def spec(job=f"{KEY}-01", **more):
    facts = {
        "recipe": Recipe(name="default", reductions=(ReductionSpec(use="m:A", name="a"),)),
        "source": SourceSpec(path="/runs/x/source/f.h5", format="m:B", digest="d"),
        "acquisition": KEY,
        "trace": KEY,
    }
    return JobSpec(job=job, **facts | more)


def transfer(digest="d" * 32, path="/x/\udcff.h5"):
    member = MemberCopy(relpath=b"d/\xff.h5", suffix=".h5", fingerprint=PRINT, xxh3_128="e" * 32)
    return Transfer(members=(member,), path=path, digest=digest, bytes=9, seconds=0.5)


def acquisition(**more):
    facts = {
        "id": KEY,
        "share": "scope",
        "relpath": b"d/\xff\n.h5",
        "generation": 2,
        "state": AcquisitionState.READY,
        "day": DAY,
        "trace": KEY,
        "seen_ns": 1,
        "changed_ns": 2,
        "fingerprint": PRINT,
        "format": "hdf5",
        "kind": "4d",
        "frames": 12,
        "supersedes": "f" * 16,
    }
    return Acquisition(**facts | more)


@pytest.fixture
def runs(tmp_path):
    return RunFolders(tmp_path / "runs")


# --- names


def test_folders_are_named_by_ids(runs):
    folder = runs.acquisition_folder(DAY, KEY)
    assert folder == runs.root / DAY / KEY
    assert runs.source_folder(DAY, KEY) == folder / "source"
    assert runs.job_folder(DAY, f"{KEY}-07") == folder / "07"
    assert not runs.root.exists()


@pytest.mark.parametrize(
    ("day", "key"),
    [("..", KEY), (DAY, ".."), (DAY, KEY.upper()), (DAY + "\n", KEY), ("2024-5-6", KEY), (DAY, KEY + "0"), ("", "")],
)
def test_nothing_else_names_a_folder(runs, day, key):
    with pytest.raises(ValueError, match="no name of a run folder"):
        runs.acquisition_folder(day, key)


@pytest.mark.parametrize("job", [KEY, f"{KEY}-1", f"{KEY}-001", f"{KEY}-01\n", f"../{KEY}-01", ""])
def test_nothing_else_names_a_job(runs, job):
    with pytest.raises(ValueError, match="no name of a job"):
        runs.job_folder(DAY, job)


def test_only_folders_that_are_named_like_ours_are_walked(runs, tmp_path):
    for day, key in ((DAY, KEY), ("2023-01-01", "f" * 16), ("notes", KEY), (DAY, "lost+found")):
        (runs.root / day / key).mkdir(parents=True)
    (runs.root / DAY / ("a" * 16)).symlink_to(tmp_path)
    (runs.root / DAY / ("b" * 16)).write_text("a file")
    assert list(runs.acquisition_folders()) == [runs.root / "2023-01-01" / ("f" * 16), runs.root / DAY / KEY]
    for name in ("02", "01", "source", "1"):
        (runs.root / DAY / KEY / name).mkdir()
    assert [f.name for f in runs.job_folders(runs.root / DAY / KEY)] == ["01", "02"]
    assert list(RunFolders(tmp_path / "none").acquisition_folders()) == []


# --- acquisition.json


def test_an_acquisition_survives_its_file(runs):
    record = AcquisitionFile.of(acquisition(), transfer())
    path = runs.write_acquisition(record)
    assert path.read_bytes().isascii()
    assert runs.read_acquisition(DAY, KEY) == record
    back = record.acquisition(AcquisitionState.STAGED)
    expected = acquisition(state=AcquisitionState.STAGED, digest="d" * 32, changed_ns=record.staged_ns)
    assert back == expected


@given(
    relpath=st.binary(min_size=1, max_size=255),
    path=st.text(st.characters(), max_size=30),
    size=st.integers(0, 2**63),
    mtime_ns=st.integers(-(2**80), 2**80),
    supersedes=st.none() | st.just("f" * 16),
)
def test_any_name_and_date_survives(tmp_path_factory, relpath, path, size, mtime_ns, supersedes):
    runs = RunFolders(tmp_path_factory.mktemp("runs"))
    shape = Fingerprint(size=size, mtime_ns=mtime_ns, ctime_ns=0)
    one = acquisition(relpath=relpath, fingerprint=shape, supersedes=supersedes)
    record = AcquisitionFile.of(one, transfer(path=path))
    runs.write_acquisition(record)
    assert runs.read_acquisition(DAY, KEY) == record


def test_the_first_record_of_a_digest_stays(runs):
    first = AcquisitionFile.of(acquisition(), transfer())
    again = msgspec.structs.replace(first, staged_ns=7)
    other = AcquisitionFile.of(acquisition(), transfer(digest="c" * 32))
    runs.write_acquisition(first)
    runs.write_acquisition(again)
    assert runs.read_acquisition(DAY, KEY) == first
    runs.write_acquisition(other)
    assert runs.read_acquisition(DAY, KEY) == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 2}, "version 2 is not 1"),
        ({"day": "2024-05-07"}, "belongs to 2024-05-07"),
        ({"frames": "3"}, "Expected `int`"),
        ({"frames": None}, "Expected `int`"),
        ({"new": 1}, "unknown field"),
        ({"relpath": "%"}, "base64"),
    ],
)
def test_a_foreign_record_is_refused(runs, change, message):
    path = runs.write_acquisition(AcquisitionFile.of(acquisition(), transfer()))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message) as caught:
        runs.read_acquisition(DAY, KEY)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null"])
def test_a_torn_record_is_refused(runs, text):
    path = runs.write_acquisition(AcquisitionFile.of(acquisition(), transfer()))
    path.write_text(text)
    with pytest.raises(FormatError):
        runs.read_acquisition(DAY, KEY)


# --- job.json, ready-<n>.json and what comes back


def test_job_file_is_written_once(runs):
    folder = runs.write_job(spec(), DAY)
    assert folder == runs.job_folder(DAY, f"{KEY}-01")
    before = (folder / "job.json").stat().st_mtime_ns
    assert runs.write_job(spec(), DAY) == folder
    assert (folder / "job.json").stat().st_mtime_ns == before
    assert runs.read_job(folder) == spec()
    with pytest.raises(SubmitError, match="different job"):
        runs.write_job(spec(ranks=3), DAY)
    assert runs.read_job(folder) == spec()
    assert [p.name for p in folder.iterdir()] == ["job.json"]


def test_ready_numbers_rise_and_the_newest_counts(runs):
    folder = runs.acquisition_folder(DAY, KEY)
    assert runs.newest_ready(folder) is None
    for n in range(1, 12):
        assert runs.publish_ready(folder, frames=n, complete=False, digest=None).name == f"ready-{n}.json"
    assert runs.newest_ready(folder) == (11, Ready(frames=11, complete=False, digest=None))
    runs.publish_ready(folder, frames=11, complete=True, digest="d")
    assert runs.publish_ready(folder, frames=11, complete=True, digest="d").name == "ready-12.json"
    (folder / "ready-99.json.tmp").write_text("no")
    (folder / "ready-x.json").write_text("no")
    assert runs.newest_ready(folder)[0] == 12


def test_what_is_not_there_is_none_and_what_is_torn_is_an_error(runs):
    folder = runs.write_job(spec(), DAY)
    assert [runs.read_claim(folder), runs.read_result(folder), runs.read_error(folder)] == [None, None, None]
    claim = Claim(job=f"{KEY}-01", host="n", pid=1, scheduler_id="7", wall_ns=5)
    (folder / "claim").write_bytes(jsonfile.encode(claim))
    (folder / "result.json").write_text("{")
    assert runs.read_claim(folder) == claim
    with pytest.raises(FormatError, match="not JSON"):
        runs.read_result(folder)


def test_heartbeat_is_old_when_it_stops_changing_whatever_its_date_says(runs):
    folder = runs.write_job(spec(), DAY)
    assert runs.heartbeat_age(folder) is None
    beat = folder / "heartbeat"
    beat.write_text("1")
    os.utime(beat, ns=(0, 10**18))  # the node's clock is decades off
    assert runs.heartbeat_age(folder) == 0
    time.sleep(0.02)
    assert 0.02 <= runs.heartbeat_age(folder) < 10
    os.utime(beat, ns=(0, 10**18 - 5))
    assert runs.heartbeat_age(folder) == 0


def event(seq):
    return Event(
        trace="t",
        subject="s",
        plane="data",
        host="h",
        pid=1,
        seq=seq,
        name="n",
        wall_ns=1,
        mono_ns=1,
        attrs={"p": "\udcff"},
    )


def test_events_are_collected_and_torn_lines_told(runs, tmp_path):
    lines = [jsonfile.encode(event(n)) for n in range(4)]
    (tmp_path / "events-h-1.jsonl").write_bytes(lines[0] + b"\n" + lines[1] + b"\n" + lines[2][:20])
    (tmp_path / "events-h-2.jsonl").write_bytes(
        b"{}\n" + lines[3] + b"\n\xff\n" + jsonfile.encode(event(2**64)) + b"\n" + b"[" * 100_000 + b"\n"
    )
    (tmp_path / "events-h-3.jsonl").mkdir()
    problems = []
    assert runs.collect_events(tmp_path, problems) == [event(0), event(1), event(3)]
    assert [p.partition(": ")[0].rpartition("/")[2] for p in problems] == [
        "events-h-2.jsonl:1",
        "events-h-2.jsonl:3",
        "events-h-2.jsonl:4",
        "events-h-2.jsonl:5",
        "events-h-3.jsonl",
    ]
    assert len(runs.collect_events(tmp_path)) == 3
    assert runs.collect_events(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"code": "stopped", "retryable": True}, "stopped: m. do"),
        ({"code": "no-space", "retryable": False}, "no-space: m. do"),
        ({"retryable": True, "frame": 3, "next_step": ""}, "m (frame 3)"),
        ({"retryable": False}, "final: m. do"),
    ],
)
def test_reason_of_a_failure(facts, reason):
    base = {"code": "x", "message": "m", "path": None, "frame": None, "next_step": "do", "retryable": True}
    base |= {"job": "j", "rank": 0, "host": "h", "traceback": "", "wall_ns": 1}
    assert failure_reason(ErrorRecord(**base | facts)) == reason


# --- the lock

HOLD = """
import sys, time
from emflow.runs import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_service_is_refused_with_the_pid_of_the_first(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        assert holder(tmp_path) == first.pid
        with pytest.raises(Busy, match=f"process {first.pid} holds") as caught, lock(tmp_path):
            pass
        assert (caught.value.pid, caught.value.exit_code) == (first.pid, 75)
        assert holder(tmp_path) == first.pid
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert holder(tmp_path) is None  # its record is still there, but it is not
    assert str(first.pid) in (tmp_path / "service.lock").read_text()
    with lock(tmp_path):
        assert holder(tmp_path) == os.getpid()
    assert holder(tmp_path) is None


def test_a_reused_pid_is_not_the_holder(tmp_path):
    with lock(tmp_path):
        record = json.loads((tmp_path / "service.lock").read_text())
        assert record["pid"] == os.getpid()
    (tmp_path / "service.lock").write_text(json.dumps(record | {"ticks": record["ticks"] + 1}))
    assert holder(tmp_path) is None


def test_the_lock_is_held_by_the_kernel_not_by_the_record(tmp_path):
    with lock(tmp_path):
        (tmp_path / "service.lock").write_text("")
        with pytest.raises(Busy, match="another process") as caught, lock(tmp_path):
            pass
        assert caught.value.pid is None
