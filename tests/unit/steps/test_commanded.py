"""A scan that emflow commanded: its note alone says that it is whole, and its command's id is its trace."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from emflow.microscope import sidecar
from emflow.microscope.protocol import Acquired, Command, Scan4d
from emflow.records import AcquisitionState
from emflow.steps.examine import examine

S = AcquisitionState
ID = "e0123456789ab-0003-02"
SCAN = f"{ID}.npy"


def note(path: Path, /, **changes: object) -> sidecar.Sidecar:
    """The note of the bench's scan of (2, 3) frames of 8 by 9 pixels."""
    command = Command(
        id=ID, trace=ID, action=Scan4d(shape=(2, 3), step_nm=1.0, exposure_us=1.0), epoch=1, not_after_s=1.0
    )
    acquired = Acquired(
        name=path.stem, path=path.name, kind="4d", scan_shape=(2, 3), det_shape=(8, 9), frames=6, dose_e=0.0
    )
    return msgspec.structs.replace(sidecar.Sidecar.of(command, acquired), **changes)


def test_waits_for_its_note_and_is_believed_at_once_with_it(bench) -> None:
    path = bench.save(f"{ID}.npy")
    bench.look()
    examine(bench.context)
    assert (bench.state(SCAN), bench.one(SCAN).trace) == (S.GROWING, ID)
    bench.work(30)
    assert bench.state(SCAN) is S.GROWING
    assert f"{ID}.emflow.json" in bench.one(SCAN).reason
    sidecar.write(bench.share, note(path))
    bench.turn(bench.context.config.scan.active_s)
    bench.work(1)
    assert bench.state(SCAN) is S.DONE
    assert {event.trace for _, event in bench.context.journal.events(subject=bench.one(SCAN).id)} == {ID}
    assert bench.context.runs.read_result(next(bench.folder.glob("runs/*/*/01"))).trace == ID


def test_without_its_note_it_stalls_and_is_taken_when_the_note_comes(bench) -> None:
    path = bench.save(f"{ID}.npy")
    bench.work(100)
    assert bench.state(SCAN) is S.STALLED
    sidecar.write(bench.share, note(path))
    bench.work(10)
    assert bench.state(SCAN) is S.DONE


def test_a_scan_that_was_cut_short_is_never_reduced(bench) -> None:
    path = bench.save(f"{ID}.npy")
    os.truncate(path, path.stat().st_size - 1)
    sidecar.write(bench.share, note(path))
    bench.work(100)
    assert bench.state(SCAN) is S.STALLED
    assert "frame 5" in bench.one(SCAN).reason
    assert not list(bench.folder.glob("runs/*/*/01"))


@pytest.mark.parametrize(
    "changes",
    [
        {"command": "e0123456789ab-0003-03"},
        {"frames": 7},
        {"scan_shape": (3, 2)},
        {"det_shape": (9, 8)},
        {"kind": "stack"},
        {"path": "other.npy"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_note_of_something_else_sets_it_aside(bench, changes: dict) -> None:
    path = bench.save(f"{ID}.npy")
    there = sidecar.write(bench.share, note(path))
    there.write_bytes(msgspec.json.encode(note(path, **changes)))
    bench.work(30)
    assert bench.state(SCAN) is S.QUARANTINED
    assert "its note tells of" in bench.one(SCAN).reason


@pytest.mark.parametrize("what", ["torn", "folder", "huge", "fifo", "foreign"])
def test_a_note_that_is_none_sets_it_aside(bench, what: str) -> None:
    path = bench.save(f"{ID}.npy")
    there = sidecar.sidecar_path(path)
    if what == "folder":
        there.mkdir()
    elif what == "fifo":
        os.mkfifo(there)
    else:
        whole = msgspec.json.encode(note(path))
        texts = {"torn": whole[:-5], "huge": b" " * (sidecar.LARGEST + 1), "foreign": b'{"v": 2}'}
        there.write_bytes(texts[what])
    bench.work(30)
    assert bench.state(SCAN) is S.QUARANTINED
    assert "note of the scan can't be read" in bench.one(SCAN).reason


def test_the_note_itself_is_no_acquisition_and_foreign_names_are_their_own_trace(bench) -> None:
    bench.save("e0123456789ab-0003-2.npy")
    np.save(bench.share / "scan.npy", np.zeros((2, 3, 4, 5), np.uint8))
    sidecar.sidecar_path(bench.share / SCAN).write_bytes(msgspec.json.encode(note(bench.share / SCAN)))
    bench.look()
    found = bench.context.journal.acquisitions()
    assert len(found) == 2
    assert all(a.trace == a.id for a in found)


def test_names_of_scans_and_notes() -> None:
    assert sidecar.command_of(b"day/%s.mib" % ID.encode()) == ID
    assert sidecar.command_of(b"%s-07.h5" % ID.encode()) == ID
    assert sidecar.command_of(b"%s.emflow.json" % ID.encode()) is None
    assert sidecar.command_of_note(b"day/%s-07.emflow.json" % ID.encode()) == ID
    assert sidecar.command_of_note(b"%s.json" % ID.encode()) is None
