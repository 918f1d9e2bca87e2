"""What every registered microscope must do."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from emflow import registry
from emflow.microscope.protocol import (
    Aborted,
    Acquire,
    Acquired,
    Camera,
    InstrumentError,
    Microscope,
    Scan,
    Scan4d,
)
from mpi_kernels.errors import Incomplete, KernelError
from mpi_kernels.formats.choose import choose

NAME = "e0123456789ab-0001-02"
TRACE = "e0123456789ab-0001-02"

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "simulated": {
        f"{form}-{writing}": {"format": form, "writing": writing, "detector_shape": [16, 20]}
        for form in ("npy", "merlin", "hdf5")
        for writing in ("whole", "rows")
    }
}
"""Parameters to try beside none at all, by backend; a backend that is not named is tried with none."""

SLOW: dict[str, dict[str, Any]] = {"simulated": {"time_scale": 1.0}}
"""What makes an acquisition take as long as its exposures say, where that is a choice."""

ACTIONS: dict[str, Acquire] = {
    "image": Scan(shape=(6, 8), step_nm=0.5, dwell_us=20.0),
    "stack": Camera(frames=3, exposure_us=500.0),
    "4d": Scan4d(shape=(4, 6), step_nm=0.5, exposure_us=500.0),
}
LONG: dict[str, Acquire] = {
    "image": Scan(shape=(64, 64), step_nm=0.5, dwell_us=2000.0),
    "stack": Camera(frames=100, exposure_us=80_000.0),
    "4d": Scan4d(shape=(16, 16), step_nm=0.5, exposure_us=32_000.0),
}
"""About 8 s each."""


class Bench(NamedTuple):
    """A microscope with its folders."""

    microscope: Microscope
    share: Path
    state: Path
    again: Callable[[], Microscope]
    threads: set[threading.Thread]
    """Those that were there before it: other tests of this process may have left some."""


CASES = [(name, variant) for name in registry.names("microscopes") for variant in ("default", *VARIANTS.get(name, {}))]


def built(root: Path, backend: str, parameters: dict[str, Any]) -> Bench:
    share, state = root / "share", root / "state"
    share.mkdir()
    state.mkdir()

    def build() -> Microscope:
        made: Microscope = registry.load("microscopes", backend)(share, state, parameters)
        return made

    before = set(threading.enumerate())
    return Bench(build(), share, state, build, before)


@pytest.fixture(params=CASES, ids="-".join)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    backend, variant = request.param
    made = built(tmp_path, backend, VARIANTS.get(backend, {}).get(variant, {}))
    yield made
    made.microscope.close()


@pytest.fixture(params=CASES, ids="-".join)
def slow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    backend, variant = request.param
    made = built(tmp_path, backend, VARIANTS.get(backend, {}).get(variant, {}) | SLOW.get(backend, {}))
    yield made
    made.microscope.close()


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def read(bench: Bench, path: str) -> tuple[Any, np.ndarray]:
    """Header and all frames, by emflow's own format."""
    formats = {n: registry.load("formats", n)() for n in registry.names("formats")}
    name, header = choose(str(bench.share / path), formats)
    out = np.empty((int(np.prod(header.scan_shape)), *header.det_shape), header.dtype)
    with contextlib.closing(formats[name].open(str(bench.share / path))) as source:
        source.complete()
        source.frames(0, len(out), out)
    return header, out


every_kind = pytest.mark.parametrize("kind", ACTIONS)


def test_there_is_a_microscope() -> None:
    assert registry.names("microscopes")
    assert set(VARIANTS) <= set(registry.names("microscopes"))


