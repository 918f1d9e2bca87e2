"""Everything that a share can hold besides good files: set aside with a reason, nothing lost, the loop goes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import h5py
import numpy as np

from emflow.records import AcquisitionState
from mpi_kernels.errors import printable

GOOD = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)


def reason_of(place, name: str) -> str:
    with place.journal() as journal:
        return next(a.reason for a in journal.known("share") if a.name == name)


def truncate(path: Path, missing: int) -> None:
    os.truncate(path, path.stat().st_size - missing)


def test_each_kind_of_bad_file_is_set_aside_and_the_good_one_is_done(place) -> None:
    share = place.share
    np.save(share / "good.npy", GOOD)
    np.save(share / "truncated.npy", GOOD)
    truncate(share / "truncated.npy", 8 * 9 * 2 + 10)  # the last frame and a bit of the one before
    (share / "magic.npy").write_bytes(b"not a numpy file" * 100)
    (share / "empty.npy").touch()
    (share / "folder.npy").mkdir()
    (share / "link.npy").symlink_to(share / "nowhere.npy")
    (share / "pointer.npy").symlink_to(share / "good.npy")
    with h5py.File(share / "chunk.h5", "w") as file:
        data = file.create_dataset("data", (4, 5, 8, 9), "u2", chunks=(1, 1, 8, 9))
        for row in range(3):
            data[row] = 1
    done = place.emflow("run", "--once", code=1)  # some need a person
    assert "DONE 1" in done.stdout
    states = place.states()
    assert states["good.npy"] is AcquisitionState.DONE
    for name in ("magic.npy", "folder.npy", "link.npy", "pointer.npy"):
        assert states[name] is AcquisitionState.QUARANTINED, (name, reason_of(place, name))
    # incomplete files might still grow: they wait, then stall, then a person is asked
    with place.start() as service:
        for name in ("truncated.npy", "empty.npy", "chunk.h5"):
            service.until_state(name, AcquisitionState.QUARANTINED)
        np.save(share / "later.npy", GOOD)
        service.until_state("later.npy", AcquisitionState.DONE)
    assert "frame 4" in reason_of(place, "truncated.npy")
    assert "frame 15" in reason_of(place, "chunk.h5")
    assert "link" in reason_of(place, "link.npy")
    assert "folder" in reason_of(place, "folder.npy")
    assert len(place.results) == 2


def test_a_stalled_file_goes_on_when_it_grows(make_place) -> None:
    place = make_place(stall_s=0.3, quarantine_s=60)
    np.save(place.share / "slow.npy", GOOD)
    whole = (place.share / "slow.npy").read_bytes()
    (place.share / "slow.npy").write_bytes(whole[:-100])
    with place.start() as service:
        service.until_state("slow.npy", AcquisitionState.STALLED)
        assert "frame 5" in reason_of(place, "slow.npy")
        (place.share / "slow.npy").write_bytes(whole)
        service.until_state("slow.npy", AcquisitionState.DONE)


HOSTILE = [
    b"a\nb.npy",
    b'\'"quotes".npy',
    b"$(touch pwned).npy",
    b"`touch pwned`.npy",
    b"-rf.npy",
    b"--wrap=touch pwned.npy",
    "\u202egnp.npy".encode(),
    b"\xff\xfe.npy",
    b"a;b|c&d.npy",
    b"n" * 251 + b".npy",
    b" .npy",
    b"\x1b[31mred.npy",
]


def test_hostile_names_are_processed_and_never_run(make_place) -> None:
    place = make_place(scheduler="local")
    for name in HOSTILE:
        with (place.share / os.fsdecode(name)).open("wb") as file:
            np.save(file, GOOD[:, :, :, : len(name) % 5 + 3])
    done = place.emflow("run", "--once")
    assert f"DONE {len(HOSTILE)}" in done.stdout
    assert len(place.results) == len(HOSTILE)
    assert not list(place.folder.rglob("pwned"))
    shown = place.emflow("status").stdout + place.emflow("run", "--once").stderr
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown
    names = {a["path"] for a in place.json("status")["newest"]}
    assert "$(touch pwned).npy" in names


def test_a_file_that_nobody_may_read(place) -> None:
    np.save(place.share / "secret.npy", GOOD)
    np.save(place.share / "open.npy", GOOD)
    (place.share / "secret.npy").chmod(0)
    # root reads everything, unless it gives up the capability to
    rights = "-dac_override,-dac_read_search"
    bound = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    done = subprocess.run([*bound, *place.command("run", "--once")], capture_output=True, text=True, cwd=place.folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert place.states() == {"secret.npy": AcquisitionState.QUARANTINED, "open.npy": AcquisitionState.DONE}
    assert "right to read it" in reason_of(place, "secret.npy")
    (place.share / "secret.npy").chmod(0o644)
    place.emflow("run", "--once")
    assert place.states()["secret.npy"] is AcquisitionState.DONE


def test_reduce_says_what_is_wrong(place, tmp_path: Path) -> None:
    np.save(tmp_path / "cut.npy", GOOD)
    truncate(tmp_path / "cut.npy", 10)
    done = place.emflow("reduce", str(tmp_path / "cut.npy"), code=1)
    assert "cut.npy" in done.stderr
    assert "frame 5" in done.stderr
    assert "missing" in place.emflow("reduce", str(tmp_path / "missing.npy"), code=1).stderr
    assert printable(str(tmp_path)) in place.emflow("reduce", str(tmp_path), code=1).stderr
