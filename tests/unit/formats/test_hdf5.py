"""HDF5: what must never be read as zeros, what must never be followed, and how layouts are told apart."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.synthetic import ExactScan, Pace, write_emd, write_hspy, write_nion_h5, write_nxdata
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, MissingData, NotThisFormat
from mpi_kernels.formats import hdf5_source
from mpi_kernels.formats.hdf5 import Hdf5
from mpi_kernels.formats.hdf5_source import ChunkedSource, chunk_frames

SCAN = ExactScan((4, 6), (8, 10), "uint16", seed=4)


def read(path: Path, bounds: list[int] | None = None) -> tuple[Header, np.ndarray]:
    source = Hdf5().open(os.fspath(path))
    header = source.header
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    bounds = bounds or [0, header.frames]
    for a, b in itertools.pairwise(bounds):
        source.frames(a, b, out[a:b])
    source.complete()
    source.close()
    return header, out


def test_importing_the_package_does_not_import_h5py() -> None:
    code = "import sys, mpi_kernels.formats.hdf5, emflow.synthetic; sys.exit('h5py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    dtype=st.sampled_from(["|b1", "|i1", "|u1", "<u2", ">u2", ">i4", "<i8", ">u8", "<f2", "<f4", ">f4", ">f8"]),
    shape=st.sampled_from([(5, 4), (1, 5, 4), (6, 3, 4), (1, 1, 3, 4), (3, 4, 5, 2), (2, 1, 1, 3, 4), (2, 3, 1, 3, 4)]),
    chunk=st.one_of(st.none(), st.tuples(*[st.integers(1, 4)] * 5)),
    bounds=st.lists(st.integers(0, 12), max_size=3),
    compression=st.sampled_from([None, "gzip", "lzf"]),
)
def test_any_chunks_and_any_split(
    tmp_path: Path,
    dtype: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...] | None,
    bounds: list[int],
    compression: str | None,
) -> None:
    array = np.random.default_rng(1).integers(0, 2 if dtype == "|b1" else 99, shape).astype(dtype)
    path = tmp_path / "any.h5"
    path.unlink(missing_ok=True)
    chunks = None if chunk is None else tuple(min(c, n) for c, n in zip(chunk, shape, strict=False))
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=array, chunks=chunks, compression=compression if chunks else None)
    frames = array.reshape(-1, *shape[-2:])
    cuts = sorted({0, len(frames), *(min(b, len(frames)) for b in bounds)})
    header, out = read(path, cuts)
    assert out.dtype.isnative
    assert header.frames == len(frames)
    assert len(header.scan_shape) <= 2
    np.testing.assert_array_equal(out, frames)


def test_contiguous_arrays_are_read_without_hdf5(tmp_path: Path) -> None:
    for order in "<>":
        path = write_nion_h5(SCAN, tmp_path / f"{ord(order)}.h5", byte_order=order)
        source = Hdf5().open(os.fspath(path))
        assert not isinstance(source, ChunkedSource)
        source.close()
        np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 24))


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_a_user_block_moves_the_array(tmp_path: Path, block: int) -> None:
    path = tmp_path / "user.h5"
    with h5py.File(path, "w", userblock_size=block) as file:
        file["data"] = SCAN.frames(0, 24).astype(">u2")
    np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 24))


@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
def test_every_superblock_version(tmp_path: Path, libver: str) -> None:
    path = tmp_path / "version.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file["data"] = SCAN.frames(0, 24)
    np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 24))
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(Incomplete, match=f"{size - 1} of {size} bytes"):
        Hdf5().probe(os.fspath(path))


def test_a_compact_array(tmp_path: Path) -> None:
    path = tmp_path / "compact.h5"
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((2, 3, 4))
        dataset = h5py.h5d.create(file.id, b"small", h5py.h5t.STD_U16BE, space, plist)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(24, dtype=np.uint16).reshape(2, 3, 4))
    np.testing.assert_array_equal(read(path)[1], np.arange(24).reshape(2, 3, 4))


def test_a_type_that_numpy_lacks_is_converted_by_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "odd.h5"
    with h5py.File(path, "w") as file:
        odd = h5py.h5t.STD_U16LE.copy()
        odd.set_precision(12)
        odd.set_offset(4)
        space = h5py.h5s.create_simple((2, 3, 4))
        dataset = h5py.h5d.create(file.id, b"data", odd, space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(24, dtype=np.uint16).reshape(2, 3, 4))
    assert path.read_bytes().count(np.arange(24, dtype="<u2").tobytes()) == 0  # stored shifted by four bits
    np.testing.assert_array_equal(read(path)[1], np.arange(24).reshape(2, 3, 4))


# --- never a silent zero ----------------------------------------------------------------------------------------------


def holes(path: Path, missing: set[int], chunk: tuple[int, ...] = (1, 1, 8, 10)) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (4, 6, 8, 10), "u2", chunks=chunk)
        for i in range(24):
            if i not in missing:
                data[i // 6, i % 6] = SCAN.frame(i)
    return path


@pytest.mark.parametrize("missing", [{0}, {23}, {7, 9}, set(range(12, 24))])
def test_a_missing_chunk_names_the_frame(tmp_path: Path, missing: set[int]) -> None:
    path = holes(tmp_path / "holes.h5", missing)
    with pytest.raises(Incomplete, match=f"{24 - len(missing)} of 24 chunks") as caught:
        Hdf5().open(os.fspath(path))
    assert caught.value.frame == min(missing)


def test_half_a_frame_missing_counts(tmp_path: Path) -> None:
    path = tmp_path / "half.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (4, 6, 8, 10), "u2", chunks=(1, 1, 4, 10))
        for i in range(24):
            data[i // 6, i % 6] = SCAN.frame(i)
        del file["data"]
        data = file.create_dataset("data", (4, 6, 8, 10), "u2", chunks=(1, 1, 4, 10))
        for i in range(24):
            data[i // 6, i % 6, : 4 if i == 11 else 8] = SCAN.frame(i)[: 4 if i == 11 else 8]
    with pytest.raises(Incomplete, match="47 of 48") as caught:
        Hdf5().probe(os.fspath(path))
    assert caught.value.frame == 11


def test_a_source_on_a_file_with_holes_reads_the_rest(tmp_path: Path) -> None:
    """What `probe` refuses, a source that is opened anyway (growing data) still never reads as zeros."""
    whole = Hdf5().probe(os.fspath(holes(tmp_path / "whole.h5", set())))
    source = ChunkedSource(whole, os.fspath(holes(tmp_path / "holes.h5", {7, 9})), "/data")
    out = np.zeros((24, 8, 10), np.uint16)
    source.frames(0, 7, out[:7])
    source.frames(10, 24, out[10:])
    np.testing.assert_array_equal(np.delete(out, [7, 8, 9], 0), np.delete(SCAN.frames(0, 24), [7, 8, 9], 0))
    for call in (source.complete, lambda: source.frames(5, 12, out[5:12])):
        with pytest.raises(MissingData) as caught:
            call()
        assert caught.value.frame == 7
    with pytest.raises(MissingData) as caught:
        source.frames(8, 12, out[8:12])
    assert caught.value.frame == 9
    source.close()


@pytest.mark.parametrize("chunks", [None, (1, 1, 8, 10)])
def test_an_array_that_was_never_written(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    path = tmp_path / "never.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (4, 6, 8, 10), "u2", chunks=chunks)
    with pytest.raises(Incomplete) as caught:
        Hdf5().probe(os.fspath(path))
    assert caught.value.frame == 0


def test_an_array_that_has_no_rows_yet(tmp_path: Path) -> None:
    path = tmp_path / "grows.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (0, 8, 10), "u2", maxshape=(None, 8, 10))
    with pytest.raises(Incomplete, match="nothing is in it yet"):
        Hdf5().probe(os.fspath(path))


def test_a_damaged_chunk_names_the_frame(tmp_path: Path) -> None:
    path = write_nxdata(SCAN, tmp_path / "gzip.nxs", chunk=(1, 1, 8, 10), compression="gzip")
    with h5py.File(path) as file:
        info = file["entry/data/data"].id.get_chunk_info_by_coord((1, 2, 0, 0))
    with path.open("r+b") as stream:
        stream.seek(info.byte_offset)
        stream.write(b"\xff" * info.size)
    source = Hdf5().open(os.fspath(path))
    out = np.zeros((24, 8, 10), np.uint16)
    source.frames(0, 8, out[:8])
    np.testing.assert_array_equal(out[:8], SCAN.frames(0, 8))
    with pytest.raises(MissingData) as caught:
        source.frames(8, 9, out[:1])
    assert caught.value.frame == 8
    source.close()


# --- writers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Another process that holds a file open for writing until the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(options: str) -> Path:
        path = tmp_path / "held.h5"
        code = f"""
            import h5py, numpy as np, sys
            with h5py.File({os.fspath(path)!r}, "w", {options}) as file:
                file.create_dataset("data", data=np.ones((2, 3, 4, 5), "u2"), chunks=(1, 1, 4, 5))
                if "latest" in {options!r}: file.swmr_mode = True
                file.flush()
                print("ready", flush=True)
                sys.stdin.read()
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return path

    yield start
    for process in started:
        process.communicate("", timeout=10)


