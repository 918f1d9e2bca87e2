"""Notice: what a scan finds becomes an acquisition, or news about one."""

from __future__ import annotations

import contextlib
import os
import subprocess

import numpy as np
import pytest

from emflow.errors import JournalFull
from emflow.records import AcquisitionState, acquisition_id
from emflow.steps.examine import examine
from emflow.steps.notice import notice
from emflow.steps.stage import stage

S = AcquisitionState


def test_a_new_file_is_an_acquisition_with_the_id_of_its_path(bench) -> None:
    bench.save()
    bench.look()
    found = bench.one()
    assert (found.id, found.state, found.generation) == (acquisition_id("share", b"scan.npy", 0), S.GROWING, 0)
    assert found.fingerprint.size == (bench.share / "scan.npy").stat().st_size
    assert bench.told(found.id) == ["noticed"]
    bench.look()
    assert bench.told(found.id) == ["noticed"]


def test_nothing_is_scanned_before_it_is_due(bench) -> None:
    bench.look()
    bench.save()
    notice(bench.context)
    assert bench.journal.acquisitions() == []
    bench.look()
    assert len(bench.journal.acquisitions()) == 1


def test_a_hostile_name_is_kept_byte_by_byte(bench) -> None:
    bench.save(os.fsdecode(b"\xff\n$(x).npy"))
    bench.look()
    (found,) = bench.journal.acquisitions()
    assert found.relpath == b"\xff\n$(x).npy"


def test_a_file_that_grows_is_the_same_acquisition_with_another_fingerprint(bench) -> None:
    path = bench.save()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    bench.look()
    bench.turn()
    path.write_bytes(whole[:-50])
    bench.look()
    (found,) = bench.journal.acquisitions()
    assert found.state is S.GROWING
    assert found.fingerprint.size == len(whole) - 50


def test_a_file_that_changes_while_it_waits_to_be_copied_is_examined_again(bench, good) -> None:
    path = bench.save()
    bench.look()
    examine(bench.context)
    assert (bench.state(), bench.one().frames) == (S.READY, 6)
    np.save(path, good[:1])
    bench.look()
    assert bench.state() is S.GROWING
    bench.work()
    assert (bench.state(), bench.one().frames) == (S.DONE, 3)
    assert len(bench.journal.acquisitions()) == 1


def test_a_file_that_changes_after_its_copy_and_before_its_digest_is_bound_is_copied_again(bench, good) -> None:
    path = bench.save()
    bench.look()
    examine(bench.context)
    stage(bench.context)
    bench.context.transfers[bench.one().id].result()  # the worker is done; the loop has not looked yet
    np.save(path, good + 1)
    bench.look()
    bench.work()
    assert bench.state() is S.DONE
    assert bench.one().digest == bench.context.runs.read_acquisition(bench.one().day, bench.one().id).transfer.digest
    copy = bench.context.runs.source_folder(bench.one().day, bench.one().id) / f"{bench.one().id}.npy"
    assert np.array_equal(np.load(copy), good + 1), "the newer bytes were lost"


def test_a_touched_file_that_waits_keeps_its_place(bench) -> None:
    path = bench.save()
    bench.look()
    examine(bench.context)
    path.chmod(0o600)  # another ctime, the same bytes
    bench.look()
    assert bench.state() is S.READY


def test_a_rewritten_file_is_another_acquisition_and_the_chain_leads_back(bench, good) -> None:
    path = bench.save()
    bench.work()
    first = bench.one()
    np.save(path, good + 1)
    bench.work()
    second = bench.one()
    np.save(path, good)  # the first bytes again are not the ones that stand
    bench.work()
    third = bench.one()
    assert [a.supersedes for a in (first, second, third)] == [None, first.id, second.id]
    states = [bench.journal.acquisition(a.id).state for a in (first, second, third)]
    assert states == [S.SUPERSEDED, S.SUPERSEDED, S.DONE]
    assert first.digest == third.digest != second.digest
    assert len({first.id, second.id, third.id}) == 3
    assert "rewritten" in bench.journal.acquisition(first.id).reason


