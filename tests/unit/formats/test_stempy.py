"""Counted data of stempy: every version of its layout, several frames at a position, and what is missing or damaged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_stempy
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.hdf5 import Hdf5
from mpi_kernels.formats.stempy import Stempy, StempySource
from mpi_kernels.sparse import SparseSource

Rows = Sequence[Sequence[int]]


def write(path: Path, rows: Rows, positions: Sequence[int], scan: tuple[int, int], columns: int = 0) -> Path:
    """Frames of 3 x 4 pixels; ``columns`` frames per position where it is not 0."""
    with h5py.File(path, "w") as file:
        shape = (len(positions), columns) if columns else (len(positions),)
        frames = file.create_dataset("electron_events/frames", shape, h5py.vlen_dtype(np.uint32))
        for row, at in zip(rows, np.ndindex(shape), strict=True):
            frames[at] = np.array(row, np.uint32)
        frames.attrs.update({"Ny": 3, "Nx": 4})
        where = file.create_dataset("electron_events/scan_positions", data=np.array(positions))
        where.attrs.update({"Ny": scan[0], "Nx": scan[1]})
    return path


def opened(path: Path) -> StempySource:
    source = Stempy().open(os.fspath(path))
    assert isinstance(source, StempySource)
    assert isinstance(source, SparseSource)
    return source


def dense(rows: Rows, positions: Sequence[int], total: int) -> np.ndarray:
    out = np.zeros((total, 12), np.uint32)
    for row, at in zip(rows, positions, strict=True):
        for pixel in row:
            out[at, pixel] += 1
    return out.reshape(total, 3, 4)


CASES: dict[str, tuple[Rows, Sequence[int], int]] = {
    "one row a position": ([[0, 3], [], [11], [5, 6, 7]], [0, 1, 2, 3], 0),
    "in any order": ([[0, 3], [1], [11], [5, 6, 7]], [2, 0, 3, 1], 0),
    "a pixel named twice": ([[0, 3, 3], [7, 2, 7, 7], [11], []], [0, 1, 2, 3], 0),
    "several rows a position": ([[0, 3], [1], [11], [3], [3, 4], [1, 2]], [0, 1, 2, 3, 0, 2], 0),
    "several frames a position": ([[0], [0, 1], [2], [2], [], [], [9], [8]], [0, 1, 2, 3], 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 3, 4])
def test_rows_add_up_where_they_belong(tmp_path: Path, name: str, step: int) -> None:
    rows, positions, columns = CASES[name]
    source = opened(write(tmp_path / "a.h5", rows, positions, (2, 2), columns))
    wanted = dense(rows, np.repeat(positions, columns or 1).tolist(), 4)
    out = np.full((4, 3, 4), 77, np.uint32)
    for start in range(0, 4, step):
        stop = min(4, start + step)
        source.frames(start, stop, out[start:stop])
        events = source.events(start, stop)
        for i in range(stop - start):
            pixels = events.indices[events.bounds[i] : events.bounds[i + 1]]
            np.testing.assert_array_equal(np.bincount(pixels, minlength=12), wanted[start + i].reshape(-1))
    np.testing.assert_array_equal(out, wanted)
    source.complete()
    source.close()


def test_a_position_without_a_row_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", [[1], [2], [3]], [0, 1, 3], (2, 2))
    with pytest.raises(Incomplete, match="3 of 4 scan positions") as caught:
        Stempy().open(os.fspath(path))
    assert caught.value.frame == 2


@pytest.mark.parametrize("positions", [[0, 1, 2, 4], [0, 1, 2, -1]])
def test_a_position_outside_of_the_scan(tmp_path: Path, positions: list[int]) -> None:
    with pytest.raises(FormatError, match="scan positions reach"):
        Stempy().probe(os.fspath(write(tmp_path / "a.h5", [[1], [2], [3], [4]], positions, (2, 2))))


def test_an_event_outside_of_the_frame_names_the_frame(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.h5", [[1], [2], [3, 12, 4], [4]], [0, 1, 2, 3], (2, 2)))
    assert source.events(0, 2).indices.tolist() == [1, 2]
    for start in (0, 2):
        with pytest.raises(MissingData, match="pixel 12 of 12") as caught:
            source.events(start, 4)
        assert caught.value.frame == 2
    source.close()


def test_lists_that_were_never_written(tmp_path: Path) -> None:
    """HDF5 would give empty lists."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        frames = file.create_dataset("electron_events/frames", (4,), h5py.vlen_dtype(np.uint32), chunks=(2,))
        frames[2], frames[3] = np.array([1], np.uint32), np.array([2], np.uint32)
        frames.attrs.update({"Ny": 3, "Nx": 4})
        where = file.create_dataset("electron_events/scan_positions", data=[3, 2, 1, 0])
        where.attrs.update({"Ny": 2, "Nx": 2})
    with pytest.raises(Incomplete, match="1 of 2 chunks") as caught:
        Stempy().probe(os.fspath(path))
    assert caught.value.frame == 3


def test_files_of_others_and_broken_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", [[1], [2], [3], [4]], [0, 1, 2, 3], (2, 2))

    def broken(change: str) -> Path:
        other = tmp_path / "b.h5"
        other.write_bytes(path.read_bytes())
        with h5py.File(other, "r+") as file:
            group = file["electron_events"]
            if change == "no Nx":
                del group["frames"].attrs["Nx"]
            elif change == "huge":
                group["scan_positions"].attrs["Nx"] = 1 << 40
            elif change == "soft":
                group.move("frames", "hidden")
                group["frames"] = h5py.SoftLink("/electron_events/hidden")
            elif change == "numbers":
                del group["frames"]
                group["frames"] = np.zeros(4)
            elif change == "lengths":
                del group["scan_positions"]
                group["scan_positions"] = np.zeros(5, int)
        return other

    for change in ("no Nx", "huge", "soft", "numbers", "lengths"):
        with pytest.raises(FormatError) as caught:
            Stempy().open(os.fspath(broken(change)))
        assert caught.value.next_step
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["data"] = np.zeros((2, 3, 4))
    with pytest.raises(NotThisFormat):
        Stempy().probe(os.fspath(tmp_path / "c.h5"))


def test_images_beside_the_events_are_not_taken_for_the_frames(tmp_path: Path) -> None:
    path = write_stempy(ExactScan((2, 3), (4, 5), "uint32", seed=1), tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["stem/images"] = np.zeros((2, 2, 3))
    with pytest.raises(NotThisFormat, match="electron events"):
        Hdf5().probe(os.fspath(path))
    assert Stempy().probe(os.fspath(path)).scan_shape == (2, 3)


def test_any_damage_gives_our_errors_only(tmp_path: Path) -> None:
    path = write_stempy(ExactScan((3, 4), (6, 8), "uint32", seed=1), tmp_path / "a.h5")
    data, generator = bytearray(path.read_bytes()), np.random.default_rng(5)
    for _ in range(25):
        damaged = data.copy()
        for at in generator.integers(0, len(data), 8):
            damaged[at] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            source = opened(path)
        except KernelError:
            continue
        try:
            events = source.events(0, source.header.frames)
        except KernelError:
            continue
        finally:
            source.close()
        assert events.bounds[-1] == len(events.indices)
