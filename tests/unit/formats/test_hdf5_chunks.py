"""Chunks of HDF5 without the library: where they lie, how they are undone, and that none is undone twice."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.synthetic import ExactScan
from mpi_kernels.errors import Incomplete, MissingData
from mpi_kernels.formats import hdf5_direct, hdf5_filters, hdf5_index, hdf5_source
from mpi_kernels.formats.hdf5 import Hdf5
from mpi_kernels.formats.hdf5_filters import BadChunk, Filter, fletcher32, undo
from mpi_kernels.formats.hdf5_layout import layout_of
from mpi_kernels.formats.hdf5_source import ChunkedSource
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout

SCAN = ExactScan((4, 6), (8, 10), "uint16", seed=4)
BITSHUFFLE = {"compression": 32008, "compression_opts": (0, 2)}
LZ4 = {"compression": 32004, "compression_opts": (0,)}
PIPELINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gzip": {"compression": "gzip"},
    "gzip-shuffle": {"compression": "gzip", "shuffle": True},
    "fpd": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "checksum": {"fletcher32": True},
    "blosc": dict(hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=1)),
    "zstd": dict(hdf5plugin.Zstd(clevel=3)),
    "lzf": {"compression": "lzf"},
    "bitshuffle": BITSHUFFLE,
    "lz4": LZ4,
}
DIRECT = ["gzip", "gzip-shuffle", "fpd", "checksum", "blosc", "zstd"]
if hdf5_filters.native_decode() is not None:
    DIRECT += ["bitshuffle", "lz4"]


def write(path: Path, array: np.ndarray, chunks: tuple[int, ...] | None, **options: Any) -> Path:
    with h5py.File(path, "w", libver=options.pop("libver", None)) as file:
        file.create_dataset("data", data=array, chunks=chunks, **options)
    return path


def frames_of(source: Any, bounds: list[int]) -> np.ndarray:
    header = source.header
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    for a, b in itertools.pairwise(bounds):
        source.frames(a, b, out[a:b])
    return out


def by_layout(layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """The frames as somebody reads them who has the layout only, decoding through HDF5's own filters."""
    frames = []
    data = Path(layout.files[0]).read_bytes()
    n = int(np.prod(shape[:-2]))
    for record in range(-(-n // layout.record_frames)):
        start = layout.first + record * layout.record if layout.offsets is None else int(layout.offsets[record])
        size = layout.payload if layout.sizes is None else int(layout.sizes[record])
        stored = data[start : start + size]
        raw = stored if not layout.codec else decoded(layout, stored)
        assert len(raw) == layout.payload
        frames += list(np.frombuffer(raw, layout.dtype).reshape(layout.record_frames, *shape[-2:]))
    return np.array(frames[:n])


def decoded(layout: Layout, stored: bytes) -> bytes:
    options = BITSHUFFLE if layout.codec == "bitshuffle-lz4" else LZ4
    dtype = f"u{layout.element}"
    count = layout.payload // layout.element
    with h5py.File("decode", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("x", (count,), dtype, chunks=(count,), **options)
        dataset.id.write_direct_chunk((0,), stored)
        found: bytes = dataset[:].tobytes()
    return found


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("maxshape", [None, (None, 6, 8, 10), (None, None, 8, 10)])
def test_the_compiled_index_is_what_h5py_says(tmp_path: Path, libver: str, maxshape: tuple[int, ...] | None) -> None:
    """Every kind of index: B-trees of both versions, fixed and extensible arrays."""
    path = write(
        tmp_path / "a.h5", SCAN.frames(0, 24).reshape(4, 6, 8, 10), (1, 4, 8, 5), libver=libver, maxshape=maxshape
    )
    with h5py.File(path) as file:
        dataset = file["data"]
        found = hdf5_index.chunk_index(dataset)
        assert found is not None
        assert found.grid == (4, 2, 1, 2)
        for number, at in enumerate(np.ndindex(found.grid)):
            info = dataset.id.get_chunk_info_by_coord(tuple(a * c for a, c in zip(at, dataset.chunks, strict=True)))
            assert (found.addresses[number], found.sizes[number], found.masks[number]) == (
                info.byte_offset,
                info.size,
                info.filter_mask,
            )
        python = hdf5_index._python_rows(dataset)
        pytest.importorskip("mpi_kernels._native")
        native = hdf5_index._native_rows(dataset, 4, 16)
        assert native is not None
        np.testing.assert_array_equal(np.sort(python, axis=0), np.sort(native, axis=0))


def test_more_chunks_than_there_is_room_for_are_not_written_behind_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", SCAN.frames(0, 24), (1, 8, 10))
    with h5py.File(path) as file:
        rows = np.full((10, 6), -7, np.int64)
        table = np.array([3, 5, 0, rows.ctypes.data], np.int64)
        library = hdf5_index.loaded_library()
        assert library is not None
        _native = pytest.importorskip("mpi_kernels._native")
        iterate = library.H5Dchunk_iter
        iterate.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        assert iterate(file["data"].id.id, 0, _native.chunk_callback(), table.ctypes.data) < 0
        assert table[2] == 5
        assert (rows[5:] == -7).all()
        assert (rows[:5] != -7).all()


def test_the_index_of_a_file_with_holes(tmp_path: Path) -> None:
    path = tmp_path / "holes.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (4, 6, 8, 10), "u2", chunks=(1, 1, 8, 10))
        data[1, 2] = 1
        found = hdf5_index.chunk_index(data)
        assert found is not None
        assert not found.whole
        assert np.flatnonzero(found.addresses >= 0).tolist() == [8]


@pytest.mark.parametrize("block", [512, 2048])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, BITSHUFFLE])
def test_a_user_block_moves_the_chunks(tmp_path: Path, block: int, options: dict[str, Any]) -> None:
    path = tmp_path / "user.h5"
    array = SCAN.frames(0, 24)
    with h5py.File(path, "w", userblock_size=block) as file:
        file.create_dataset("data", data=array, chunks=(1, 8, 10), **options)
    source = Hdf5().open(os.fspath(path))
    np.testing.assert_array_equal(frames_of(source, [0, 24]), array)
    if source.layout is not None:
        np.testing.assert_array_equal(by_layout(source.layout, array.shape), array)
    source.close()


# --- layouts ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shape=st.sampled_from([(3, 4), (5, 3, 4), (4, 6, 3, 4), (1, 5, 3, 4), (3, 1, 3, 4), (2, 3, 1, 3, 4)]),
    chunk=st.tuples(*[st.integers(1, 7)] * 3),
    options=st.sampled_from([{}, BITSHUFFLE, LZ4]),
    dtype=st.sampled_from(["|u1", "<u2", ">u2", "<u4", "<f4"]),
)
def test_a_layout_finds_every_frame(
    tmp_path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], options: dict[str, Any], dtype: str
) -> None:
    array = np.random.default_rng(2).integers(0, 99, shape).astype(dtype)
    chunks = (*(min(c, n) for c, n in zip(chunk, shape[:-2], strict=False)), *shape[-2:])
    path = tmp_path / "any.h5"
    path.unlink(missing_ok=True)
    source = Hdf5().open(os.fspath(write(path, array, chunks, **options)))
    if not options:
        assert isinstance(source, LayoutSource)  # any division of the scan will do
    if source.layout is not None:
        np.testing.assert_array_equal(by_layout(source.layout, shape), array.reshape(-1, *shape[-2:]))
        assert source.layout.codec == ("" if not options else "bitshuffle-lz4" if options is BITSHUFFLE else "lz4")
    np.testing.assert_array_equal(frames_of(source, [0, source.header.frames]), array.reshape(-1, *shape[-2:]))
    source.close()