@pytest.mark.parametrize("options", ["locking=True", "libver='latest', locking=False"])
def test_a_file_that_a_writer_holds_is_incomplete(writer: Callable[[str], Path], options: str) -> None:
    """By its lock, and where locks do not reach (another host) by the flag in a version 3 superblock."""
    path = writer(options)
    with pytest.raises(Incomplete, match="writer") as caught:
        Hdf5().probe(os.fspath(path))
    assert caught.value.next_step


def test_probing_does_not_keep_a_writer_out(tmp_path: Path) -> None:
    path = write_nion_h5(SCAN, tmp_path / "a.h5")
    Hdf5().probe(os.fspath(path))
    with h5py.File(path, "r+", locking=True) as file:
        file["more"] = 1


def test_swift_fills_a_file_of_full_size(tmp_path: Path) -> None:
    """Its size is no signal: the rule stays stability, and the lock says that it is open."""
    sizes, said = [], []

    def step(frames: int) -> None:
        sizes.append((tmp_path / "a.h5").stat().st_size)
        try:
            said.append(Hdf5().probe(os.fspath(tmp_path / "a.h5")).rule)
        except Incomplete as error:
            said.append(error.code)

    write_nion_h5(SCAN, tmp_path / "a.h5", pace=Pace(rows_per_step=1, step=step))
    assert sizes[1] == sizes[-1]
    assert set(said) <= {"incomplete", "stability"}
    assert Hdf5().probe(os.fspath(tmp_path / "a.h5")).rule == "stability"


