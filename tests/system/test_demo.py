"""The demonstration: from nothing to a corrected lens and a figure, and nothing left behind however it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from emflow.agent.protocol import Decision
from emflow.config import load
from emflow.demo.figure import Estimate, draw
from emflow.demo.mission import STATE, prepare, sizes
from emflow.demo.progress import COLUMNS, Stage, experiment_of, stages
from emflow.demo.table import WIDE, layout
from emflow.errors import EmflowError
from emflow.journal import Journal
from emflow.microscope.simulated.truth import truth
from emflow.records import AcquisitionState
from emflow.timeline import LOOP_BARS, acquisition_events, loop_times, waterfall
from mpi_kernels.contract import Event

PARTS = ("microscope serve", "emflow.toml run", "emflow.toml agent")
"""What the command lines of the three processes hold."""


def processes_at(folder: Path) -> dict[int, str]:
    """Command lines, by pid, of all processes that have to do with a folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            where = (entry / "cwd").readlink()
            zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if not zombie and (os.fsencode(folder) in command or where.is_relative_to(folder)):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode("utf-8", "replace")
    return found


class Demo:
    """``emflow demo`` as a process, with its temporary files in a place that the test can see."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.figure = folder / "figures" / "demo.png"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "emflow", "demo", "--json", "-o", str(self.figure), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary), "COLUMNS": "150"},
            start_new_session=True,
            text=True,
        )

    @property
    def folder(self) -> Path | None:
        """Where it works, as soon as it does."""
        return next(self.temporary.glob("emflow-demo-*"), None)

    def until_scanned(self) -> Path:
        """Wait until the service has seen the first scan."""
        end = time.monotonic() + 50
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()
            if self.folder and self._acquisitions(self.folder):
                return self.folder
            time.sleep(0.05)
        self.process.terminate()
        raise AssertionError(f"no scan came: {self.process.communicate()}")

    @staticmethod
    def _acquisitions(folder: Path) -> int:
        try:
            with Journal(folder / "state" / "journal.sqlite", read_only=True) as journal:
                return len(journal.acquisitions())
        except EmflowError:  # the service has only just begun to make it
            return 0

    def until_a_job_runs(self) -> None:
        """Wait until the first job has claimed its run folder."""
        folder = self.until_scanned()
        end = time.monotonic() + 50
        while not list(folder.glob("runs/*/*/01/claim")) and time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.002)

    def pid_of(self, part: str) -> int:
        """The process of a part."""
        assert self.folder
        found = [pid for pid, command in processes_at(self.folder).items() if part in command]
        assert len(found) == 1, processes_at(self.folder)
        return found[0]

    def ends(self, code: int, timeout_s: float = 20) -> str:
        """Wait for its end, see that nothing is left, and return what it said."""
        out, said = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == code, (out, said)
        assert "Traceback" not in said
        assert processes_at(self.temporary) == {}
        assert list(self.temporary.iterdir()) == []
        assert out == ""
        assert not self.figure.exists()
        return said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Start demonstrations; one that a failing test leaves is told to end."""
    made: list[Demo] = []

    class Started(Demo):
        def __init__(self, *arguments: str) -> None:
            super().__init__(tmp_path / str(len(made)), *arguments)
            made.append(self)

    yield Started
    for demo in made:
        if demo.process.poll() is None:
            demo.process.terminate()
            demo.process.communicate(timeout=30)


# --- the whole mission