@pytest.mark.parametrize(
    ("chunks", "options", "frames"),
    [
        ((1, 1, 8, 10), BITSHUFFLE, 1),
        ((1, 3, 8, 10), LZ4, 3),
        ((1, 6, 8, 10), BITSHUFFLE, 6),
        ((3, 6, 8, 10), BITSHUFFLE, 18),  # the second chunk sticks out: 24 frames, room for 36
        ((1, 4, 8, 10), BITSHUFFLE, None),  # 4 does not divide 6: the second chunk of each row sticks out
        ((2, 2, 8, 10), BITSHUFFLE, None),
        ((1, 1, 4, 10), {}, None),
        ((1, 1, 8, 10), {"compression": "gzip"}, None),
        ((1, 1, 8, 10), {**BITSHUFFLE, "shuffle": True}, None),
        ((1, 1, 8, 10), dict(hdf5plugin.Bitshuffle(cname="zstd")), None),
        ((1, 1, 8, 10), dict(hdf5plugin.Bitshuffle(cname="none")), None),
    ],
)
def test_which_chunks_are_records(
    tmp_path: Path, chunks: tuple[int, ...], options: dict[str, Any], frames: int | None
) -> None:
    array = SCAN.frames(0, 24).reshape(4, 6, 8, 10)
    source = Hdf5().open(os.fspath(write(tmp_path / "a.h5", array, chunks, **options)))
    assert (None if source.layout is None else source.layout.record_frames) == frames
    np.testing.assert_array_equal(frames_of(source, [0, 5, 24]), array.reshape(24, 8, 10))
    source.close()


