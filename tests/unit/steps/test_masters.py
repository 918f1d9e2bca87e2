"""A master, its data files and its sidecar are one acquisition, from the share to the result."""

from __future__ import annotations

import shutil

from emflow.records import AcquisitionState
from emflow.synthetic import ExactScan, write_dectris

S = AcquisitionState
SCAN = ExactScan((4, 5), (6, 8), "uint16", seed=4)


def test_a_master_and_its_files_are_one_acquisition(bench) -> None:
    write_dectris(SCAN, bench.share / "scan_master.h5")
    bench.work()
    assert [a.relpath for a in bench.context.journal.acquisitions()] == [b"scan_master.h5"]
    found = bench.one("scan_master.h5")
    assert (found.state, found.format, found.frames) == (S.DONE, "dectris", 20)
    source = bench.context.runs.acquisition_folder(found.day, found.id) / "source"
    assert sorted(p.name for p in source.iterdir()) == sorted(
        f"{found.id}{s}" for s in ("_master.h5", "_data_000001.h5", "_data_000002.h5", "_data_000003.h5", ".h5")
    )


def test_a_master_waits_for_its_data_files(bench, tmp_path) -> None:
    write_dectris(SCAN, tmp_path / "scan_master.h5")
    for name in ("scan_master.h5", "scan.h5", "scan_data_000001.h5"):
        shutil.copyfile(tmp_path / name, bench.share / name)
    bench.work()
    found = bench.one("scan_master.h5")
    assert found.state in (S.GROWING, S.STALLED)
    assert "7 of 20 frames" in found.reason
    for name in ("scan_data_000002.h5", "scan_data_000003.h5"):
        shutil.copyfile(tmp_path / name, bench.share / name)
    bench.work()
    assert bench.state("scan_master.h5") is S.DONE
    assert len(bench.context.journal.acquisitions()) == 1