def test_rows_that_swift_calls_invalid_are_a_warning(tmp_path: Path) -> None:
    path = write_nion_h5(SCAN, tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        properties = json.loads(file["data"].attrs["properties"])
        properties["metadata"]["scan"] = {"valid_rows": 3}
        file["data"].attrs["properties"] = json.dumps(properties)
    assert "3 of 4 scan rows" in Hdf5().probe(os.fspath(path)).warnings[0]


# --- never followed ---------------------------------------------------------------------------------------------------


def test_links_and_storage_outside_the_file_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["data"] = np.ones((2, 3, 4), "u2")
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    layout = h5py.VirtualLayout((2, 3, 4), "u2")
    layout[:] = h5py.VirtualSource(secret, "data", (2, 3, 4))
    for name, make, words in (
        ("external", lambda f: f.__setitem__("data", h5py.ExternalLink(os.fspath(secret), "/data")), "links"),
        ("soft", lambda f: f.__setitem__("data", h5py.SoftLink("/nowhere")), "links"),
        ("virtual", lambda f: f.create_virtual_dataset("data", layout), "virtual"),
        (
            "storage",
            lambda f: f.create_dataset("data", (2, 3, 4), "u2", external=[(os.fspath(tmp_path / "secret.bin"), 0, 48)]),
            "outside",
        ),
    ):
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(FormatError, match=words) as caught:
            Hdf5().open(os.fspath(path))
        assert caught.value.next_step


def test_a_group_that_contains_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "cycle.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("a")
        group["again"] = group
        group["up"] = file["/"]
        group["data"] = SCAN.frames(0, 24)
    np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 24))


def test_more_objects_than_any_real_file_has(tmp_path: Path) -> None:
    path = tmp_path / "many.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(20_001):
            file[f"l{i}"] = h5py.SoftLink("/x")
    with pytest.raises(FormatError, match="more than"):
        Hdf5().probe(os.fspath(path))


@pytest.mark.parametrize(
    ("shape", "chunks", "words"),
    [
        ((4, 1 << 15, 1 << 15), (1, 1 << 15, 1 << 15), "chunks have"),
        ((4, 1 << 16, 1 << 16), (1, 64, 64), "can't be"),
        ((1 << 30, 1 << 30, 8, 8), (1, 1, 8, 8), "can't be"),
    ],
)
def test_sizes_that_would_fill_the_memory(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], words: str
) -> None:
    path = tmp_path / "huge.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", shape, "u2", chunks=chunks)
    with pytest.raises(FormatError, match=words):
        Hdf5().probe(os.fspath(path))


# --- layouts ----------------------------------------------------------------------------------------------------------