def test_chunks_in_a_row_are_one_run(tmp_path: Path) -> None:
    source = Hdf5().open(os.fspath(write(tmp_path / "a.h5", SCAN.frames(0, 24), (1, 8, 10))))
    assert source.layout is not None
    assert source.layout.offsets is None
    assert source.layout.first > 0
    source.close()


def test_a_chunk_that_was_stored_without_its_filter_has_no_layout(tmp_path: Path) -> None:
    """A writer may skip a filter that does not pay; the mask says so."""
    path = tmp_path / "mask.h5"
    with h5py.File(path, "w") as file:
        for name, options in (("b", BITSHUFFLE), ("g", {"compression": "gzip", "shuffle": True})):
            data = file.create_dataset(name, (24, 8, 10), "u2", chunks=(1, 8, 10), **options)
            data[...] = SCAN.frames(0, 24)
            data.id.write_direct_chunk((7, 0, 0), SCAN.frame(7).tobytes(), filter_mask=0b11)
            shuffled = np.ascontiguousarray(SCAN.frame(8).reshape(-1).view(np.uint8).reshape(-1, 2).T)
            if name == "g":
                data.id.write_direct_chunk((8, 0, 0), shuffled.tobytes(), filter_mask=0b10)
        assert layout_of(file["b"], [0], np.dtype("u2"), "x") is None
        header = Hdf5().probe(os.fspath(write(tmp_path / "plain.h5", SCAN.frames(0, 24), (1, 8, 10))))
    for name in "bg":
        source = ChunkedSource(header, os.fspath(path), name)
        assert source.layout is None
        np.testing.assert_array_equal(frames_of(source, [0, 24]), SCAN.frames(0, 24))
        source.close()


@pytest.mark.parametrize("options", [{"compression": "gzip"}, BITSHUFFLE])
def test_partial_chunks_that_are_not_filtered(tmp_path: Path, options: dict[str, Any]) -> None:
    """H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS, which h5py can't set: the library itself is asked to."""
    path, array = tmp_path / "edge.h5", SCAN.frames(0, 23)
    with h5py.File(path, "w", libver="latest") as file:
        template = file.create_dataset("template", (23, 8, 10), "u2", chunks=(5, 8, 10), **options)
        plist = template.id.get_create_plist()
        library = hdf5_index.loaded_library()
        assert library is not None
        library.H5Pset_chunk_opts.argtypes = (ctypes.c_int64, ctypes.c_uint)
        assert library.H5Pset_chunk_opts(plist.id, hdf5_index.DONT_FILTER_PARTIAL) >= 0
        space = h5py.h5s.create_simple((23, 8, 10))
        made = h5py.h5d.create(file.id, b"data", h5py.h5t.NATIVE_UINT16, space, plist)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, array)
        del file["template"]
        assert not hdf5_index.filters_partial_chunks(file["data"])
    source = Hdf5().open(os.fspath(path))
    assert source.layout is None
    np.testing.assert_array_equal(frames_of(source, [0, 7, 23]), array)
    source.close()


# --- undone without the library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_pipeline_on_badly_cut_chunks(tmp_path: Path, name: str, threads: int) -> None:
    array = np.random.default_rng(5).integers(0, 999, (5, 7, 1, 12, 9)).astype(">u2")
    source = Hdf5().open(os.fspath(write(tmp_path / "a.h5", array, (2, 3, 1, 5, 4), **PIPELINES[name])))
    assert isinstance(source, ChunkedSource)
    source.threads = threads
    out = frames_of(source, [0, 3, 9, 20, 35])
    assert (source._direct is not None) == (name in DIRECT)
    np.testing.assert_array_equal(out, array.reshape(35, 12, 9))
    source.close()


