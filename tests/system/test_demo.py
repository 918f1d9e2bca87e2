"""The demonstration: from nothing to a figure, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest

from emflow.demo.figure import draw
from emflow.demo.writer import SCANS, Particles
from emflow.journal import Journal
from emflow.records import AcquisitionState


def processes_at(folder: Path) -> list[str]:
    """Command lines of all processes that have to do with a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            where = (entry / "cwd").readlink()
        except OSError:
            continue
        if os.fsencode(folder) in command or where.is_relative_to(folder):
            found.append(f"{entry.name} {command.decode('utf-8', 'replace')}")
    return found


class Demo:
    """``emflow demo`` as a process, with its temporary files in a place that the test can see."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.figure = folder / "figures" / "demo.png"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "emflow", "demo", "--json", "-o", str(self.figure), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            start_new_session=True,
            text=True,
        )

    def until(self, state: AcquisitionState) -> None:
        """Wait until some acquisition is in a state."""
        end = time.monotonic() + 40
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()
            for path in self.temporary.glob("emflow-demo-*/state/journal.sqlite"):
                try:
                    with Journal(path, read_only=True) as journal:
                        if journal.acquisitions({state}):
                            return
                except Exception as error:  # noqa: BLE001  the service has only just made it
                    print(error)
            time.sleep(0.05)
        raise AssertionError(f"nothing became {state}")


def test_scans_of_the_demonstration_are_exact_and_in_every_format() -> None:
    assert len({write for *_, write in SCANS}) == len(SCANS) == 4
    for seed, (_, dtype, scan_shape, det_shape, _) in enumerate(SCANS):
        scan = Particles(scan_shape, det_shape, dtype, seed=seed)
        assert scan.gains().min() == 1
        assert scan.gains().max() == 4
        assert np.ptp(scan.shifts(), axis=0).min() > 0, "the beam is not bent"


@pytest.mark.needs_mpi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("state", [AcquisitionState.GROWING, AcquisitionState.STAGED])
def test_stopped_in_the_middle(tmp_path: Path, number: signal.Signals, state: AcquisitionState) -> None:
    demo = Demo(tmp_path)
    demo.until(state)
    demo.process.send_signal(number)
    _, said = demo.process.communicate(timeout=10)
    assert demo.process.returncode == 130, said
    assert "Traceback" not in said
    assert processes_at(demo.temporary) == []
    assert list(demo.temporary.iterdir()) == []
    assert not demo.figure.exists()


@pytest.mark.needs_mpi
def test_a_folder_called_emflow_does_not_shadow_the_package(tmp_path: Path) -> None:
    (tmp_path / "emflow").mkdir()
    (tmp_path / "emflow" / "__init__.py").write_text("raise SystemExit('not the package')")
    demo = Demo(tmp_path)
    demo.until(AcquisitionState.STAGED)
    demo.process.terminate()
    demo.process.communicate(timeout=10)


@pytest.mark.needs_mpi
@pytest.mark.parametrize("delay_s", [0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.1])
def test_stopped_while_its_service_is_started(tmp_path: Path, delay_s: float) -> None:
    demo = Demo(tmp_path)
    end = time.monotonic() + 20
    while not list(demo.temporary.glob("emflow-demo-*")) and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(delay_s)
    demo.process.send_signal(signal.SIGINT)
    _, said = demo.process.communicate(timeout=10)
    assert demo.process.returncode == 130, said
    assert processes_at(demo.temporary) == []
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.needs_mpi
def test_a_demonstration_whose_service_dies_says_so(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.until(AcquisitionState.GROWING)
    (folder,) = demo.temporary.glob("emflow-demo-*")
    lock = json.loads((folder / "state" / "service.lock").read_text())
    os.kill(lock["pid"], signal.SIGKILL)
    _, said = demo.process.communicate(timeout=20)
    assert demo.process.returncode == 1
    assert "emflow demo --keep" in said
    assert "Traceback" not in said
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.needs_mpi
@pytest.mark.timeout(240)
def test_the_whole_demonstration(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    demo = Demo(tmp_path, "--keep", str(keep))
    out, said = demo.process.communicate(timeout=200)
    assert demo.process.returncode == 0, said
    shown = json.loads(out)
    assert set(shown) == {"folder", "figure", "seconds", "acquisitions"}
    assert {row["path"]: row["state"] for row in shown["acquisitions"]} == {name: "DONE" for name, *_ in SCANS}
    for row in shown["acquisitions"]:
        times = [row["seconds"][s] for s in ("noticed", "ready", "staged", "submitted", "reduced", "done")]
        assert times == sorted(times)
        assert (keep / "results" / f"{row['id']}_emflow.h5").exists()
    scans = {name: Particles(scan, det, dtype, seed=n) for n, (name, dtype, scan, det, _) in enumerate(SCANS)}
    (row,) = [row for row in shown["acquisitions"] if row["path"].endswith(".npy")]
    scan = scans[row["path"]]
    with h5py.File(keep / "results" / f"{row['id']}_emflow.h5") as file:
        assert np.array_equal(file["pattern/sum/data"], scan.frames(0, scan.count).sum(axis=0, dtype=np.int64))
    is_a_picture(demo.figure)
    assert processes_at(keep) == []
    assert list(demo.temporary.iterdir()) == []


def is_a_picture(path: Path) -> None:
    """A whole PNG whose quarters all show something."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    length = struct.unpack(">I", data[8:12])[0]
    assert zlib.crc32(data[12 : 16 + length]) == struct.unpack(">I", data[16 + length : 20 + length])[0]
    pixels = matplotlib.image.imread(path)
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
    for y in (0, rows):
        for x in (0, columns):
            assert pixels[y : y + rows, x : x + columns, :3].std() > 0.03, f"the quarter at {y}, {x} is empty"


def test_the_figure_of_one_acquisition(place) -> None:
    """The same figure from a scan that is reduced in this moment."""
    scan = Particles((12, 16), (32, 32), "uint16", seed=1)
    np.save(place.share / "scan.npy", scan.frames(0, scan.count).reshape(12, 16, 32, 32))
    place.emflow("run", "--once")
    with place.journal() as journal:
        (acquisition,) = journal.acquisitions()
        events = [event for _, event in journal.events(trace=acquisition.trace)]
    draw(place.folder / "figure.png", place.results[0], acquisition, events)
    is_a_picture(place.folder / "figure.png")
