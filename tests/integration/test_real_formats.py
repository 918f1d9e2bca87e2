"""Real microscope files, frame by frame, against the independent reference that comes with them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from emflow import registry
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.choose import choose
from mpi_kernels.protocols import Format, Moments, Sum
from mpi_kernels.ranks import Ranks
from mpi_kernels.sparse import SparseFused, SparseSource

pytestmark = pytest.mark.needs_data

# id in reference.json -> (format, what the file itself says of the scan)
SETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "mib/Single_9_Frame_CounterDepth_12_Rows_256": ("merlin", (9,)),
    "mib/Single_9_Frame_CounterDepth_6_Rows_256": ("merlin", (9,)),
    "mib/Single_9_Frame_CounterDepth_1_Rows_256": ("merlin", (9,)),
    "mib/Quad_9_Frame_CounterDepth_6_Rows_256": ("merlin", (9,)),
    "mib/Quad_9_Frame_CounterDepth_1_Rows_256": ("merlin", (9,)),
    "mib/Single_1_Frame_CounterDepth_24_Rows_256": ("merlin", (1,)),
    "mib/001_4x2_6bit": ("merlin", (8,)),  # its 4 x 2 is nowhere in the file: the recipe says it
    "mib/002_4x2_6bit_roi128": ("merlin", (8,)),
    "mib/003_merlin_test_roi_sig256x64_nav4x2_hot_pixel_52x_39y": ("merlin", (2, 4)),
    "mib_raw/Single_9_1bit": ("merlin", (9,)),
    "mib_raw/epsic_quad_6bit": ("merlin", (1,)),
    "mib_raw/epsic_quad_12bit": ("merlin", (1,)),
    "mib/epsic_quad_1bit": ("merlin", (1,)),
    "mib/epsic_quad_6bit": ("merlin", (1,)),
    "mib/epsic_quad_24bit": ("merlin", (1,)),
    "empad/scan_x4_y4": ("empad", (4, 4)),
    "transcoded/empad_raw": ("empad", (4, 4)),
    "npy/merlin_expected": ("npy", ()),
    "transcoded/nion_npy": ("npy", (3, 7)),
    "transcoded/npy_forder": ("npy", (3, 7)),
    "transcoded/raw_sidecar": ("raw", (2, 4)),
    "transcoded/nion_ndata1": ("ndata", (3, 7)),
    "raw/nordif_Pattern.dat": ("nordif", (3, 3)),
    "blo/test1": ("blo", (3, 2)),
    "transcoded/rsciio_blo": ("blo", (3, 3)),
    "tvips/2233_000": ("tvips", (4,)),  # its 2 x 2 is the recipe's to say
    "tvips/2345_000": ("tvips", (6,)),
    "de_mrc/20241021_00405_movie": ("mrc", (4, 8)),
    "de_mrc/ROI_Random_Scan_movie": ("mrc", (348,)),
    "mrc/temp": ("mrc", (3,)),
    "transcoded/mrcs": ("mrc", (5,)),
    "ser/128x128x5-diffraction_preview_1": ("ser", (5,)),
    "ser/64x64x5_TEM_preview_1": ("ser", (5,)),
    "dm/3D_int16.dm3": ("dm", (66,)),
    "dm/stackbuilder.dm3": ("dm", (3,)),
    "tiff/DM_stack": ("tiff", (2,)),
    "transcoded/bigtiff": ("tiff", (5,)),
    "transcoded/tiff_series": ("tiff", (8,)),
    "transcoded/zarr_v2": ("zarr", (2, 4)),
    "velox/tem_stack": ("velox", (2,)),
    "emd_prismatic/Si100_4D": ("hdf5", (11, 11)),
    "emd_py4dstem/2x3x4x5": ("hdf5", (2, 3)),
    "fpd_hdf5/fpd_file_test": ("hdf5", (2, 2)),
    "h5ebsd/Ni_scan1": ("hdf5", (3, 3)),
    "nexus_ptycho/raster": ("hdf5", (10, 10)),
    "transcoded/py4dstem_emd10": ("hdf5", (3, 7)),
    "transcoded/hspy": ("hdf5", (3, 7)),
    "transcoded/nion_h5": ("hdf5", (3, 7)),
    "transcoded/h5_contig": ("hdf5", (2, 4)),
    "app5/topspin_from_export": ("topspin", (3, 7)),
    "app5/topspin_from_file": ("topspin", (2, 5)),
    "app5/topspin_test_A": ("topspin", (2, 5)),
    "app5/topspin_test_C": ("topspin", (3, 5)),
    "arina/test_00": ("dectris", (16,)),
    "transcoded/stempy_counted": ("stempy", (3, 3)),
}


FOLDERS = ("transcoded/tiff_series", "transcoded/zarr_v2")
"""Acquisitions that are a folder: read where they lie, and not staged."""

FILES = [name for name in SETS if name not in FOLDERS]


@pytest.fixture(scope="module")
def formats() -> dict[str, Format]:
    return {name: registry.load("formats", name)() for name in registry.names("formats")}


def read(known: Format, path: Path, step: int = 0) -> tuple[Header, np.ndarray]:
    source = known.open(os.fspath(path))
    header = source.header
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    step = step or header.frames
    for start in range(0, header.frames, step):
        stop = min(start + step, header.frames)
        source.frames(start, stop, out[start:stop])
    source.complete()
    source.close()
    return header, out


def digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.astype(frames.dtype.newbyteorder("<")).tobytes()).hexdigest()


@pytest.mark.parametrize("name", SETS)
def test_frames_equal_the_reference(
    name: str, reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format]
) -> None:
    truth = reference[name]
    path = real_data / truth["files"][0]
    chosen, header = choose(os.fspath(path), formats)
    assert (chosen, header.scan_shape) == SETS[name]
    assert list(header.det_shape) == truth["det_shape"]
    assert header.frames == truth["n_frames"]
    assert np.dtype(header.dtype) == np.dtype(truth["dtype"])
    if name not in FOLDERS:
        assert {Path(m.path).name for m in header.members} >= {Path(f).name for f in truth["files"]}
    for step in (0, 1, 3):
        assert digest(read(formats[chosen], path, step)[1]) == truth["sha256_frames_C_LE"]


@pytest.mark.parametrize("name", FILES)
def test_the_staged_copy_reads_the_same(
    name: str, reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format], tmp_path: Path
) -> None:
    truth = reference[name]
    header = formats[SETS[name][0]].probe(os.fspath(real_data / truth["files"][0]))
    for member in header.members:
        shutil.copyfile(member.path, tmp_path / f"00000000000000ff{member.suffix}")
    staged = tmp_path / f"00000000000000ff{header.members[0].suffix}"
    chosen, again = choose(os.fspath(staged), formats)
    assert (chosen, again.scan_shape) == SETS[name]
    assert (again.scan_axes, again.det_axes, again.metadata) == (header.scan_axes, header.det_axes, header.metadata)
    assert digest(read(formats[chosen], staged)[1]) == truth["sha256_frames_C_LE"]


@pytest.mark.parametrize("name", FILES)
def test_cut_off_anywhere_it_is_never_called_whole(
    name: str, reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format], tmp_path: Path
) -> None:
    truth = reference[name]
    known = formats[SETS[name][0]]
    members = known.probe(os.fspath(real_data / truth["files"][0])).members
    for member in members:
        shutil.copyfile(member.path, tmp_path / f"cut{member.suffix}")
    path = tmp_path / f"cut{members[0].suffix}"
    held = next((m.suffix for m in members if m.suffix == "_data_000001.h5"), members[0].suffix)
    size = (tmp_path / f"cut{held}").stat().st_size
    for length in (size - 1, size * 9 // 10, size // 2, size // 3, 1000, 40, 1):
        os.truncate(tmp_path / f"cut{held}", length)
        try:
            header, frames = read(known, path)
        except KernelError:
            continue
        whole = read(known, real_data / truth["files"][0])[1]
        assert header.rule == "stability"
        np.testing.assert_array_equal(frames, whole[: header.frames])


def test_a_master_that_announces_more_frames_than_there_are(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format], tmp_path: Path
) -> None:
    """The transcoded set has another acquisition's master, with 16 triggers; with 9 it is whole."""
    truth = reference["transcoded/arina_layout"]
    with pytest.raises(Incomplete, match="9 of 16 frames") as caught:
        choose(os.fspath(real_data / truth["files"][0]), formats)
    assert caught.value.frame == 9
    for file in truth["files"]:
        shutil.copyfile(real_data / file, tmp_path / Path(file).name)
    path = tmp_path / Path(truth["files"][0]).name
    path.chmod(0o600)
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/detectorSpecific/ntrigger"][...] = 9
    assert choose(os.fspath(path), formats)[0] == "dectris"
    for step in (0, 1, 4):
        header, frames = read(formats["dectris"], path, step)
        assert digest(frames) == truth["sha256_frames_C_LE"]
    assert {Path(m.path).name for m in header.members} == {Path(f).name for f in truth["files"]}