@pytest.mark.parametrize("step", [1, 4, 7, 11, 35])
def test_each_chunk_is_undone_once(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(5).integers(0, 999, (5, 7, 12, 9)).astype("u2")
    source = Hdf5().open(os.fspath(write(tmp_path / "a.h5", array, (2, 3, 5, 4), compression="gzip")))
    count = 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return undo(*args)

    monkeypatch.setattr(hdf5_direct, "undo", counted)
    np.testing.assert_array_equal(frames_of(source, [*range(0, 35, step), 35]), array.reshape(35, 12, 9))
    assert count == 3 * 3 * 3 * 3
    source.close()


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(5).integers(0, 999, (6, 8, 12, 9)).astype("u2")
    source = Hdf5().open(os.fspath(write(tmp_path / "a.h5", array, (3, 2, 12, 9), compression="gzip")))
    monkeypatch.setattr(hdf5_direct, "CACHE_BYTES", 2 * 3 * 2 * 12 * 9 * 2 + 5)
    assert isinstance(source, ChunkedSource)
    np.testing.assert_array_equal(frames_of(source, list(range(49))), array.reshape(48, 12, 9))
    assert source._direct is not None
    source.frames(0, 1, np.empty((1, 12, 9), np.uint16))
    source.frames(8, 17, np.empty((9, 12, 9), np.uint16))
    assert len(source._direct._kept) == 2
    source.close()


def test_chunks_that_outgrow_the_cache_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros((6, 8, 12, 9), np.uint16)
    wide = write(tmp_path / "wide.h5", array, (3, 2, 12, 9), compression="gzip")
    one = write(tmp_path / "one.h5", array, (1, 1, 5, 9), compression="gzip")
    plain = write(tmp_path / "plain.h5", array, (3, 2, 12, 9))
    assert Hdf5().probe(os.fspath(wide)).warnings == ()
    monkeypatch.setattr(hdf5_source, "CACHE_BYTES", 3 * 8 * 12 * 9 * 2 - 1)
    assert "decompressed several times" in Hdf5().probe(os.fspath(wide)).warnings[0]
    assert Hdf5().probe(os.fspath(one)).warnings == Hdf5().probe(os.fspath(plain)).warnings == ()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_bad_chunk_is_named(tmp_path: Path, threads: int) -> None:
    path = write(tmp_path / "a.h5", np.random.default_rng(1).integers(0, 9, (40, 64, 64)), (1, 64, 64), fletcher32=True)
    with h5py.File(path) as file:
        found = [file["data"].id.get_chunk_info_by_coord((i, 0, 0)) for i in (31, 17)]
    with path.open("r+b") as stream:
        for info in found:
            stream.seek(info.byte_offset + 100)
            stream.write(b"\xff\xfe")
    source = Hdf5().open(os.fspath(path))
    assert isinstance(source, ChunkedSource)
    source.threads = threads
    out = np.empty((40, 64, 64), np.int64)
    before = threading.active_count()
    with pytest.raises(MissingData, match="checksum is wrong") as caught:
        source.frames(0, 40, out)
    assert caught.value.frame == 17
    source.frames(18, 31, out[18:31])
    source.close()
    assert threading.active_count() <= before


@settings(max_examples=80, deadline=None)
@given(
    data=st.binary(max_size=300),
    cut=st.integers(0, 400),
    flip=st.integers(0, 3000),
    code=st.sampled_from([hdf5_filters.GZIP, hdf5_filters.BLOSC, hdf5_filters.ZSTD]),
)
def test_damaged_bytes_are_refused_or_right(data: bytes, cut: int, flip: int, code: int) -> None:
    import zlib

    from numcodecs import blosc, zstd

    stored = {
        hdf5_filters.GZIP: lambda: zlib.compress(data),
        hdf5_filters.BLOSC: lambda: bytes(blosc.compress(data, b"lz4", 5)) if data else b"",
        hdf5_filters.ZSTD: lambda: bytes(zstd.compress(data, 3)),
    }[code]()
    pipeline = (Filter(code, ()),)
    if data:
        assert bytes(undo(stored, pipeline, 0, len(data))) == data
    damaged = bytearray(stored[:cut])
    if damaged and code == hdf5_filters.GZIP:  # the others have no checksum
        damaged[flip // 8 % len(damaged)] ^= 1 << flip % 8
    try:
        found = undo(bytes(damaged), pipeline, 0, len(data))
    except BadChunk:
        return
    assert len(found) == len(data)


@pytest.mark.parametrize("name", DIRECT)
def test_damaged_files_name_a_frame_or_are_read(tmp_path: Path, name: str) -> None:
    array = np.random.default_rng(5).integers(0, 9, (6, 16, 16)).astype("u2")
    path = write(tmp_path / "a.h5", array, (1, 16, 16), **PIPELINES[name])
    with h5py.File(path) as file:
        info = file["data"].id.get_chunk_info(3)
    data, generator = path.read_bytes(), np.random.default_rng(7)
    for _ in range(100):
        damaged = bytearray(data)
        for at in generator.integers(0, info.size, 3):
            damaged[info.byte_offset + at] = generator.integers(0, 256)
        path.write_bytes(damaged)
        source = Hdf5().open(os.fspath(path))
        out, named = np.empty((6, 16, 16), np.uint16), 3
        try:
            source.frames(0, 6, out)
        except MissingData as error:
            named = error.frame
            source.frames(0, 3, out[:3])
            source.frames(4, 6, out[4:])
        source.close()
        assert named == 3
        np.testing.assert_array_equal(np.delete(out, 3, 0), np.delete(array, 3, 0))


def test_a_bomb_gives_no_more_than_the_chunk() -> None:
    import zlib

    from numcodecs import blosc, zstd

    bomb = bytes(1 << 26)
    for code, stored in (
        (hdf5_filters.GZIP, zlib.compress(bomb)),
        (hdf5_filters.BLOSC, blosc.compress(bomb, b"zstd", 5)),
        (hdf5_filters.ZSTD, zstd.compress(bomb, 3)),
    ):
        with pytest.raises(BadChunk):
            undo(bytes(stored), (Filter(code, ()),), 0, 1000)


def test_a_chunk_that_claims_to_be_larger_than_any(tmp_path: Path) -> None:
    """The size in the index comes from the file; nothing is allocated for one that can't be."""
    path = write(tmp_path / "a.h5", SCAN.frames(0, 24), (1, 8, 10), compression="gzip")
    source = Hdf5().open(os.fspath(path))
    assert isinstance(source, ChunkedSource)
    assert source._index is not None
    source._index.sizes[5] = 1 << 40
    with pytest.raises(MissingData, match="claims") as caught:
        source.frames(0, 24, np.empty((24, 8, 10), np.uint16))
    assert caught.value.frame == 5
    source.close()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 719, 720, 721, 200_001])