@every_kind
def test_an_acquisition_is_a_file_that_emflow_reads(bench: Bench, kind: str) -> None:
    outside = files(bench.share.parent) - files(bench.state)
    action = ACTIONS[kind]
    dose = bench.microscope.dose_e(action)
    made = bench.microscope.acquire(action, NAME, TRACE, threading.Event())
    assert isinstance(made, Acquired)
    assert (made.name, Path(made.path).stem, Path(made.path).name) == (NAME, NAME, made.path)
    header, frames = read(bench, made.path)
    assert (made.kind, header.kind) == (kind, kind)
    assert (header.scan_shape, header.det_shape) == (made.scan_shape, made.det_shape)
    assert made.frames == len(frames) == max(1, made.frames)
    assert frames.max() > 0
    assert made.dose_e == pytest.approx(dose)
    assert dose > 0
    shape = {"image": made.det_shape, "stack": (3,), "4d": made.scan_shape}[kind]
    assert shape == {"image": (6, 8), "stack": (3,), "4d": (4, 6)}[kind]
    # all that it made is named after the command and lies in the share, or in its private folder
    new = files(bench.share.parent) - outside
    assert {n for n in new if not n.startswith("state/")} == {f"share/{n}" for n in files(bench.share)}
    assert {Path(n).name.split(".")[0] for n in files(bench.share)} == {NAME}
    assert not [n for n in files(bench.share) if n.endswith(".emflow.json")]  # the server writes that


def test_axes_are_calibrated_where_the_format_can(bench: Bench) -> None:
    made = bench.microscope.acquire(ACTIONS["4d"], NAME, TRACE, threading.Event())
    header, _ = read(bench, made.path)
    if header.format == "merlin":
        return
    assert [(a.unit, a.scale) for a in header.scan_axes] == [("nm", pytest.approx(0.5))] * 2
    assert [a.unit for a in header.det_axes] in (["rad"] * 2, ["mrad"] * 2)
    for axis, n in zip(header.det_axes, made.det_shape, strict=True):
        assert axis.offset < 0 < axis.offset + axis.scale * (n - 1)


def test_controls_are_read_as_they_were_set(bench: Bench) -> None:
    before = dict(bench.microscope.read())
    assert before
    assert all(type(value) is float for value in before.values())
    name = "C10_nm"
    bench.microscope.set({name: before[name] + 25.0})
    assert bench.microscope.read()[name] == pytest.approx(before[name] + 25.0)
    assert {k: v for k, v in bench.microscope.read().items() if k != name} == pytest.approx(
        {k: v for k, v in before.items() if k != name}
    )
    with contextlib.suppress(TypeError):
        bench.microscope.read()[name] = 1e9  # type: ignore[index]
    assert bench.microscope.read()[name] == pytest.approx(before[name] + 25.0)


@pytest.mark.parametrize("wrong", [{"no_such_control_nm": 1.0}, {"C10_nm": float("nan")}, {"C10_nm": 1e300}])
def test_what_cannot_be_set_changes_nothing(bench: Bench, wrong: dict[str, float]) -> None:
    before = dict(bench.microscope.read())
    with pytest.raises(InstrumentError):
        bench.microscope.set({"stage_y_nm": before["stage_y_nm"] + 1.0, **wrong})
    assert dict(bench.microscope.read()) == before


def test_it_checks_its_parameters(tmp_path: Path) -> None:
    for backend in registry.names("microscopes"):
        with pytest.raises(ValueError, match="no_such_parameter"):
            registry.load("microscopes", backend)(tmp_path, tmp_path / "state", {"no_such_parameter": 1})


def test_blank_takes_the_beam_off(bench: Bench) -> None:
    assert bench.microscope.blanked() is False
    bench.microscope.blank(True)
    assert bench.microscope.blanked() is True
    bench.microscope.blank(True)
    try:
        made = bench.microscope.acquire(ACTIONS["4d"], NAME, TRACE, threading.Event())
    except InstrumentError:
        assert files(bench.share) == set()
    else:
        assert not read(bench, made.path)[1].any()
    bench.microscope.blank(False)
    assert bench.microscope.blanked() is False
    made = bench.microscope.acquire(ACTIONS["4d"], f"{NAME}-01", TRACE, threading.Event())
    assert read(bench, made.path)[1].any()


@every_kind
def test_what_was_made_is_known_over_a_restart_or_not_at_all(bench: Bench, kind: str) -> None:
    assert bench.microscope.made(NAME) is None
    abort = threading.Event()
    abort.set()
    with pytest.raises(Aborted):
        bench.microscope.acquire(ACTIONS[kind], f"{NAME}-00", TRACE, abort)
    made = bench.microscope.acquire(ACTIONS[kind], f"{NAME}-01", TRACE, threading.Event())
    for microscope in (bench.microscope, bench.again()):
        assert microscope.made(f"{NAME}-01") in (made, None)
        assert microscope.made(f"{NAME}-00") is None
        assert microscope.made(NAME) is None


