"""Stage: a verified copy, its digest bound once, whatever happens to the source, the disk or the service."""

from __future__ import annotations

import os
import threading

import msgspec
import numpy as np
import pytest

from emflow.config import Bytes, TransferSettings
from emflow.records import AcquisitionState
from emflow.runs import AcquisitionFile
from emflow.steps.examine import examine
from emflow.steps.stage import stage

S = AcquisitionState


def ready(bench, name: str = "scan.npy") -> None:
    bench.look()
    examine(bench.context)
    assert bench.state(name) is S.READY


def folder_of(bench, name: str = "scan.npy"):
    return bench.context.runs.acquisition_folder(bench.one(name).day, bench.one(name).id)


def test_the_copy_is_named_by_the_id_and_all_facts_are_beside_it(bench, good) -> None:
    bench.save()
    bench.work()
    found, folder = bench.one(), folder_of(bench)
    assert np.array_equal(np.load(folder / "source" / f"{found.id}.npy"), good)
    kept = bench.context.runs.read_acquisition(found.day, found.id)
    assert (kept.transfer.digest, kept.id, kept.relpath) == (found.digest, found.id, b"scan.npy")
    number, said = bench.context.runs.newest_ready(folder)
    assert (number, said.frames, said.complete, said.digest) == (1, 6, True, found.digest)
    assert bench.told(found.id) == ["noticed", "ready", "staged", "done"]


def test_a_source_that_changes_before_its_copy_is_begun_is_judged_again(bench, good) -> None:
    path = bench.save()
    ready(bench)
    np.save(path, good[:1])  # no scan has seen this yet, and the header is of the older file
    stage(bench.context)
    bench.context.transfers[bench.one().id].result()
    stage(bench.context)
    assert bench.state() is S.GROWING
    assert "changed" in bench.one().reason
    bench.work()
    assert (bench.state(), bench.one().frames) == (S.DONE, 3)


def test_a_source_that_is_cut_while_the_header_is_forgotten(bench) -> None:
    path = bench.save()
    ready(bench)
    bench.open()  # killed: the header has to be read again
    os.truncate(path, path.stat().st_size - 10)
    stage(bench.context)
    assert bench.state() is S.GROWING
    assert "frame 5" in bench.one().reason


def test_no_room_is_an_alarm_that_goes_when_there_is(make_bench) -> None:
    bench = make_bench(transfer=TransferSettings(min_free=Bytes(1 << 60))).open()
    bench.save()
    bench.work(20)
    assert bench.state() is S.READY
    assert "staging waits" in bench.context.alarms["disk runs"]
    assert not (bench.folder / "runs").exists()
    bench.context.config = msgspec.structs.replace(bench.context.config, transfer=TransferSettings(min_free=Bytes(0)))
    bench.work()
    assert bench.state() is S.DONE
    assert bench.context.alarms == {}


def test_a_copy_that_is_stopped_says_nothing_against_the_file(bench) -> None:
    bench.save()
    ready(bench)
    release = threading.Event()
    blocked = [bench.context.pool.submit(release.wait, 30) for _ in range(2)]
    stage(bench.context)
    bench.context.stopping.set()
    release.set()
    assert all(b.result() for b in blocked)
    assert bench.context.transfers[bench.one().id].exception(30) is not None
    stage(bench.context)
    assert bench.state() is S.READY
    bench.open()
    bench.work()
    assert bench.state() is S.DONE


def test_nothing_is_begun_after_a_stop(bench) -> None:
    bench.save()
    ready(bench)
    bench.context.stopping.set()
    stage(bench.context)
    assert bench.context.transfers == {}


def test_staged_where_it_is(make_bench) -> None:
    bench = make_bench(transfer=TransferSettings(stage="none", min_free=Bytes(0))).open()
    path = bench.save()
    bench.work()
    found, folder = bench.one(), folder_of(bench)
    assert found.state is S.DONE
    kept = bench.context.runs.read_acquisition(found.day, found.id).transfer
    assert (kept.path, kept.digest) == (str(path), found.digest)
    assert not (folder / "source").exists()
    number, said = bench.context.runs.newest_ready(folder)
    assert (number, said.complete, said.digest) == (1, True, found.digest)
    job = bench.context.runs.read_job(bench.job_folder())
    assert job.source.path == str(path)


def test_where_it_is_copied_to_does_not_change_the_digest(make_bench) -> None:
    digests = []
    for how in ("copy", "none"):
        bench = make_bench(transfer=TransferSettings(stage=how, min_free=Bytes(0))).open()
        bench.save()
        bench.work()
        digests.append(bench.one().digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("rewritten", [False, True])
def test_killed_between_the_file_of_facts_and_the_journal(bench, rewritten: bool, good) -> None:
    path = bench.save()
    ready(bench)
    stage(bench.context)
    found, folder = bench.one(), folder_of(bench)
    transfer = bench.context.transfers[found.id].result()
    bench.context.runs.write_acquisition(AcquisitionFile.of(found, transfer))
    bench.context.runs.publish_ready(folder, frames=found.frames, complete=True, digest=transfer.digest)
    bench.open()
    if rewritten:
        np.save(path, good[:1])
    bench.work()
    after = bench.one()
    assert (after.id, after.state, after.frames) == (found.id, S.DONE, 3 if rewritten else 6)
    kept = bench.context.runs.read_acquisition(after.day, after.id).transfer
    assert kept.digest == after.digest
    assert (kept.digest == transfer.digest) is not rewritten
    number, said = bench.context.runs.newest_ready(folder)
    assert (number, said.frames, said.digest) == (2 if rewritten else 1, after.frames, after.digest)


def test_a_share_that_goes_away_while_a_copy_waits(bench) -> None:
    bench.save()
    ready(bench)
    away = bench.folder / "away"
    bench.share.rename(away)
    bench.work(10)
    assert bench.state() in (S.READY, S.GROWING)
    assert bench.results == []
    away.rename(bench.share)
    bench.work()
    assert bench.state() is S.DONE
    assert bench.context.alarms == {}


def test_a_share_that_is_no_longer_configured_is_told(bench) -> None:
    bench.save()
    ready(bench)
    bench.open(shares=False)
    bench.work(5)
    assert bench.state() is S.READY
    assert "not in the configuration" in bench.context.alarms["share share"]
    bench.open()
    bench.work()
    assert bench.state() is S.DONE


def test_no_more_copies_at_once_than_workers(make_bench) -> None:
    bench = make_bench(transfer=TransferSettings(workers=2, min_free=Bytes(0))).open()
    for n in range(5):
        bench.save(f"scan{n}.npy")
    bench.look()
    examine(bench.context)
    stage(bench.context)
    assert len(bench.context.transfers) == 2
    bench.work()
    assert len(bench.results) == 5