@pytest.mark.parametrize("fill", [0, 255, None])
def test_the_checksum_is_hdf5s(n: int, fill: int | None) -> None:
    data = np.full(n, fill, np.uint8) if fill is not None else np.random.default_rng(n).integers(0, 256, n, np.uint8)
    assert fletcher32(data) == reference_fletcher(data.tobytes())
    if n:
        with h5py.File("sum", "w", driver="core", backing_store=False) as file:
            dataset = file.create_dataset("x", data=data, chunks=(n,), fletcher32=True)
            _, stored = dataset.id.read_direct_chunk((0,))
        assert bytes(undo(stored, (Filter(hdf5_filters.FLETCHER32, ()),), 0, n)) == data.tobytes()


def reference_fletcher(data: bytes) -> int:
    """Fletcher's definition, word by word."""
    first = second = 0
    for i in range(0, len(data), 2):
        first += data[i] << 8 | (data[i + 1] if i + 1 < len(data) else 0)
        second += first
    return ((second - 1) % 65535 + 1 if second else 0) << 16 | ((first - 1) % 65535 + 1 if first else 0)


def test_a_whole_file_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", SCAN.frames(0, 24), (1, 8, 10), **BITSHUFFLE)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    with pytest.raises(Incomplete):
        Hdf5().open(os.fspath(path))
