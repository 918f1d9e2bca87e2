"""The service as people use it: commands, exit codes, retry, rewritten files, a lost journal, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.records import AcquisitionState, JobState

GOOD = np.arange(3 * 4 * 8 * 9, dtype=np.uint16).reshape(3, 4, 8, 9)


def test_from_a_file_on_the_share_to_a_result(make_place) -> None:
    place = make_place(scheduler="local", ranks=2)
    with place.start() as service:
        np.save(place.share / "scan.npy", GOOD)
        service.until_state("scan.npy", AcquisitionState.DONE)
    (result,) = place.results
    with h5py.File(result) as file:
        assert np.array_equal(file["pattern/sum/data"], GOOD.sum(axis=(0, 1)))
    row = place.json("status")["newest"][0]
    assert row["state"] == "DONE"
    assert {"noticed", "ready", "staged", "submitted", "reduced", "done"} <= set(row["seconds"])
    events = place.json("trace", row["id"])["events"]
    names = [e["name"] for e in events]
    assert names.index("noticed") < names.index("ready") < names.index("staged") < names.index("done")
    assert {e["plane"] for e in events} == {"management", "data"}  # the kernels' own events are merged
    assert "scan.npy" in place.emflow("trace", row["job"]).stdout


def test_second_service_is_refused_with_the_pid(place) -> None:
    with place.start() as service:
        second = place.emflow("run", "--once", code=75)
        assert str(service.process.pid) in second.stderr
        assert place.json("status")["service"] == {"running": True, "pid": service.process.pid}
    assert place.json("status")["service"]["running"] is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_jobs(make_place, number: signal.Signals) -> None:
    place = make_place(scheduler="local")
    shape = (128, 128, 128, 128)
    service = place.start()
    np.lib.format.open_memmap(place.share / "big.npy", mode="w+", dtype=np.uint16, shape=shape).flush()

    def running() -> bool:
        with place.journal() as journal:
            return bool(journal.jobs_in({JobState.SUBMITTED, JobState.RUNNING}))

    service.until(running)
    with place.journal() as journal:
        (job,) = journal.jobs_in({JobState.SUBMITTED, JobState.RUNNING})
    assert service.stop(number) == 128 + number
    pid = int(job.scheduler_id.split("@")[0])
    assert not Path(f"/proc/{pid}").exists()
    # a stopped attempt does not count, and the next service goes on
    place.emflow("run", "--once")
    assert place.states() == {"big.npy": AcquisitionState.DONE}


def test_rewritten_file_supersedes_and_touched_file_does_not(place) -> None:
    path = place.share / "scan.npy"
    with place.start() as service:
        np.save(path, GOOD)
        service.until_state("scan.npy", AcquisitionState.DONE)
        np.save(path, GOOD + 1)
        service.until(lambda: len(place.results) == 2)
        service.until_state("scan.npy", AcquisitionState.DONE)
        os.utime(path)
        service.until_state("scan.npy", AcquisitionState.SUPERSEDED)
    with place.journal() as journal:
        first, second, third = journal.acquisitions()
    assert (first.state, second.state, third.state) == ("SUPERSEDED", "DONE", "SUPERSEDED")
    assert second.supersedes == first.id
    assert third.supersedes == second.id
    assert "same bytes" in third.reason
    assert len(place.results) == 2


def test_retry_of_a_quarantined_file(place) -> None:
    (place.share / "scan.npy").write_bytes(b"nonsense" * 100)
    place.emflow("run", "--once", code=1)
    (row,) = place.json("status")["newest"]
    assert row["state"] == "QUARANTINED"
    place.emflow("retry", row["id"])
    place.emflow("run", "--once", code=1)
    np.save(place.share / "scan.npy", GOOD)
    place.emflow("run", "--once")  # a change is enough, without retry
    assert place.states() == {"scan.npy": AcquisitionState.DONE}


def test_retry_of_a_finished_one_makes_another_job(place) -> None:
    np.save(place.share / "scan.npy", GOOD)
    place.emflow("run", "--once")
    (row,) = place.json("status")["newest"]
    place.emflow("retry", row["id"][:6])
    place.emflow("run", "--once")
    (again,) = place.json("status")["newest"]
    assert (again["state"], again["job"]) == ("DONE", row["id"] + "-02")
    assert "no acquisition" in place.emflow("retry", "ffff", code=2).stderr


@pytest.mark.parametrize("lost", ["folder", "record", "copy"])
def test_retry_where_the_copy_is_gone_copies_again(place, lost: str) -> None:
    np.save(place.share / "scan.npy", GOOD)
    place.emflow("run", "--once")
    (row,) = place.json("status")["newest"]
    (record,) = (place.folder / "runs").glob("*/*/acquisition.json")
    copy = Path(json.loads(record.read_text())["transfer"]["path"])
    if lost == "folder":
        record.parent.rename(place.folder / "elsewhere")
    else:
        (record if lost == "record" else copy).unlink()
    assert "its copy is gone" in place.emflow("retry", row["id"]).stdout
    with place.journal() as journal:
        again = journal.acquisition(row["id"])
    assert (again.state, again.digest) == (AcquisitionState.GROWING, None)
    place.emflow("run", "--once")
    assert place.states() == {"scan.npy": AcquisitionState.DONE}
    assert copy.exists()


def test_a_lost_journal_is_rebuilt(place) -> None:
    np.save(place.share / "scan.npy", GOOD)
    place.emflow("run", "--once")
    with place.journal() as journal:
        before = journal.acquisitions()
    for file in (place.folder / "state").iterdir():
        file.unlink()
    assert place.json("rebuild")["acquisitions"] == 1
    with place.journal() as journal:
        after = journal.acquisitions()
    assert [(a.id, a.state, a.digest, a.relpath) for a in after] == [
        (a.id, a.state, a.digest, a.relpath) for a in before
    ]
    place.emflow("run", "--once")
    assert len(place.results) == 1
    assert place.json("status")["newest"][0]["job"].endswith("-01")


def test_rebuild_is_refused_beside_a_running_service(place) -> None:
    with place.start():
        place.emflow("rebuild", code=75)


def test_a_share_that_vanishes_is_an_alarm_and_comes_back(place) -> None:
    with place.start() as service:
        np.save(place.share / "one.npy", GOOD)
        service.until_state("one.npy", AcquisitionState.DONE)
        away = place.folder / "away"
        place.share.rename(away)
        service.until(lambda: "share share" in place.json("status")["alarms"])
        assert place.states() == {"one.npy": AcquisitionState.DONE}
        away.rename(place.share)
        service.until(lambda: not place.json("status")["alarms"])
        np.save(place.share / "two.npy", GOOD)
        service.until_state("two.npy", AcquisitionState.DONE)


@pytest.mark.needs_root
def test_full_disk_holds_work_back_and_lets_go(make_place) -> None:
    place = make_place()
    runs = place.folder / "runs"
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(runs)], check=True)
    try:
        ballast = runs / "ballast"
        ballast.write_bytes(bytes(3 << 20))
        with place.start() as service:
            np.save(place.share / "scan.npy", np.ones((4, 4, 64, 64), np.uint16))
            service.until(lambda: any(name.startswith("disk") for name in place.json("status")["alarms"]))
            assert place.states()["scan.npy"] is AcquisitionState.READY
            ballast.unlink()
            service.until_state("scan.npy", AcquisitionState.DONE)
            service.until(lambda: not place.json("status")["alarms"])
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


@pytest.mark.needs_root
def test_full_results_disk_holds_publishing_back(make_place) -> None:
    place = make_place()
    results = place.folder / "results"
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(results)], check=True)
    try:
        ballast = results / "ballast"
        ballast.write_bytes(bytes(60 << 10))
        with place.start() as service:
            np.save(place.share / "scan.npy", GOOD)
            service.until(lambda: any(name.startswith("disk") for name in place.json("status")["alarms"]))
            assert place.states()["scan.npy"] is AcquisitionState.STAGED
            assert place.results == []
            subprocess.run(["mount", "-o", "remount,size=16m", str(results)], check=True)
            service.until_state("scan.npy", AcquisitionState.DONE)
    finally:
        subprocess.run(["umount", "-l", str(results)], check=True)


@pytest.mark.needs_root
def test_full_journal_disk_stops_everything_until_there_is_room(make_place) -> None:
    place = make_place()
    state = place.folder / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(state)], check=True)
    try:
        with place.start() as service:
            np.save(place.share / "one.npy", GOOD)
            service.until_state("one.npy", AcquisitionState.DONE)
            ballast = state / "ballast"
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            for n in range(20):
                np.save(place.share / f"more{n}.npy", GOOD + n)
            service.until(lambda: "the disk of the journal is full" in service.log.read_text())
            ballast.unlink()
            service.until(lambda: len(place.results) == 21)
            service.until(lambda: set(place.states().values()) == {AcquisitionState.DONE})
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


@pytest.mark.needs_mpi
def test_a_killed_rank_fails_the_attempt_and_the_next_one_runs(make_place) -> None:
    place = make_place(scheduler="local", ranks=2)
    shape = (128, 128, 128, 128)
    with place.start() as service:
        np.lib.format.open_memmap(place.share / "big.npy", mode="w+", dtype=np.uint16, shape=shape).flush()

        def kernels() -> list[int]:
            found = []
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    words = (process / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"mpi_kernels" in words and os.fsencode(str(place.folder)) in b" ".join(words):
                    found += [int(process.name)] if b"python" in words[0] else []
            return found

        service.until(lambda: len(kernels()) >= 2)
        killed_ns = time.time_ns()
        os.kill(kernels()[-1], signal.SIGKILL)
        service.until_state("big.npy", AcquisitionState.DONE, timeout_s=60)
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        jobs = journal.jobs(acquisition.id)
        assert [j.state for j in jobs] == [JobState.FAILED, JobState.REDUCED]
        failed = {e.name: e.wall_ns for _, e in journal.events(subject=jobs[0].name)}
    assert (failed["failed"] - killed_ns) / 1e9 < 2


def test_exit_codes(place, tmp_path: Path) -> None:
    assert place.emflow("no-such-command", code=2).stderr
    assert "did you mean 'status'" in place.emflow("statsu", code=2).stderr
    (tmp_path / "bad.toml").write_text("[[watch]]\nroot = 'share'\nrecpie = 'default'\n")
    wrong = subprocess.run(
        [*place.command()[:3], "-c", str(tmp_path / "bad.toml"), "run", "--once"], capture_output=True, text=True
    )
    assert wrong.returncode == 78
    assert "bad.toml:3" in wrong.stderr
    assert "recpie" in wrong.stderr
    assert "recipe" in wrong.stderr
    missing = subprocess.run([*place.command()[:3], "-c", "nowhere.toml", "status"], capture_output=True, text=True)
    assert missing.returncode == 78
    assert "emflow init" in missing.stderr


def test_check_init_and_reduce(place, tmp_path: Path) -> None:
    found = place.json("check", code=None)
    assert {f["part"] for f in found["findings"]} >= {"emflow", "folder state", "share share", "formats", "room"}
    place.emflow("init", str(tmp_path / "emflow.toml"), "--root", str(tmp_path / "in coming"), code=0)
    made = subprocess.run(
        [*place.command()[:3], "-c", str(tmp_path / "emflow.toml"), "run", "--once"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    np.save(tmp_path / "a.npy", GOOD)
    out = tmp_path / "out"
    out.mkdir()
    done = place.emflow("reduce", str(tmp_path / "a.npy"), "-o", str(out), "--json", code=0)
    assert json.loads(done.stdout)["done"][0]["manifest"]["frames"] == 12
    with h5py.File(out / "a_emflow.h5") as file:
        assert np.array_equal(file["pattern/sum/data"], GOOD.sum(axis=(0, 1)))
    assert (out / "a_emflow.png").exists()


def test_a_lost_journal_is_not_replaced_by_an_empty_one(place) -> None:
    """Else old run folders would be taken for those of new data."""
    np.save(place.share / "scan.npy", GOOD)
    place.emflow("run", "--once")
    for file in (place.folder / "state").iterdir():
        file.unlink()
    np.save(place.share / "scan.npy", GOOD + 1)
    refused = place.emflow("run", "--once", code=1)
    assert "emflow rebuild" in refused.stderr
    place.emflow("rebuild")
    place.emflow("run", "--once")
    with place.journal() as journal:
        states = [a.state for a in journal.acquisitions()]
    assert states == [AcquisitionState.SUPERSEDED, AcquisitionState.DONE]
    newest = max(place.results, key=lambda path: path.stat().st_mtime_ns)
    with h5py.File(newest) as file:
        assert np.array_equal(file["pattern/sum/data"], (GOOD + 1).sum(axis=(0, 1)))


def test_a_journal_that_another_program_holds_is_waited_for(place) -> None:
    with place.start() as service:
        held = sqlite3.connect(place.folder / "state" / "journal.sqlite", isolation_level=None)
        held.execute("BEGIN IMMEDIATE")
        np.save(place.share / "scan.npy", GOOD)
        service.until(lambda: "has held the journal" in service.log.read_text())
        held.execute("ROLLBACK")
        held.close()
        service.until_state("scan.npy", AcquisitionState.DONE)