def make(path: Path, fill: Callable[[h5py.File], Any]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def _two(file: h5py.File) -> None:
    file["a"], file["b"] = np.zeros((2, 3, 4)), np.zeros((3, 3, 4))


def _spectrum(file: h5py.File) -> None:
    file.attrs["file_format"] = "HyperSpy"
    group = file.create_group("Experiments/x")
    group["data"] = np.zeros((2, 3, 4))
    for i, navigate in enumerate((True, True, False)):
        group.create_group(f"axis-{i}").attrs["navigate"] = navigate


def _swift(properties: str) -> Callable[[h5py.File], None]:
    def fill(file: h5py.File) -> None:
        file["data"] = np.zeros((2, 3, 4))
        file["data"].attrs["properties"] = properties

    return fill


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (_two, "several datasets"),
        (_spectrum, "not the last two axes"),
        (_swift("{"), "not JSON"),
        (_swift("[]"), "no JSON object"),
        (_swift('{"datum_dimension_count": 1}'), "frames have 2"),
        (lambda f: None, "no dataset"),
        (lambda f: f.__setitem__("x", np.zeros(5)), "no dataset"),
        (lambda f: f.__setitem__("x", np.zeros((3, 4), complex)), "no dataset"),
        (lambda f: f.__setitem__("x", np.full((3, 4), "text", h5py.string_dtype())), "no dataset"),
        (lambda f: f.__setitem__("x", np.zeros((2, 3, 4, 5, 6))), "no image"),
    ],
)
def test_contents_that_are_refused(tmp_path: Path, fill: Callable[[h5py.File], Any], words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        Hdf5().probe(os.fspath(make(tmp_path / "a.h5", fill)))
    assert caught.value.next_step


def test_calibrations_of_our_own_files(tmp_path: Path) -> None:
    for path in (
        write_nion_h5(SCAN, tmp_path / "a.h5"),
        write_emd(SCAN, tmp_path / "b.h5"),
        write_nxdata(SCAN, tmp_path / "c.h5"),
    ):
        header = Hdf5().probe(os.fspath(path))
        assert [(a.name, a.scale, a.offset, a.unit) for a in header.scan_axes + header.det_axes] == [
            ("scan_y", 0.5, 0.0, "nm"),
            ("scan_x", 0.5, 0.0, "nm"),
            ("det_y", 1.0, -4.0, "mrad"),
            ("det_x", 1.0, -5.0, "mrad"),
        ]


def test_align_is_where_no_chunk_is_cut() -> None:
    lead = [0, 1]
    assert chunk_frames((6, 8, 4, 4), (1, 1, 4, 4), lead) == 1
    assert chunk_frames((6, 8, 4, 4), (1, 4, 4, 4), lead) == 4
    assert chunk_frames((6, 8, 4, 4), (1, 3, 4, 4), lead) == 8
    assert chunk_frames((6, 8, 4, 4), (2, 4, 4, 4), lead) == 16
    assert chunk_frames((9, 4, 4), (9, 4, 4), [0]) == 9
    assert chunk_frames((4, 4), (4, 4), []) == 1


def test_chunks_shared_by_blocks_are_read_once(tmp_path: Path) -> None:
    path = write_nxdata(SCAN, tmp_path / "a.nxs", chunk=(2, 4, 8, 10), compression="gzip")
    source = Hdf5().open(os.fspath(path))
    assert source.align == 12
    assert hdf5_source.CACHE_BYTES >= 12 * 8 * 10 * 2
    source.close()


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    """In a process of its own: HDF5 is C, and a crash on a damaged file must fail this test and not end all others."""
    path = write_nxdata(SCAN, tmp_path / "a.nxs", chunk=(2, 3, 8, 10), compression="gzip")
    code = f"""
        import contextlib, pathlib
        import numpy as np
        from mpi_kernels.errors import KernelError
        from mpi_kernels.formats.hdf5 import Hdf5
        path = pathlib.Path({os.fspath(path)!r})
        whole, refused = path.read_bytes(), 0
        for seed in range(150):
            data, generator = bytearray(whole), np.random.default_rng(seed)
            for _ in range(seed % 8 + 1):
                data[int(generator.integers(0, min(len(data), 6000)))] = int(generator.integers(0, 256))
            path.write_bytes(data)
            try:
                source = Hdf5().open(str(path))
                with contextlib.closing(source):
                    header = source.header
                    out = np.empty((header.frames, *header.det_shape), header.dtype)
                    source.frames(0, header.frames, out)
            except KernelError:
                refused += 1
        print(refused)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_wrong_magic(tmp_path: Path) -> None:
    path = write_nion_h5(SCAN, tmp_path / "a.h5")
    data = path.read_bytes()
    path.write_bytes(b"\x89HDX" + data[4:])
    with pytest.raises(NotThisFormat):
        Hdf5().probe(os.fspath(path))


@pytest.mark.timeout(20)  # the limit of the service's probe
def test_a_large_scan_without_its_last_row_is_told_in_one_pass(tmp_path: Path) -> None:
    """Looking up each chunk by itself took minutes for this file, and the service gave it up as unreadable."""
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (256, 256, 4, 4), "u1", chunks=(1, 1, 4, 4))
        pixels = bytes(16)
        for y in range(255):
            for x in range(256):
                data.id.write_direct_chunk((y, x, 0, 0), pixels)
    with pytest.raises(Incomplete) as caught:
        Hdf5().probe(str(path))
    assert caught.value.frame == 255 * 256


def test_a_hyperspy_file_with_its_signal_first_is_not_turned_silently(tmp_path: Path) -> None:
    path = write_hspy(ExactScan((6, 8), (3, 5), "uint8"), tmp_path / "scan.hspy")
    with h5py.File(path, "r+") as file:
        axes: list[h5py.Group] = []
        file.visititems(lambda name, item: axes.append(item) if "navigate" in item.attrs else None)
        assert len(axes) == 4
        for axis in axes:
            axis.attrs["navigate"] = not axis.attrs["navigate"]
    with pytest.raises(FormatError, match="not the last two axes"):
        Hdf5().probe(str(path))


def _nexus(file: h5py.File, default: str | None, *, root: bool = False) -> None:
    """Two series and a preview, each as NXdata."""
    for name, shape in (("large", (4, 5, 6)), ("small", (2, 5, 6)), ("preview", (7, 7))):
        group = file.create_group(f"entry/{name}")
        group.attrs.update({"NX_class": "NXdata", "signal": "values"})
        group["values"] = np.full(shape, len(shape), np.uint16)
    file["entry"].attrs["NX_class"] = "NXentry"
    if default is not None:
        file.attrs["default"] = "entry"
        file["entry"].attrs["default"] = default
    if root:
        file.attrs.update({"NX_class": "NXdata", "signal": "at_root"})
        file["at_root"] = np.zeros((3, 4, 5, 6), np.uint16)


@pytest.mark.parametrize(
    ("default", "name"),
    [
        (None, "/entry/large/values"),
        ("small", "/entry/small/values"),
        ("/entry/small", "/entry/small/values"),
        ("preview", "/entry/large/values"),  # an image of the scan is not what a reduction is for
        ("nowhere", "/entry/large/values"),
        ("..", "/entry/large/values"),
    ],
)
def test_the_default_nxdata_comes_before_the_largest(tmp_path: Path, default: str | None, name: str) -> None:
    path = make(tmp_path / "a.nxs", lambda f: _nexus(f, default))
    assert Hdf5().probe(os.fspath(path)).metadata["dataset"] == name


def test_nxdata_at_the_root(tmp_path: Path) -> None:
    path = make(tmp_path / "a.nxs", lambda f: _nexus(f, None, root=True))
    header = Hdf5().probe(os.fspath(path))
    assert (header.metadata["dataset"], header.scan_shape) == ("/at_root", (3, 4))


def test_a_default_that_leads_in_a_circle_ends(tmp_path: Path) -> None:
    path = make(tmp_path / "a.nxs", lambda f: _nexus(f, "/entry"))
    assert Hdf5().probe(os.fspath(path)).metadata["dataset"] == "/entry/large/values"


def test_several_items_of_swift_in_one_file(tmp_path: Path) -> None:
    """.nhdf: ``/data/0``, ``/data/1`` ... beside an index."""
    path = write_nion_h5(SCAN, tmp_path / "a.h5")
    with h5py.File(path) as source, h5py.File(tmp_path / "a.nhdf", "w") as file:
        source.copy("data", file, "data/1")
        file["data/0"] = np.zeros((4, 6), np.float32)
        file["data/0"].attrs["properties"] = "{}"
        file.create_group("index")
    header, out = read(tmp_path / "a.nhdf")
    assert (header.metadata["dataset"], header.scan_shape, header.members[0].suffix) == ("/data/1", (4, 6), ".nhdf")
    assert header.scan_axes[0].unit == "nm"
    assert "/data/0" in header.warnings[0]
    np.testing.assert_array_equal(out, SCAN.frames(0, 24))