def test_events_of_real_counted_data_are_its_frames(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format]
) -> None:
    truth = reference["transcoded/stempy_counted"]
    source = formats["stempy"].open(os.fspath(real_data / truth["files"][0]))
    assert isinstance(source, SparseSource)
    events = source.events(0, 9)
    assert np.diff(events.bounds).tolist() == truth["per_frame"]["total"]
    fused = SparseFused([Sum(), Moments()], source.header, 9)
    fused.add(events, 0)
    merged = fused.merge(Ranks())
    assert merged is not None
    total, moments = (*merged.values(), *fused.rows(9).values())
    assert (
        int((total.reshape(-1).astype(object) * np.arange(1, total.size + 1)).sum()) == truth["sum_frame"]["weighted"]
    )
    assert (moments[:, 1] / moments[:, 0]).tolist() == pytest.approx(truth["per_frame"]["com_y"], rel=1e-12)
    source.close()


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("transcoded/h5_contig", ""),
        ("nexus_ptycho/raster", ""),
        ("h5ebsd/Ni_scan1", ""),
        ("app5/topspin_test_C", ""),
        ("arina/test_00", "bitshuffle-lz4"),
    ],
)
def test_layouts_of_real_files(
    name: str, codec: str, reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format]
) -> None:
    truth = reference[name]
    source = formats[SETS[name][0]].open(os.fspath(real_data / truth["files"][0]))
    assert source.layout is not None
    assert source.layout.codec == codec
    source.close()