def test_no_dose_for_what_cannot_be_made(bench: Bench) -> None:
    for action in (
        Scan4d(shape=(65536, 65536), step_nm=1.0, exposure_us=1.0),
        Scan4d(shape=(4, 4), step_nm=-1.0, exposure_us=1.0),
        Scan(shape=(4, 4), step_nm=1.0, dwell_us=0.0),
        Camera(frames=1, exposure_us=float("nan")),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            bench.microscope.dose_e(action)
        with pytest.raises(InstrumentError):
            bench.microscope.acquire(action, NAME, TRACE, threading.Event())
    assert files(bench.share) == set()


def test_dose_is_proportional_to_time_and_frames(bench: Bench) -> None:
    one = bench.microscope.dose_e(Scan4d(shape=(2, 3), step_nm=1.0, exposure_us=100.0))
    assert bench.microscope.dose_e(Scan4d(shape=(4, 3), step_nm=2.0, exposure_us=300.0)) == pytest.approx(6 * one)


@pytest.mark.parametrize("name", ["", "..", "../out", "a/b", "a\\b", ".hidden", "a\0b", "a" * 300, "/tmp/out"])
def test_it_writes_nowhere_else(bench: Bench, name: str) -> None:
    before = files(bench.share.parent) - {f"state/{n}" for n in files(bench.state)}
    with pytest.raises(InstrumentError):
        bench.microscope.acquire(ACTIONS["image"], name, TRACE, threading.Event())
    assert files(bench.share.parent) - {f"state/{n}" for n in files(bench.state)} == before


@every_kind
def test_aborted_before_it_began(bench: Bench, kind: str) -> None:
    abort = threading.Event()
    abort.set()
    with pytest.raises(Aborted):
        bench.microscope.acquire(ACTIONS[kind], NAME, TRACE, abort)
    unreadable(bench)


@every_kind
def test_an_abort_ends_it_soon(slow: Bench, kind: str) -> None:
    """And reading, while it runs, is quick."""
    abort, ended = threading.Event(), []

    def work() -> None:
        try:
            slow.microscope.acquire(LONG[kind], NAME, TRACE, abort)
        except Aborted as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.25)
    began = time.monotonic()
    slow.microscope.read()
    slow.microscope.blanked()
    assert time.monotonic() - began < 0.2
    assert thread.is_alive()
    abort.set()
    began = time.monotonic()
    thread.join(10)
    assert time.monotonic() - began < 0.5
    assert len(ended) == 1
    unreadable(slow)
    # and it goes on after that
    made = slow.microscope.acquire(ACTIONS[kind], f"{NAME}-01", TRACE, threading.Event())
    assert read(slow, made.path)[1].any()


def unreadable(bench: Bench) -> None:
    """Whatever is left under a final name is no complete acquisition."""
    formats = {n: registry.load("formats", n)() for n in registry.names("formats")}
    for name in files(bench.share):
        if Path(name).suffix not in {s for f in formats.values() for s in f.suffixes}:
            continue
        with pytest.raises((Incomplete, KernelError)):
            read(bench, name)


def test_a_second_one_finds_the_controls(bench: Bench) -> None:
    bench.microscope.set({"C10_nm": 33.0})
    bench.microscope.close()
    again = bench.again()
    assert again.read()["C10_nm"] == pytest.approx(33.0)
    again.close()


def test_closing_twice_does_no_harm(bench: Bench) -> None:
    bench.microscope.close()
    bench.microscope.close()


def test_it_leaves_no_thread_nor_open_file(bench: Bench) -> None:
    for number, action in enumerate(ACTIONS.values()):
        bench.microscope.acquire(action, f"{NAME}-0{number}", TRACE, threading.Event())
    bench.microscope.close()
    assert set(threading.enumerate()) <= bench.threads
    targets = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            targets.add(os.readlink(fd))  # noqa: PTH115 - Path.readlink would turn pipe:[1] into a path
    assert not [t for t in targets if t.startswith(str(bench.share.parent))]
