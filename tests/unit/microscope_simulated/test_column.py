"""What outlives the process: controls, hidden aberrations, the noise and the drift of the next scan."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emflow.microscope.protocol import Aborted, Camera, InstrumentError, Scan, Scan4d
from emflow.microscope.simulated.backend import SimulatedMicroscope
from emflow.microscope.simulated.column import draw
from emflow.microscope.simulated.parameters import ABERRATIONS, parse
from emflow.microscope.simulated.truth import truth

SCAN = Scan4d(shape=(6, 6), step_nm=1.0, exposure_us=1000.0)


def test_a_new_process_finds_the_same_column(lab: Callable[..., Any]) -> None:
    first = lab(seed=3)
    first.microscope.set({"C10_nm": 12.5, "stage_x_nm": -4.0})
    first.microscope.blank(True)
    before = truth(first.state)
    first.microscope.close()
    again = lab(seed=3)
    assert again.microscope.read() == first.microscope.read() | {"C10_nm": 12.5, "stage_x_nm": -4.0}
    assert again.microscope.blanked()
    assert truth(again.state) == before
    assert before["C10_nm"] == pytest.approx(12.5 + before["hidden_C10_nm"])
    assert [p.name for p in again.state.iterdir()] == ["column.json"]


def test_it_survives_kill_and_a_cut_scan_repeated_is_the_same(lab: Callable[..., Any], tmp_path: Path) -> None:
    """Killed in the middle of its second scan, then the second scan again: as if nothing had happened."""
    parameters = {"seed": 8, "clock": "scan", "drift_nm_per_s": [3.0, 1.0]}
    straight = lab("straight", **parameters)
    straight.microscope.set({"C10_nm": 55.0})
    one, two = (straight.data(straight.acquire(SCAN)) for _ in range(2))
    code = f"""
import threading, json
from pathlib import Path
from emflow.microscope.protocol import Scan4d
from emflow.microscope.simulated.backend import SimulatedMicroscope
def build(**more):
    return SimulatedMicroscope(Path("share"), Path("state"), {{**{parameters!r}, **more}})