def test_the_scan_that_swift_wrote(real_data: Path, formats: dict[str, Format]) -> None:
    path = real_data / "nion_swift" / "swift_cts_32x32x64x64.h5"
    chosen, header = choose(os.fspath(path), formats)
    assert (chosen, header.kind, header.scan_shape, header.det_shape) == ("hdf5", "4d", (32, 32), (64, 64))
    assert header.rule == "stability"
    assert (header.scan_axes[0].unit, header.scan_axes[0].scale, header.scan_axes[0].offset) == ("nm", 1.0, -16.0)
    assert header.det_axes[1].unit == "rad"
    assert header.metadata["high_tension_v"] == 100000.0
    assert header.warnings == ()
    with h5py.File(path) as file:
        np.testing.assert_array_equal(read(formats["hdf5"], path)[1], file["data"][...].reshape(-1, 64, 64))


def test_calibrations_of_real_files(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format]
) -> None:
    def axes(name: str) -> list[tuple[float, str]]:
        header = formats[SETS[name][0]].probe(os.fspath(real_data / reference[name]["files"][0]))
        return [(round(a.scale, 6), a.unit) for a in header.scan_axes + header.det_axes]

    assert axes("transcoded/nion_npy") == [(5.0, "nm")] * 2 + [(1.0, "mrad")] * 2
    assert axes("transcoded/nion_h5") == [(5.0, "nm")] * 2 + [(1.0, "mrad")] * 2
    assert axes("transcoded/hspy") == [(5.0, "nm")] * 2 + [(0.02, "1/Å")] * 2
    assert axes("transcoded/py4dstem_emd10") == [(5.0, "nm")] * 2 + [(0.02, "1/Å")] * 2
    assert axes("emd_prismatic/Si100_4D") == [(0.5, "nm")] * 2 + [(0.184162, "1/nm")] * 2
    assert axes("empad/scan_x4_y4") == [(0.000429, "rad")] * 2


def test_the_hot_pixel_is_where_the_file_name_says(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format]
) -> None:
    """Orientation: file order, no flip."""
    truth = reference["mib/003_merlin_test_roi_sig256x64_nav4x2_hot_pixel_52x_39y"]
    _, frames = read(formats["merlin"], real_data / truth["files"][0])
    assert np.unravel_index(frames.sum(axis=0, dtype=np.int64).argmax(), (64, 256)) == (39, 52)


