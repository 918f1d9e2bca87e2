"""How the files come to be: whole or growing, in every format, and what is left of one that was cut."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from emflow.microscope.protocol import Aborted, Acquire, Camera, InstrumentError, Scan, Scan4d
from mpi_kernels.errors import Incomplete

ACTIONS: dict[str, Acquire] = {
    "4d": Scan4d(shape=(5, 7), step_nm=0.5, exposure_us=1000.0, centre_nm=(3.0, -2.0)),
    "stack": Camera(frames=6, exposure_us=2000.0),
    "image": Scan(shape=(9, 11), step_nm=0.25, dwell_us=10.0),
}
SUFFIX = {"npy": ".npy", "merlin": ".mib", "hdf5": ".h5"}
SMALL: dict[str, Any] = {"detector_shape": [12, 16], "ronchigram_shape": [24, 20], "detector_mrad": 32}

forms = pytest.mark.parametrize("form", ["npy", "merlin", "hdf5"])
ways = pytest.mark.parametrize("writing", ["whole", "rows"])


@ways
@forms
@pytest.mark.parametrize("kind", ACTIONS)
def test_emflow_reads_what_is_written(lab: Callable[..., Any], form: str, writing: str, kind: str) -> None:
    found = lab("x", format=form, writing=writing, clock="scan", **SMALL)
    made = found.acquire(ACTIONS[kind], "e0123456789ab-0001-02")
    header = found.header(made)
    suffix = ".npy" if kind == "image" and form == "merlin" else SUFFIX[form]
    assert made.path == f"e0123456789ab-0001-02{suffix}"
    assert (made.kind, header.kind) == (kind, kind)
    assert (header.scan_shape, header.det_shape) == (made.scan_shape, made.det_shape)
    assert header.dtype == "uint16"
    assert not header.warnings
    # the same counts, whatever the file
    plain = lab("plain", clock="scan", **SMALL)
    wanted = plain.data(plain.acquire(ACTIONS[kind]))
    assert wanted.any()
    assert np.array_equal(found.data(made), wanted)
    assert not [name for name in found.files() if name.startswith(".")]
    if suffix != ".mib":  # Merlin's files have no calibration
        calibrated(kind, header)


def calibrated(kind: str, header: Any) -> None:
    scan = [(a.scale, a.offset, a.unit) for a in header.scan_axes]
    det = [(a.scale, a.offset, a.unit) for a in header.det_axes]
    if kind == "4d":
        assert scan == [(0.5, 3.0 - 1.25, "nm"), (0.5, -2.0 - 1.75, "nm")]
        assert det == [(pytest.approx(64e-3 / 12), pytest.approx(-32e-3), "rad"), (4e-3, -32e-3, "rad")]
    elif kind == "stack":
        assert scan == [(0.002, 0.0, "s")]
        assert det == [
            (pytest.approx(64e-3 / 24), pytest.approx(-32e-3), "rad"),
            (pytest.approx(3.2e-3), pytest.approx(-32e-3), "rad"),
        ]
    else:
        assert det == [(0.25, -4.5 * 0.25, "nm"), (0.25, -5.5 * 0.25, "nm")]


@pytest.mark.parametrize("writing", ["whole", "rows"])
def test_pieces_smaller_than_a_row_make_the_same_scan(lab: Callable[..., Any], writing: str) -> None:
    """A large detector is computed and written in pieces of a row; the expectation does not depend on them."""
    action = Scan4d(shape=(3, 7), step_nm=1.0, exposure_us=1e5)
    calm = {"noise": False, "clock": "scan", "drift_nm_per_s": [0.0, 0.0], "detector_shape": [256, 300]}
    found = lab("x", format="hdf5", writing=writing, **calm)
    made = found.acquire(action)  # 3 frames at once, 7 in a row
    with h5py.File(found.share / made.path) as file:
        assert file["data"].chunks == ((1, 3, 256, 300) if writing == "rows" else None)
    plain = lab("plain", **calm)
    both = found.data(made), plain.data(plain.acquire(action))
    assert np.array_equal(*both)
    assert len({frame.tobytes() for row in both[0] for frame in row}) == 21


@contextlib.contextmanager
def acquiring(found: Any, action: Acquire) -> Iterator[tuple[threading.Event, list[BaseException]]]:
    """An acquisition named ``slow`` in a thread."""
    abort, ended = threading.Event(), []

    def work() -> None:
        try:
            found.acquire(action, "slow", abort)
        except (Aborted, InstrumentError) as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield abort, ended
    finally:
        thread.join(20)
        assert not thread.is_alive()


def wait_for(path: Path) -> None:
    until = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.002)


SLOW = Scan4d(shape=(20, 8), step_nm=1.0, exposure_us=3000.0)
"""0.48 s with a time scale of 1."""


@forms
def test_rows_grow_under_the_final_name(lab: Callable[..., Any], form: str) -> None:
    found = lab(format=form, writing="rows", time_scale=1.0, **SMALL)
    path = found.share / f"slow{SUFFIX[form]}"
    sizes, began = [], time.monotonic()
    with acquiring(found, SLOW):
        wait_for(path)
        beside = found.files()
        while time.monotonic() - began < 0.4:
            sizes.append(path.stat().st_size)
            time.sleep(0.01)
    took = time.monotonic() - began
    assert 0.45 <= took < 5
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 5
    assert sizes[0] < path.stat().st_size / 2
    # what describes it came before it
    assert (
        set(beside) == {"npy": {"slow.npy", "slow.json"}, "merlin": {"slow.mib", "slow.hdr"}, "hdf5": {"slow.h5"}}[form]
    )


@forms
def test_whole_appears_at_the_end(lab: Callable[..., Any], form: str) -> None:
    found = lab(format=form, time_scale=1.0, **SMALL)
    with acquiring(found, SLOW):
        wait_for(found.share / f".slow{SUFFIX[form]}.part")
        time.sleep(0.1)
        assert found.files() == [f".slow{SUFFIX[form]}.part"]
    assert f"slow{SUFFIX[form]}" in found.files()
    assert not [name for name in found.files() if name.startswith(".")]


@ways
@forms
def test_abort_is_noticed_soon_and_nothing_looks_whole(lab: Callable[..., Any], form: str, writing: str) -> None:
    found = lab(format=form, writing=writing, time_scale=1.0, **SMALL)
    path = found.share / (f"slow{SUFFIX[form]}" if writing == "rows" else f".slow{SUFFIX[form]}.part")
    with acquiring(found, SLOW) as (abort, ended):
        wait_for(path)
        time.sleep(0.1)
        abort.set()
        began = time.monotonic()
    assert time.monotonic() - began < 0.3
    assert [type(e) for e in ended] == [Aborted]
    if writing == "whole":
        assert found.files() == []
    else:
        with pytest.raises(Incomplete):
            found.probe(f"slow{SUFFIX[form]}")


def test_abort_in_the_middle_of_computing(lab: Callable[..., Any]) -> None:
    """As fast as it can, 16 MiB a row: noticed between two pieces."""
    found = lab(detector_shape=[256, 256])
    with acquiring(found, Scan4d(shape=(200, 128), step_nm=1.0, exposure_us=1000.0)) as (abort, ended):
        wait_for(found.share / ".slow.npy.part")
        time.sleep(0.2)
        abort.set()
        began = time.monotonic()
    assert time.monotonic() - began < 0.5
    assert [type(e) for e in ended] == [Aborted]
    assert found.files() == []


def test_a_beam_taken_away_ends_the_scan(lab: Callable[..., Any]) -> None:
    found = lab(time_scale=1.0, **SMALL)
    with acquiring(found, SLOW) as (_, ended):
        wait_for(found.share / ".slow.npy.part")
        found.microscope.blank(True)
    assert [type(e) for e in ended] == [InstrumentError]
    assert "blanked" in str(ended[0])
    assert found.files() == []


def test_a_beam_taken_away_to_abort_is_an_abort(lab: Callable[..., Any]) -> None:
    found = lab(time_scale=1.0, **SMALL)
    with acquiring(found, SLOW) as (abort, ended):
        wait_for(found.share / ".slow.npy.part")
        found.microscope.blank(True)
        time.sleep(0.05)
        abort.set()
    assert [type(e) for e in ended] == [Aborted]


@ways
@forms
def test_a_scan_is_never_written_over(lab: Callable[..., Any], form: str, writing: str) -> None:
    found = lab(format=form, writing=writing, **SMALL)
    made = found.acquire(ACTIONS["4d"], "a")
    before = {name: (found.share / name).read_bytes() for name in found.files()}
    with pytest.raises(InstrumentError, match="there already"):
        found.acquire(ACTIONS["4d"], "a")
    assert {name: (found.share / name).read_bytes() for name in found.files()} == before
    assert found.header(made)


@ways
def test_a_share_that_is_gone_is_an_instrument_error(lab: Callable[..., Any], writing: str) -> None:
    found = lab(writing=writing)
    found.share.rmdir()
    with pytest.raises(InstrumentError, match=r"a1\.npy can't be written"):
        found.acquire(ACTIONS["4d"])
    assert not found.share.exists()


def test_what_a_killed_process_left_is_replaced(lab: Callable[..., Any]) -> None:
    found = lab()
    (found.share / ".a.npy.part").write_bytes(b"half a scan")
    found.acquire(ACTIONS["4d"], "a")
    assert found.files() == ["a.json", "a.npy"]