scan = Scan4d(shape=(6, 6), step_nm=1.0, exposure_us=1000.0)
m = build()
m.set({{"C10_nm": 55.0}})
m.acquire(scan, "a1", "", threading.Event())
m = build(time_scale=1000.0)
print("begun", flush=True)
m.acquire(scan, "lost", "", threading.Event())
"""
    folder = tmp_path / "killed"
    (folder / "share").mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        until = time.monotonic() + 20
        while not (folder / "share" / ".lost.npy.part").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    killed = lab("killed", **parameters)
    assert killed.microscope.read()["C10_nm"] == 55.0
    assert truth(killed.state) == truth(straight.state)
    assert np.array_equal(np.load(folder / "share" / "a1.npy"), one)
    repeated = killed.data(killed.acquire(SCAN, "lost"))
    assert np.array_equal(repeated, two)
    assert not np.array_equal(one, two)  # other noise, and the specimen drifted
    assert killed.files() == ["a1.json", "a1.npy", "lost.json", "lost.npy"]


def test_an_aborted_scan_takes_no_time_and_no_noise(lab: Callable[..., Any]) -> None:
    parameters = {"seed": 1, "clock": "scan", "drift_nm_per_s": [3.0, 1.0]}
    plain, cut = lab("plain", **parameters), lab("cut", **parameters)
    abort = threading.Event()
    abort.set()
    with pytest.raises(Aborted):
        cut.acquire(SCAN, abort=abort)
    assert np.array_equal(plain.data(plain.acquire(SCAN)), cut.data(cut.acquire(SCAN)))


def test_scan_clock_counts_exposures_of_all_kinds(calm: Callable[..., Any]) -> None:
    """2 s of camera and 1 s of scan at 1 nm/s are a stage that went 3 nm the other way."""
    moving = calm("moving", drift_nm_per_s=[1.0, 0.0])
    moving.acquire(Camera(frames=4, exposure_us=5e5))
    moving.acquire(Scan(shape=(10, 10), step_nm=1.0, dwell_us=1e4))
    # exposures so short that nothing moves meanwhile
    action = Scan(shape=(16, 16), step_nm=1.0, dwell_us=0.01)
    still = calm("still")
    still.microscope.set({"stage_y_nm": 3.0})
    assert np.allclose(moving.data(moving.acquire(action)), still.data(still.acquire(action)), atol=1e-4)


def test_wall_clock_drifts_while_nothing_is_done(calm: Callable[..., Any]) -> None:
    lab = calm(clock="wall", drift_nm_per_s=[0.0, 40.0])
    action = Scan(shape=(1, 256), step_nm=0.25, dwell_us=1.0)
    began = time.monotonic()
    first = lab.data(lab.acquire(action))[0]
    time.sleep(0.3)
    second = lab.data(lab.acquire(action))[0]
    most = time.monotonic() - began
    cross = np.fft.ifft(np.fft.fft(second - second.mean()) * np.conj(np.fft.fft(first - first.mean()))).real
    moved_nm = float(((int(cross.argmax()) + 128) % 256 - 128) * 0.25)
    assert 40 * 0.3 - 0.5 <= moved_nm <= 40 * most + 0.5


@pytest.mark.parametrize("seed", range(0, 200, 7))
def test_hidden_aberrations_are_drawn_within_bounds(seed: int) -> None:
    hidden = draw(parse({"seed": seed}))
    assert 100 <= abs(hidden["C10_nm"]) <= 600
    assert 0 < math.hypot(hidden["C12a_nm"], hidden["C12b_nm"]) <= 150
    assert hidden == draw(parse({"seed": seed}))
    given = draw(parse({"seed": seed, "hidden": {"C12a_nm": 7}}))
    assert given == hidden | {"C12a_nm": 7.0}


def test_hidden_aberrations_of_many_seeds_have_both_signs_and_differ() -> None:
    many = np.array([list(draw(parse({"seed": s})).values()) for s in range(100)])
    assert len(np.unique(many[:, 0])) == 100
    for column in many.T:
        assert 25 < (column > 0).sum() < 75


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"C30_nm": 1.0}, "no control is called 'C30_nm'"),
        ({"C10_nm": float("nan")}, "C10_nm can't be nan"),
        ({"C10_nm": float("inf")}, "C10_nm can't be inf"),
        ({"C10_nm": True}, "C10_nm can't be True"),
        ({"C10_nm": "1"}, "C10_nm can't be '1'"),
        ({"C12a_nm": 2e5}, "C12a_nm can't be 200000"),
        ({"stage_y_nm": -2e6}, "stage_y_nm can't be"),
    ],
)
def test_a_refused_value_changes_nothing(lab: Callable[..., Any], values: dict[str, Any], said: str) -> None:
    found = lab()
    with pytest.raises(InstrumentError, match=said):
        found.microscope.set({"C12b_nm": 5.0, **values})
    assert not any(found.microscope.read().values())
    assert not any(json.loads((found.state / "column.json").read_text())["controls"].values())


def test_another_column_is_not_taken_over(lab: Callable[..., Any]) -> None:
    lab(seed=1)
    with pytest.raises(ValueError, match="is the column of seed 1"):
        lab(seed=2)
    with pytest.raises(ValueError, match="is the column of seed 1"):
        lab(seed=1, hidden={"C10_nm": 1.0})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 1}', '{"v": 2}', "\x00"])
def test_a_damaged_column_is_an_error_and_left_alone(lab: Callable[..., Any], text: str) -> None:
    state = lab().state
    (state / "column.json").write_text(text)
    with pytest.raises(ValueError, match="no state of a column"):
        lab()
    assert (state / "column.json").read_text() == text


def test_truth_needs_a_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no simulated column"):
        truth(tmp_path)


def test_truth_is_control_plus_hidden(lab: Callable[..., Any]) -> None:
    found = lab(hidden={"C10_nm": 250.0, "C12a_nm": -30.0, "C12b_nm": 0.0})
    found.microscope.set({"C10_nm": -249.0, "C12a_nm": 33.0})
    true = truth(found.state)
    assert [true[n] for n in ABERRATIONS] == [1.0, 3.0, 0.0]
    assert [true[f"hidden_{n}"] for n in ABERRATIONS] == [250.0, -30.0, 0.0]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"sed": 1}, "sed"),
        ({"hidden": {"C1_nm": 3.0}}, "C1_nm"),
        ({"hidden": {"C10_nm": 1e9}}, "hidden.C10_nm"),
        ({"hidden": {"C10_nm": float("nan")}}, "hidden.C10_nm"),
        ({"drift_nm_per_s": [float("inf"), 0.0]}, "drift_nm_per_s"),
        ({"time_scale": -1}, "time_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"format": "tiff"}, "format"),
        ({"dtype": "int16"}, "dtype"),
        ({"detector_shape": [64, 5000]}, "detector_shape"),
        ({"semi_angle_mrad": 40.0}, "semi_angle_mrad"),
        ({"format": "merlin", "dtype": "float32"}, "float32"),
        ({"noise": 1}, "noise"),
    ],
)
def test_a_wrong_parameter_is_named(lab: Callable[..., Any], parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lab(**parameters)


def test_whole_numbers_of_a_toml_file_are_fine() -> None:
    parsed = parse({"semi_angle_mrad": 20, "hidden": {"C10_nm": 300}, "drift_nm_per_s": [0, 0]})
    assert parsed.hidden.C10_nm == 300.0


def test_it_remembers_its_newest_acquisition(tmp_path: Path) -> None:
    microscope = SimulatedMicroscope(tmp_path, tmp_path / "state", {"seed": 3})
    made = microscope.acquire(Camera(frames=1, exposure_us=1.0), "e0123456789ab-0001-00", "t", threading.Event())
    again = SimulatedMicroscope(tmp_path, tmp_path / "state", {"seed": 3})
    assert again.made(made.name) == made
    assert again.made("e0123456789ab-0001-01") is None


def test_a_full_disk_refuses_a_set_and_blanks_all_the_same(
    lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = lab(seed=3)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InstrumentError) as raised:
        one.microscope.set({"C10_nm": 5.0})
    assert str(raised.value) == "column.json can't be written: No space left on device"  # clients hear no paths
    assert one.microscope.read()["C10_nm"] == 0.0
    with pytest.raises(InstrumentError):
        one.microscope.blank(True)
    assert one.microscope.blanked()
