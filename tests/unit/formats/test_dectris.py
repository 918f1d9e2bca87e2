"""Dectris masters: which files belong, what is missing, what is refused, and what a flag becomes."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest

from emflow.synthetic import ExactScan, write_dectris
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.dectris import Dectris
from mpi_kernels.layout import Layout

SCAN = ExactScan((4, 5), (6, 8), "uint16", seed=4)


def frames(path: Path, step: int = 20) -> np.ndarray:
    source = Dectris().open(os.fspath(path))
    out = np.full((20, 6, 8), 77, source.header.dtype)
    for start in range(0, 20, step):
        source.frames(start, min(20, start + step), out[start : start + step])
    source.complete()
    source.close()
    return out


def layout_of(path: Path) -> Layout | None:
    source = Dectris().open(os.fspath(path))
    found = source.layout
    source.close()
    return found


def relink(path: Path, number: int, target: str) -> None:
    with h5py.File(path, "r+") as file:
        name = f"entry/data/data_{number:06d}"
        del file[name]
        file[name] = h5py.ExternalLink(target, "/entry/data/data")


@pytest.mark.parametrize("codec", ["bitshuffle", "lz4", "plain"])
@pytest.mark.parametrize("per_file", [1, 7, 20])
@pytest.mark.parametrize("step", [1, 6, 20])
def test_frames_across_files(tmp_path: Path, codec: str, per_file: int, step: int) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5", codec=codec, per_file=per_file)
    np.testing.assert_array_equal(frames(path, step), SCAN.frames(0, 20))


@pytest.mark.parametrize("codec", ["bitshuffle", "lz4", "plain"])
def test_the_layout_names_the_bytes_of_every_frame(tmp_path: Path, codec: str) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5", codec=codec)
    layout = layout_of(path)
    assert layout is not None
    assert [Path(f).name for f in layout.files] == [f"a_data_{i:06d}.h5" for i in (1, 2, 3)]
    assert layout.file_of is not None
    assert layout.offsets is not None
    assert layout.file_of.tolist() == [0] * 7 + [1] * 7 + [2] * 6
    assert layout.flag == 65535
    assert layout.codec == {"bitshuffle": "bitshuffle-lz4", "lz4": "lz4", "plain": ""}[codec]
    for i in range(20):
        size = layout.payload if layout.sizes is None else int(layout.sizes[i])
        with Path(layout.files[layout.file_of[i]]).open("rb") as file:
            file.seek(int(layout.offsets[i]))
            stored = file.read(size)
        with h5py.File(layout.files[layout.file_of[i]]) as data:
            _, wanted = data["entry/data/data"].id.read_direct_chunk((i % 7, 0, 0))
        assert stored == wanted


def test_flags_are_zeros_and_are_told(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(tmp_path / "a_data_000002.h5", "r+") as file:
        file["entry/data/data"][3, 2, 5] = 65535
        file["entry/data/data"][3, 2, 6] = 65534
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/detectorSpecific/pixel_mask"][1, 2:5] = 1
    wanted = SCAN.frames(0, 20)
    wanted[10, 2, 5], wanted[10, 2, 6] = 0, 65534
    np.testing.assert_array_equal(frames(path), wanted)
    header = Dectris().probe(os.fspath(path))
    assert header.metadata["flag_delivered_as_0"] == 65535
    assert header.metadata["masked_pixels"] == 3
    assert "3 pixels are masked" in header.warnings[0]


def test_the_scan_comes_from_the_sidecar(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    header = Dectris().probe(os.fspath(path))
    assert (header.kind, header.scan_shape, header.warnings) == ("4d", (4, 5), ())
    assert [m.suffix for m in header.members] == [
        "_master.h5",
        "_data_000001.h5",
        "_data_000002.h5",
        "_data_000003.h5",
        ".h5",
    ]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["STEM Metadata"].attrs["Pixel Size"] = [0.25]
    assert [(a.scale, a.unit) for a in Dectris().probe(os.fspath(path)).scan_axes] == [(0.25, "nm")] * 2
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["STEM Metadata"].attrs["NumPixelsX"] = [6]
    header = Dectris().probe(os.fspath(path))
    assert (header.kind, header.scan_shape) == ("stack", (20,))
    assert "does not fit 20 frames" in header.warnings[0]
    (tmp_path / "a.h5").unlink()
    assert Dectris().probe(os.fspath(path)).scan_shape == (20,)


@pytest.mark.parametrize(("gone", "frame"), [(1, 0), (2, 7), (3, 14)])
def test_a_missing_data_file_names_the_first_frame_that_is_not_there(tmp_path: Path, gone: int, frame: int) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    (tmp_path / f"a_data_{gone:06d}.h5").unlink()
    with pytest.raises(Incomplete, match=f"a_data_{gone:06d}") as caught:
        Dectris().open(os.fspath(path))
    assert caught.value.frame == frame


def test_a_short_data_file_names_the_first_frame_that_is_not_there(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(tmp_path / "a_data_000003.h5", "w") as file:
        file.create_dataset("entry/data/data", data=SCAN.frames(14, 18), chunks=(1, 6, 8), **hdf5plugin.Bitshuffle())
    with pytest.raises(Incomplete, match="18 of 20 frames") as caught:
        Dectris().probe(os.fspath(path))
    assert caught.value.frame == 18


def test_a_chunk_that_was_never_written(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(tmp_path / "a_data_000002.h5", "w") as file:
        data = file.create_dataset("entry/data/data", (7, 6, 8), "u2", chunks=(1, 6, 8), **hdf5plugin.Bitshuffle())
        for i in (0, 1, 2, 4, 5, 6):
            data[i] = SCAN.frame(7 + i)
    with pytest.raises(Incomplete, match="6 of 7 chunks") as caught:
        Dectris().probe(os.fspath(path))
    assert caught.value.frame == 10


def test_a_damaged_chunk_names_the_frame_of_the_scan(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    layout = layout_of(path)
    assert layout is not None
    assert layout.offsets is not None
    with (tmp_path / "a_data_000002.h5").open("r+b") as stream:
        stream.seek(int(layout.offsets[9]))
        stream.write(b"\xff" * 12)
    source = Dectris().open(os.fspath(path))
    with pytest.raises(MissingData) as caught:
        source.frames(9, 20, np.empty((11, 6, 8), np.uint16))
    assert caught.value.frame == 9
    source.close()


def test_a_master_links_more_files_than_the_frames_fill(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(path, "r+") as file:
        file["entry/data/data_000004"] = h5py.ExternalLink("a_data_000004.h5", "/entry/data/data")
    np.testing.assert_array_equal(frames(path), SCAN.frames(0, 20))


def test_more_frames_than_announced(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/detectorSpecific/ntrigger"][...] = 19
    with pytest.raises(FormatError, match="hold 20 frames, and it announces 19"):
        Dectris().probe(os.fspath(path))


def test_renamed_files_are_found_by_number(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    for file in sorted(tmp_path.iterdir()):
        file.rename(tmp_path / ("0123456789abcdef" + file.name[1:]))
    np.testing.assert_array_equal(frames(tmp_path / "0123456789abcdef_master.h5"), SCAN.frames(0, 20))
    assert not path.exists()


def test_a_master_renamed_alone_finds_its_files_by_their_links(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    np.testing.assert_array_equal(frames(path.rename(tmp_path / "b_master.h5")), SCAN.frames(0, 20))


def test_names_and_links_that_disagree_are_not_guessed_at(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    other = ExactScan((4, 5), (6, 8), "uint16", seed=9)
    write_dectris(other, tmp_path / "b_master.h5")
    relink(path, 2, "b_data_000002.h5")
    with pytest.raises(FormatError, match="different files for part 2"):
        Dectris().probe(os.fspath(path))


@pytest.mark.parametrize(
    "target", ["../a_data_000002.h5", "/etc/passwd", "sub/a_data_000002.h5", "..", ".", "..\\a_data_000002.h5"]
)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    relink(path, 2, target)
    with pytest.raises(FormatError, match="leads out of its folder") as caught:
        Dectris().open(os.fspath(path))
    assert caught.value.next_step


@pytest.mark.parametrize("name", ["a_data_000002.h5", "a.h5"])
def test_a_symbolic_link_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "share"
    folder.mkdir()
    path = write_dectris(SCAN, folder / "a_master.h5")
    (folder / name).rename(tmp_path / "elsewhere.h5")
    (folder / name).symlink_to(tmp_path / "elsewhere.h5")
    with pytest.raises(FormatError, match="links are not followed"):
        Dectris().open(os.fspath(path))


def test_a_link_inside_a_data_file_is_refused(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(tmp_path / "a_data_000002.h5", "r+") as file:
        file.move("entry/data/data", "entry/data/hidden")
        file["entry/data/data"] = h5py.SoftLink("/entry/data/hidden")
    with pytest.raises(FormatError, match="no dataset of frames"):
        Dectris().probe(os.fspath(path))


def test_files_of_different_acquisitions(tmp_path: Path) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(tmp_path / "a_data_000002.h5", "w") as file:
        file["entry/data/data"] = np.zeros((7, 6, 9), np.uint16)
    with pytest.raises(FormatError, match="different acquisitions"):
        Dectris().probe(os.fspath(path))


def test_what_is_no_master(tmp_path: Path) -> None:
    for name in ("a_master.h5", "a.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = SCAN.frames(0, 20)
        with pytest.raises(NotThisFormat):
            Dectris().probe(os.fspath(tmp_path / name))


@pytest.mark.parametrize("value", [-1, 0, 1 << 50])
def test_numbers_of_frames_that_cannot_be(tmp_path: Path, value: int) -> None:
    path = write_dectris(SCAN, tmp_path / "a_master.h5")
    with h5py.File(path, "r+") as file:
        group = file["entry/instrument/detector/detectorSpecific"]
        del group["ntrigger"]
        group["ntrigger"] = np.int64(value)
    with pytest.raises(KernelError):
        Dectris().probe(os.fspath(path))