@pytest.mark.needs_mpi
@pytest.mark.timeout(240)
def test_the_whole_demonstration(start: Callable[..., Demo], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    demo = start("--seed", "3", "--keep", str(keep))
    out, said = demo.process.communicate(timeout=220)
    assert demo.process.returncode == 0, said
    shown = json.loads(out.splitlines()[-1])
    print(f"the demonstration took {shown['seconds']:.1f} s for {shown['acquisitions']} acquisitions")
    assert set(shown) == {"residuals_nm", "start_nm", "acquisitions", "seconds", "figure"}
    assert set(shown["residuals_nm"]) == set(shown["start_nm"]) == {"C10", "C12"}
    assert 100 <= shown["start_nm"]["C10"] <= 600
    assert 0 < shown["start_nm"]["C12"] <= 150
    assert shown["acquisitions"] >= 2
    assert all(0 <= residual <= 5 for residual in shown["residuals_nm"].values())
    assert (shown["start_nm"], shown["residuals_nm"]) == sizes(truth(keep / STATE))
    assert Path(shown["figure"]) == demo.figure
    is_a_picture(demo.figure)
    assert processes_at(keep) == {}
    assert list(demo.temporary.iterdir()) == []
    the_way_of_each_acquisition(keep, shown["acquisitions"])


def the_way_of_each_acquisition(keep: Path, count: int) -> None:
    """Every scan came by its command, and has every mark of the loop in order."""
    config = load(keep / "emflow.toml")
    experiment = experiment_of(config)
    assert experiment is not None
    with Journal(config.service.state / "journal.sqlite", read_only=True) as journal:
        rows = stages(journal, config, experiment)
        acquisitions = journal.acquisitions()
        ways = [acquisition_events(journal, config, a) for a in acquisitions]
    assert len(rows) == len(acquisitions) == count
    assert {a.state for a in acquisitions} == {AcquisitionState.DONE}
    assert [row.command for row in rows] == [a.trace for a in acquisitions]
    assert all(row.decision is not None and set(row.seconds) == set(COLUMNS) for row in rows)
    for way in ways[:-1]:
        times = loop_times(way)
        assert list(times) == list(LOOP_BARS), "a step of the loop is missing"
        assert list(times.values()) == sorted(times.values())
        assert len([bar for bar in waterfall(way) if bar.inside_job]) == 4
    for row in rows:
        assert (config.service.results / f"{row.acquisition}_emflow.h5").is_file()
        traced = subprocess.run(
            [sys.executable, "-m", "emflow", "-c", str(keep / "emflow.toml"), "trace", row.command],
            capture_output=True,
            text=True,
            check=True,
        )
        assert {"began", "noted", "staged", "found", "decided"} <= set(traced.stdout.split())


def test_the_seed_chooses_what_is_wrong(tmp_path: Path) -> None:
    from emflow.microscope import settings
    from emflow.microscope.simulated.backend import SimulatedMicroscope

    starts = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        prepare(folder, seed)
        made = settings.load(folder / "microscope.toml")
        SimulatedMicroscope(Path(made.server.folder), folder / STATE, made.backend.parameters).close()
        starts.append(sizes(truth(folder / STATE))[0])
    assert starts[0] == starts[1] != starts[2]


# --- ended from outside


@pytest.mark.needs_mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_in_the_middle(start: Callable[..., Demo], number: signal.Signals) -> None:
    demo = start()
    demo.until_scanned()
    demo.process.send_signal(number)
    demo.ends(130)


@pytest.mark.needs_mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("delay_s", [0, 0.002, 0.008, 0.1, 1.0])
def test_stopped_while_its_parts_are_started(start: Callable[..., Demo], delay_s: float) -> None:
    demo = start()
    end = time.monotonic() + 20
    while demo.folder is None and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(delay_s)
    demo.process.send_signal(signal.SIGINT)
    demo.ends(130)


@pytest.mark.needs_mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_dies_ends_it_with_a_message(start: Callable[..., Demo], part: str) -> None:
    demo = start()
    demo.until_scanned()
    os.kill(demo.pid_of(part), signal.SIGKILL)
    said = demo.ends(1, timeout_s=40)
    assert "ended early" in said
    assert "emflow demo --keep" in said


@pytest.mark.needs_mpi
@pytest.mark.timeout(120)
def test_the_job_of_a_service_that_was_killed_ends_too(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.until_a_job_runs()
    os.kill(demo.pid_of("emflow.toml run"), signal.SIGKILL)
    assert "the service ended early" in demo.ends(1, timeout_s=40)


@pytest.mark.needs_mpi
@pytest.mark.timeout(120)
def test_a_folder_called_emflow_does_not_shadow_the_package(start: Callable[..., Demo], tmp_path: Path) -> None:
    (tmp_path / "0" / "emflow").mkdir(parents=True)
    (tmp_path / "0" / "emflow" / "__init__.py").write_text("raise SystemExit('not the package')")
    demo = start()
    demo.until_scanned()
    demo.process.terminate()
    demo.ends(130)


# --- the table and the figure


def test_the_table_shows_steps_measurement_and_decision() -> None:
    from rich.console import Console

    known = Decision(reason="corrected C10 by -312 nm", merit=312.25, merit_unit="nm")
    rows = [
        Stage(number=1, command="c", acquisition="a" * 16, seconds=dict.fromkeys(COLUMNS, 0.25), decision=known),
        Stage(number=2, command="c", acquisition="b" * 16, seconds={"write": 1.5}),
    ]
    for width in (80, WIDE, 160):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(layout(rows, width))
        shown = console.export_text()
        text = " ".join(shown.split())
        for word in ("aaaaaaaaaaaaaaaa", "0.25", "312.25 nm", "corrected C10 by -312 nm", "1.50"):
            assert word in text, (width, text)
        assert max(map(len, shown.splitlines())) <= width


def test_the_figure_of_a_loop(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = ("sent", "began", "written", "noted", "found", "decided")
    trace = "e0123456789ab-0000-00"
    events = [
        Event(
            trace=trace,
            subject=trace,
            plane="control",
            host="h",
            pid=1,
            seq=n,
            name=name,
            wall_ns=n * 10**8,
            mono_ns=0,
        )
        for n, name in enumerate(names)
    ]
    draw(
        tmp_path / "figure.png",
        {"first": random.random((8, 8)), "last": random.random((8, 8))},
        [
            Estimate(acquisition=1, merit=300.0),
            Estimate(acquisition=2, merit=20.0, trusted=False),
            Estimate(acquisition=3, merit=None),
            Estimate(acquisition=4, merit=2.0),
        ],
        [{"C10": 310.0, "C12": 40.0}, {"C10": 1.0, "C12": 0.0}],
        events,
    )
    is_a_picture(tmp_path / "figure.png")


def is_a_picture(path: Path) -> None:
    """A whole PNG; its three parts above and the one below all show something."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    length = struct.unpack(">I", data[8:12])[0]
    assert zlib.crc32(data[12 : 16 + length]) == struct.unpack(">I", data[16 + length : 20 + length])[0]
    pixels = matplotlib.image.imread(path)
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 3
    for x in range(0, 3 * columns, columns):
        assert pixels[:rows, x : x + columns, :3].std() > 0.03, f"the part at {x} is empty"
    assert pixels[rows:, :, :3].std() > 0.03, "the waterfall is empty"