def test_same_bytes_again_and_again_point_at_the_one_that_stands(bench) -> None:
    path = bench.save()
    bench.work()
    first = bench.one()
    for n in (1, 2):
        os.utime(path, ns=(n, n))
        bench.work()
        again = bench.one()
        assert (again.generation, again.state, again.supersedes) == (n, S.SUPERSEDED, first.id)
    assert bench.journal.acquisition(first.id).state is S.DONE
    assert len(bench.results) == 1


def test_a_newer_acquisition_that_is_bad_leaves_the_older_one_standing(bench) -> None:
    path = bench.save()
    bench.work()
    first = bench.one()
    path.write_bytes(b"nonsense" * 99)
    bench.work()
    assert bench.state() is S.QUARANTINED
    assert bench.journal.acquisition(first.id).state is S.DONE
    assert len(bench.results) == 1


def test_a_problem_is_told_at_once_and_once(bench) -> None:
    (bench.share / "folder.npy").mkdir()
    (bench.share / "link.npy").symlink_to("/etc/passwd")
    bench.work(60)
    for name in ("folder.npy", "link.npy"):
        found = bench.one(name)
        assert (found.state, bench.told(found.id)) == (S.QUARANTINED, ["noticed", "quarantined"])
        assert found.reason


def test_a_file_that_becomes_a_problem_and_mends(bench, good) -> None:
    path = bench.save()
    bench.look()
    path.unlink()
    path.mkdir()
    bench.look()
    assert bench.state() is S.QUARANTINED
    path.rmdir()
    np.save(path, good)
    bench.work()
    assert bench.state() is S.DONE


@pytest.mark.parametrize("aside", ["STALLED", "QUARANTINED"])
def test_what_was_set_aside_goes_on_when_its_file_changes(bench, aside: str) -> None:
    path = bench.save()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] if aside == "STALLED" else b"nonsense")
    bench.work(70)
    assert bench.state() is S[aside]
    path.write_bytes(whole)
    bench.work()
    assert bench.state() is S.DONE
    assert bench.one().reason == ""


def test_a_share_that_is_away_is_an_alarm_and_nothing_is_forgotten(bench) -> None:
    bench.save()
    bench.work()
    away = bench.folder / "away"
    bench.share.rename(away)
    bench.look()
    assert list(bench.context.alarms) == ["share share"]
    assert "unmounted" in bench.context.alarms["share share"]
    bench.look()
    away.rename(bench.share)
    bench.save("second.npy")
    bench.work()
    assert bench.context.alarms == {}
    assert (bench.state(), bench.state("second.npy")) == (S.DONE, S.DONE)
    raised = [event.name for _, event in bench.journal.events(subject="share share")]
    assert raised == ["alarm", "cleared"]


def test_an_empty_mount_point_is_not_a_share_without_files(bench) -> None:
    bench.save()
    bench.work()
    bench.share.rename(bench.folder / "away")
    bench.share.mkdir()
    bench.look()
    assert "it is empty" in bench.context.alarms["share share"]
    assert bench.state() is S.DONE


@pytest.mark.needs_root
def test_what_could_not_be_journalled_is_noticed_by_the_next_scan(make_bench) -> None:
    bench = make_bench()
    state = bench.folder / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(state)], check=True)
    try:
        bench.open()
        bench.look()
        with (state / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        for n in range(400):  # more than fits into the pages that the journal already has
            (bench.share / f"{n}.npy").touch()
        with pytest.raises(JournalFull):
            bench.look()
        assert bench.journal.acquisitions() == []
        (state / "ballast").unlink()
        bench.clock.now += 4.0  # no whole scan is due: only what was told to be told again
        notice(bench.context)
        assert len(bench.journal.acquisitions()) == 400
        bench.close()
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)
