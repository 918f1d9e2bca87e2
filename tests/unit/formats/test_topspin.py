"""TopSpin's .app5: order by number, the scan from the beam positions, and frames that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_topspin
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, NotThisFormat
from mpi_kernels.formats.topspin import Topspin, _scan

SCAN = ExactScan((3, 4), (6, 8), "uint16", seed=4)
SERIES = "18d9446f-22bf-4fb1-8d13-338174e75d20/3526f008-a687-41fb-a21e-c21362241492"


def read(path: Path) -> tuple[Header, np.ndarray]:
    source = Topspin().open(os.fspath(path))
    header = source.header
    out = np.empty((header.frames, *header.det_shape), header.dtype)
    source.frames(0, header.frames, out)
    source.close()
    return header, out


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """10 comes after 9, not after 1."""
    header, out = read(write_topspin(SCAN, tmp_path / "a.app5"))
    np.testing.assert_array_equal(out, SCAN.frames(0, 12))
    assert header.scan_shape == (3, 4)
    assert [(round(a.scale, 9), a.unit) for a in header.scan_axes] == [(2.0, "nm")] * 2


@pytest.mark.parametrize("gone", [0, 5, 11])
def test_a_frame_that_is_not_there_is_named(tmp_path: Path, gone: int) -> None:
    path = write_topspin(SCAN, tmp_path / "a.app5")
    with h5py.File(path, "r+") as file:
        del file[f"{SERIES}/{gone}/Data"]
    with pytest.raises((Incomplete, NotThisFormat)) as caught:
        Topspin().open(os.fspath(path))
    assert caught.value.frame == (gone or None)


def test_a_number_that_is_left_out_is_named(tmp_path: Path) -> None:
    path = write_topspin(SCAN, tmp_path / "a.app5")
    with h5py.File(path, "r+") as file:
        del file[f"{SERIES}/5"]
    with pytest.raises(Incomplete, match="frame 5 is not there") as caught:
        Topspin().probe(os.fspath(path))
    assert caught.value.frame == 5


def replaced(path: Path, frame: int, change: str) -> Path:
    with h5py.File(path, "r+") as file:
        group = file[f"{SERIES}/{frame}"]
        del group["Data"]
        if change == "never written":
            group.create_dataset("Data", (6, 8), "u2")
        elif change == "compressed":
            group.create_dataset("Data", data=np.zeros((6, 8), "u2"), chunks=(6, 8), compression="gzip")
        elif change == "another shape":
            group["Data"] = np.zeros((6, 7), "u2")
        elif change == "soft":
            group["Data"] = h5py.SoftLink(f"/{SERIES}/0/Data")
        elif change == "outside":
            group["Data"] = h5py.ExternalLink("other.h5", "/x")
        elif change == "raw file":
            group.create_dataset("Data", (6, 8), "u2", external=[("raw.bin", 0, 96)])
    return path


@pytest.mark.parametrize("frame", [3, 11])
@pytest.mark.parametrize("change", ["never written", "compressed", "another shape", "soft", "outside", "raw file"])
def test_frames_that_cannot_be_read(tmp_path: Path, change: str, frame: int) -> None:
    path = replaced(write_topspin(SCAN, tmp_path / "a.app5"), frame, change)
    (tmp_path / "raw.bin").write_bytes(bytes(96))
    with pytest.raises((FormatError, Incomplete)) as caught:
        Topspin().open(os.fspath(path))
    assert caught.value.frame == frame
    assert caught.value.next_step


def test_positions_that_are_no_grid_make_a_stack(tmp_path: Path) -> None:
    path = write_topspin(SCAN, tmp_path / "a.app5")
    with h5py.File(path, "r+") as file:
        del file[f"{SERIES}/11/Metadata"]
    header, out = read(path)
    assert (header.kind, header.scan_shape, header.scan_axes) == ("stack", (12,), ())
    np.testing.assert_array_equal(out, SCAN.frames(0, 12))


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.6, 4.0])
@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (50, 2)])
def test_a_scan_may_be_turned(angle: float, shape: tuple[int, int]) -> None:
    along, down = np.array([np.sin(angle), np.cos(angle)]) * 1e-9, np.array([np.cos(angle), -np.sin(angle)]) * 3e-9
    places = [1e-7 + i * down + j * along for i in range(shape[0]) for j in range(shape[1])]
    found, steps = _scan(lambda i: (float(places[i][0]), float(places[i][1])), len(places))
    assert found == shape
    assert steps == pytest.approx((3.0, 1.0))


@pytest.mark.parametrize(
    "places",
    [
        [(0.0, 0.0)],
        [(0.0, 0.0)] * 6,
        [(0.0, float(i)) for i in range(6)],
        [(0.0, float(i % 2)) for i in range(6)],  # to and fro on one line
        [(float(i // 4), float(i % 4)) for i in range(6)],  # cut off in the second row
        [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (2.0, 0.5), (2.0, 1.5)],
    ],
)
def test_other_positions_are_a_stack(places: list[tuple[float, float]]) -> None:
    assert _scan(lambda i: places[i], len(places)) == ((len(places),), None)


def test_a_plain_file_is_none(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.app5", "w") as file:
        file["a"] = np.zeros((3, 4, 5))
    with pytest.raises(NotThisFormat):
        Topspin().probe(os.fspath(tmp_path / "a.app5"))