def test_five_of_eight_frames(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format], tmp_path: Path
) -> None:
    """What rosettasciio reads as four frames and LiberTEM as three of zeros."""
    truth = reference["mib/001_4x2_6bit"]
    for file in truth["files"]:
        shutil.copyfile(real_data / file, tmp_path / f"part{Path(file).suffix}")
    path = tmp_path / "part.mib"
    os.truncate(path, 5 * (384 + 256 * 256) + 100)
    with pytest.raises(Incomplete, match="5 of 8 frames") as caught:
        choose(os.fspath(path), formats)
    assert caught.value.frame == 5


def test_ten_of_sixteen_empad_frames(real_data: Path, formats: dict[str, Format], tmp_path: Path) -> None:
    shutil.copyfile(real_data / "empad" / "map4x4.xml", tmp_path / "map4x4.xml")
    path = tmp_path / "scan_x4_y4.raw"
    path.write_bytes((real_data / "empad" / "scan_x4_y4.raw").read_bytes()[: 10 * 66560])
    with pytest.raises(Incomplete, match="10 of 16 frames"):
        choose(os.fspath(path), formats)


def test_a_blank_frame_header_in_a_real_file_is_missing_data(
    reference: dict[str, dict[str, Any]], real_data: Path, formats: dict[str, Format], tmp_path: Path
) -> None:
    truth = reference["mib/002_4x2_6bit_roi128"]
    for file in truth["files"]:
        shutil.copyfile(real_data / file, tmp_path / f"hole{Path(file).suffix}")
    path = tmp_path / "hole.mib"
    record = 384 + 128 * 256
    data = bytearray(path.read_bytes())
    data[6 * record : 7 * record] = bytes(record)
    path.write_bytes(data)
    source = formats["merlin"].open(os.fspath(path))
    out = np.empty((8, 128, 256), np.uint8)
    source.frames(0, 6, out[:6])
    with pytest.raises(MissingData) as caught:
        source.frames(0, 8, out)
    assert caught.value.frame == 6
    source.close()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("transcoded", "folder"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    file: str, words: str, real_data: Path, formats: dict[str, Format]
) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        choose(os.fspath(real_data / file), formats)
    assert not isinstance(caught.value, NotThisFormat)
    assert caught.value.next_step


@pytest.mark.parametrize(
    "file", ["MANIFEST.json", "de_mrc/ROI_Random_Scan_info.txt", "merlin_mib_epsic/test_6bit_RAW_1frame.hdr"]
)
def test_what_nobody_knows_lists_what_is_known(file: str, real_data: Path, formats: dict[str, Format]) -> None:
    with pytest.raises(NotThisFormat, match=r"merlin \(\.mib\)"):
        choose(os.fspath(real_data / file), formats)


def test_raw_data_without_a_sidecar_wait(real_data: Path, formats: dict[str, Format], tmp_path: Path) -> None:
    alone = tmp_path / "Pattern.dat"
    shutil.copyfile(real_data / "nordif_raw" / "Pattern.dat", alone)
    with pytest.raises(Incomplete, match="sidecar"):
        choose(os.fspath(alone), formats)


def test_a_chunk_file_that_is_not_there_is_named(real_data: Path, formats: dict[str, Format], tmp_path: Path) -> None:
    """What zarr reads as zeros: a chunk file that was not copied."""
    name = "zarr_v2_2x4x256x256.zarr"
    shutil.copytree(real_data / "transcoded" / name, tmp_path / name)
    (tmp_path / name / "1.0.0.0").unlink()
    with pytest.raises(Incomplete, match="chunk") as caught:
        choose(os.fspath(tmp_path / name), formats)
    assert caught.value.frame == 4


def test_ser_is_turned_as_every_reader_turns_it(real_data: Path, formats: dict[str, Format]) -> None:
    path = real_data / "tia_ser" / "64x64x5_TEM_preview_1.ser"
    header, frames = read(formats["ser"], path)
    first = np.frombuffer(path.read_bytes(), "<f4", 64 * 64, 108 + 50).reshape(64, 64)
    np.testing.assert_array_equal(frames[0], first[::-1])
    assert "turned" in str(header.metadata["orientation"])


def test_a_data_file_of_a_master_is_read_alone(real_data: Path, formats: dict[str, Format]) -> None:
    """Bitshuffle-LZ4 chunks, through hdf5plugin."""
    path = real_data / "arina_nexus_h5" / "test_00_data_000001.h5"
    header, frames = read(formats["hdf5"], path)
    assert (header.kind, header.scan_shape, header.det_shape, header.dtype) == ("stack", (16,), (192, 192), "uint32")
    assert not frames.any()  # the reference: all zeros
