"""Examine: complete, stalled, or never readable; judged by content, quiet, and whether anybody still writes."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.records import AcquisitionState
from emflow.steps.examine import examine
from emflow.synthetic_streams import Inset, write_k2is, write_tpx3
from emflow.synthetic_vendor import write_tvips
from mpi_kernels.exact import ExactScan

S = AcquisitionState


def test_a_closed_and_whole_file_is_believed_at_once(bench) -> None:
    bench.save()
    bench.look()
    examine(bench.context)
    found = bench.one()
    assert (found.state, found.format, found.kind, found.frames) == (S.READY, "npy", "4d", 6)
    assert bench.context.looks == {}


def test_incomplete_then_stalled_then_quarantined_with_the_missing_frame(bench) -> None:
    path = bench.save()
    os.truncate(path, path.stat().st_size - 1)
    bench.work(50)
    assert bench.state() is S.GROWING
    assert "frame 5" in bench.one().reason
    bench.work(30)
    assert bench.state() is S.STALLED
    assert "frame 5" in bench.one().reason
    bench.turn(3500)
    assert bench.state() is S.STALLED
    bench.turn(60)
    assert bench.state() is S.QUARANTINED
    assert "unchanged for" in bench.one().reason
    assert "frame 5" in bench.one().reason
    assert bench.told(bench.one().id) == ["noticed", "stalled", "quarantined"]


def test_a_stalled_file_whose_rest_comes_is_done(bench) -> None:
    path = bench.save()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    bench.work(70)
    assert bench.state() is S.STALLED
    path.write_bytes(whole)
    bench.work(10)
    assert bench.state() is S.DONE
    assert bench.told(bench.one().id)[:4] == ["noticed", "stalled", "growing", "ready"]


def test_stalled_and_complete_by_a_file_that_no_scan_looks_for(bench) -> None:
    (bench.share / "scan.raw").write_bytes(bytes(2 * 3 * 8 * 9 * 2))
    bench.work(70)
    assert bench.state("scan.raw") is S.STALLED
    (bench.share / "scan.json").write_text(json.dumps({"shape": [2, 3, 8, 9], "dtype": "<u2"}))
    bench.work(10)
    assert bench.state("scan.raw") is S.DONE
    assert bench.told(bench.one("scan.raw").id)[:4] == ["noticed", "stalled", "growing", "ready"]


def test_nonsense_is_judged_only_when_it_has_come_to_rest(bench) -> None:
    path = bench.share / "scan.npy"
    path.write_bytes(b"nonsense")
    bench.look()
    examine(bench.context)
    assert bench.state() is S.GROWING
    for n in range(4):  # a writer that is slow, but faster than the rest that is asked for
        bench.clock.now += 0.9 * bench.scan.settle_s
        with path.open("ab") as file:
            file.write(b"%d" % n)
        examine(bench.context)
        assert bench.state() is S.GROWING
    bench.clock.now += 1.1 * bench.scan.settle_s
    examine(bench.context)
    assert bench.state() is S.QUARANTINED


def test_a_sidecar_that_comes_late_belongs_to_the_acquisition(bench, good) -> None:
    (bench.share / "scan.raw").write_bytes(good.tobytes())
    bench.work(5)
    assert bench.state("scan.raw") is S.GROWING
    assert "sidecar" in bench.one("scan.raw").reason
    (bench.share / "scan.json").write_text(json.dumps({"shape": list(good.shape), "dtype": "<u2"}))
    bench.work()
    assert bench.state("scan.raw") is S.DONE
    found = bench.one("scan.raw")
    kept = bench.context.runs.read_acquisition(found.day, found.id).transfer
    assert [m.relpath for m in kept.members] == [b"scan.raw", b"scan.json"]


def test_a_file_that_vanishes_waits_for_nobody_and_may_come_back(bench) -> None:
    path = bench.save()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    bench.work(2)
    path.unlink()
    bench.work(5)
    (look,) = bench.context.looks.values()
    assert not look.waiting
    assert bench.state() is S.GROWING
    path.write_bytes(whole)
    bench.work()
    assert bench.state() is S.DONE


def test_a_file_that_stays_away_is_stalled_unless_its_share_is(bench) -> None:
    path = bench.save()
    os.truncate(path, 300)
    bench.save("other.npy")
    bench.work(5)
    bench.share.rename(bench.folder / "away")
    bench.work(200)
    assert bench.state() is S.GROWING
    (bench.folder / "away").rename(bench.share)
    path.unlink()
    bench.work(50)
    assert bench.state() is S.GROWING
    bench.work(30)
    assert bench.state() is S.STALLED
    assert "gone" in bench.one().reason
    bench.save()
    bench.work(10)
    assert bench.state() is S.DONE


def test_a_file_that_its_writer_still_has_open_is_not_complete(bench) -> None:
    path = bench.save()
    with path.open("r+b"):
        bench.work(30)
        assert bench.state() is S.GROWING
        assert "open" in bench.one().reason
    bench.work(5)
    assert bench.state() is S.DONE


def test_a_file_that_is_open_and_unchanged_keeps_nobody_waiting_for_ever(bench) -> None:
    path = bench.save()
    with path.open("r+b"):
        bench.work(2)
        (look,) = bench.context.looks.values()
        assert look.waiting
        bench.work(10)
        assert not look.waiting
        os.utime(path)
        bench.work(2)
        (look,) = bench.context.looks.values()
        assert look.waiting


def test_a_file_that_is_mapped_for_writing_is_not_complete_though_its_descriptor_is_closed(bench) -> None:
    path = bench.save()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fd = os.open(path, os.O_RDWR)
    size = path.stat().st_size
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    assert address not in (None, ctypes.c_void_p(-1).value)
    try:
        bench.work(30)
        assert bench.state() is S.GROWING
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    bench.work(5)
    assert bench.state() is S.DONE


def test_a_format_that_cannot_tell_its_end_has_to_rest_for_a_while(bench, good) -> None:
    with h5py.File(bench.share / "scan.h5", "w") as file:
        file["data"] = good
    bench.look()
    examine(bench.context)
    rule = bench.prober.probe(str(bench.share / "scan.h5"))[1].rule
    assert (rule, bench.state("scan.h5")) == ("stability", S.GROWING)
    bench.clock.now += 1.1 * bench.scan.settle_s
    examine(bench.context)
    assert bench.state("scan.h5") is S.READY


def test_a_look_is_not_repeated_before_it_is_due(bench) -> None:
    path = bench.save()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    bench.look()
    examine(bench.context)
    path.write_bytes(whole)
    bench.clock.now += 0.5 * bench.scan.active_s
    examine(bench.context)
    assert bench.state() is S.GROWING
    bench.clock.now += bench.scan.active_s
    examine(bench.context)
    assert bench.state() is S.READY


def test_a_service_that_was_killed_takes_its_looks_up_again(bench) -> None:
    path = bench.save()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    bench.work(2)
    path.write_bytes(whole)
    bench.open()
    bench.work()
    assert bench.state() is S.DONE


@pytest.mark.parametrize("name", ["scan.npy", "deep/er/scan.npy"])
def test_members_are_told_by_their_path_on_the_share(bench, name: str, good) -> None:
    path = bench.share / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, good)
    bench.work()
    found = bench.one(name)
    (member,) = bench.context.runs.read_acquisition(found.day, found.id).transfer.members
    assert member.relpath == name.encode()
    assert Path(bench.context.runs.read_acquisition(found.day, found.id).transfer.path).is_relative_to(bench.folder)


def test_a_further_file_of_another_acquisition_is_none_of_its_own(bench) -> None:
    scan = ExactScan((2, 6), (8, 8), "uint16", seed=1)
    write_tvips(scan, bench.share / "a_000.tvips", parts=(5,))
    bench.work(30)
    found = {a.name: a for state in S for a in bench.context.journal.walk(state)}
    assert {name: a.state for name, a in found.items()} == {"a_000.tvips": S.DONE, "a_001.tvips": S.SUPERSEDED}
    assert found["a_000.tvips"].frames == 12
    assert found["a_001.tvips"].reason == "it is a later part of a_000.tvips"


def test_the_sectors_of_a_recording_are_none_of_their_own(bench) -> None:
    write_k2is(Inset((1, 2), (1860, 2048), "uint16", (8, 8), (926, 250)), bench.share / "a_.gtg", after=0)
    bench.work(30)
    found = {a.name: a for state in S for a in bench.context.journal.walk(state)}
    assert found.pop("a_.gtg").frames == 2
    assert len(found) == 8
    assert {(a.state, a.reason) for a in found.values()} == {(S.SUPERSEDED, "it is a sector of the .gtg beside it")}


def test_hits_and_the_sidecar_that_makes_them_a_scan(bench) -> None:
    path = write_tpx3(Inset((2, 3), (256, 256), "uint32", (5, 6), (9, 9)), bench.share / "a.tpx3")
    said = path.with_suffix(".json").read_text()
    path.with_suffix(".json").unlink()
    bench.work(30)
    assert bench.state("a.tpx3") is S.GROWING
    assert '"line_trigger": "tdc1 rising"' in bench.one("a.tpx3").reason
    path.with_suffix(".json").write_text(said)
    bench.work(30)
    assert bench.state("a.tpx3") is S.DONE
