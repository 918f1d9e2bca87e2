"""npy and raw: every order, byte order and type; damaged headers; sidecars."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.synthetic import ExactScan, write_npy, write_raw
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, NotThisFormat
from mpi_kernels.formats import fortran
from mpi_kernels.formats.npy import Npy
from mpi_kernels.formats.raw import Raw

TYPES = ["|b1", "|i1", "|u1", *(o + t for o in "<>" for t in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8"))]
SHAPES = [(5, 7), (1, 5, 7), (4, 3, 2), (1, 1, 3, 2), (3, 1, 2, 5), (1, 6, 4, 3), (2, 3, 1, 1)]


def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    found = np.random.default_rng(len(shape)).integers(0, 2 if dtype == "|b1" else 120, shape)
    return np.where(np.arange(found.size).reshape(shape) % 5 == 0, 0, found).astype(dtype)


def read(known: Npy | Raw, path: Path, split: int = 0) -> tuple[Header, np.ndarray]:
    source = known.open(os.fspath(path))
    header = source.header
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    source.frames(0, split, out[:split])
    source.frames(split, header.frames, out[split:])
    source.complete()
    source.close()
    return header, out


def expected(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[-2:])


def check(header: Header, frames: np.ndarray, array: np.ndarray) -> None:
    assert header.kind == {2: "image", 3: "stack", 4: "4d"}[array.ndim]
    assert header.scan_shape == array.shape[:-2]
    assert frames.dtype.isnative
    np.testing.assert_array_equal(frames, expected(array))
    widened = {"b": "uint8", "f2": "float32"}
    native = array.dtype.newbyteorder("=").name
    assert header.dtype == widened.get(array.dtype.kind, widened.get(array.dtype.str[1:], native))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    shape=st.sampled_from(SHAPES),
    order=st.sampled_from("CF"),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    split=st.integers(0, 20),
)
def test_npy_as_numpy_writes_it(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], order: str, version: tuple[int, int], split: int
) -> None:
    array = np.asarray(values(shape, dtype), order=order)
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version, allow_pickle=False)
    check(*read(Npy(), path, min(split, int(np.prod(shape[:-2])))), array)
    assert Npy().probe(os.fspath(path)).rule == "exact"


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    shape=st.sampled_from(SHAPES),
    order=st.sampled_from("CF"),
    offset=st.integers(0, 70),
    split=st.integers(0, 20),
)
def test_raw_as_its_sidecar_says(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], order: str, offset: int, split: int
) -> None:
    array = values(shape, dtype)
    path = tmp_path / "a.bin"
    path.write_bytes(b"\xff" * offset + array.tobytes(order))
    sidecar = {"shape": list(shape), "dtype": dtype, "order": order, "offset": offset}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    check(*read(Raw(), path, min(split, int(np.prod(shape[:-2])))), array)


def test_fortran_order_reads_with_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.asfortranarray(np.random.default_rng(0).integers(0, 60000, (16, 16, 64, 64), np.uint16))  # 2 MiB
    path = tmp_path / "f.npy"
    np.save(path, array)
    monkeypatch.setattr(fortran, "PIECE_BYTES", 64 << 10)
    expected_frames = array.reshape(-1, 64, 64)
    source = Npy().open(os.fspath(path))
    out = np.empty((8, 64, 64), np.uint16)
    tracemalloc.start()
    for start in (0, 100, 248):
        source.frames(start, start + 8, out)
        np.testing.assert_array_equal(out, expected_frames[start : start + 8])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    source.close()
    assert peak < 512 << 10
    assert any("Fortran" in w for w in source.header.warnings)


def npy_bytes(descr: object, shape: object, fortran_order: object = False, extra: str = "") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran_order!r}, 'shape': {shape!r}, {extra}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (npy_bytes("|O", (2, 3)), FormatError, "not counts"),
        (npy_bytes("<c8", (2, 3)), FormatError, "not counts"),
        (npy_bytes("<U4", (2, 3)), FormatError, "not counts"),
        (npy_bytes([("a", "<u2")], (2, 3)), FormatError, "not counts"),
        (npy_bytes("<u3", (2, 3)), FormatError, "not counts"),
        (npy_bytes("<f16", (2, 3)), FormatError, "not counts"),
        (npy_bytes("<u2", (2, -3)), FormatError, "no image"),
        (npy_bytes("<u2", (0, 3, 3)), FormatError, "no image"),
        (npy_bytes("<u2", (7,)), FormatError, "no image"),
        (npy_bytes("<u2", (2, 2, 2, 2, 2)), FormatError, "no image"),
        (npy_bytes("<u2", [2, 3]), FormatError, "shape"),
        (npy_bytes("<u2", (2, True)), FormatError, "shape"),
        (npy_bytes("<u2", (2, 2.0)), FormatError, "shape"),
        (npy_bytes("<u2", (2, 3), fortran_order=1), FormatError, "shape"),
        (npy_bytes("<u2", (2, 3), extra="'more': 1"), FormatError, "lacks"),
        (npy_bytes("<u8", (1 << 60, 1 << 60, 3, 3)), FormatError, "can't be"),
        (npy_bytes("<u8", (2, 1 << 20, 1 << 20)), FormatError, "can't be"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"__import__('os')", FormatError, "no dictionary"),
        (b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64, FormatError, "no dictionary"),
        (b"\x93NUMPY\x09\x00" + bytes(20), FormatError, "version 9"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 20, FormatError, "claims"),
        (b"\x93NUMPY\x01\x00\x76\x00{'descr'", Incomplete, "of its header"),
        (b"\x93NUM", Incomplete, "only 4 bytes"),
        (b"", Incomplete, "empty"),
        (b"PK\x03\x04" + bytes(50), NotThisFormat, "NumPy"),
    ],
)
def test_npy_headers_that_are_refused(tmp_path: Path, data: bytes, kind: type[KernelError], words: str) -> None:
    path = tmp_path / "bad.npy"
    path.write_bytes(data)
    with pytest.raises(kind, match=words) as caught:
        Npy().open(os.fspath(path))
    assert type(caught.value) is kind
    assert caught.value.path == os.fspath(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "bomb.npy"
    np.save(path, np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError):
        Npy().open(os.fspath(path))
    assert not (tmp_path / "exploded").exists()


def test_npy_says_how_many_frames_are_there(tmp_path: Path) -> None:
    scan = ExactScan((3, 4), (5, 6), "uint16")
    path = write_npy(scan, tmp_path / "a.npy")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 7 * 60 + 1])
    with pytest.raises(Incomplete, match="5 of 12 frames") as caught:
        Npy().probe(os.fspath(path))
    assert caught.value.frame == 5
    path.write_bytes(data + b"\0\0")
    with pytest.raises(FormatError, match="2 bytes more"):
        Npy().probe(os.fspath(path))


def test_two_arrays_in_one_npy_file_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 3)))
    np.save(buffer, np.zeros((2, 3)))
    path = tmp_path / "two.npy"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match="more than"):
        Npy().probe(os.fspath(path))


def test_swifts_sidecar_calibrates(tmp_path: Path) -> None:
    scan = ExactScan((2, 3), (4, 6), "float32")
    header = Npy().probe(os.fspath(write_npy(scan, tmp_path / "a.npy")))
    assert [(a.name, a.scale, a.unit) for a in header.scan_axes] == [("scan_y", 0.5, "nm"), ("scan_x", 0.5, "nm")]
    assert [(a.name, a.offset, a.unit) for a in header.det_axes] == [("det_y", -2.0, "mrad"), ("det_x", -3.0, "mrad")]
    assert [m.suffix for m in header.members] == [".npy", ".json"]
    assert header.metadata["high_tension_v"] == 100000.0
    alone = Npy().probe(os.fspath(write_npy(scan, tmp_path / "b.npy", sidecar=False)))
    assert (alone.scan_axes, alone.det_axes, len(alone.members)) == ((), (), 1)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ('{"data_shape": [2, 3, 4, 7]}', FormatError, "properties describe"),
        ('{"datum_dimension_count": 1}', FormatError, "frames have 2"),
        ('{"dimensional_cal', Incomplete, "not whole"),
        ("", Incomplete, "empty"),
        ("{]}", FormatError, "not JSON"),
        ("[1, 2]", FormatError, "object"),
    ],
)
def test_npy_sidecars_that_are_refused(tmp_path: Path, text: str, kind: type[KernelError], words: str) -> None:
    path = write_npy(ExactScan((2, 3), (4, 6)), tmp_path / "a.npy")
    sidecar = path.with_suffix(".json")
    sidecar.write_text(text)
    if text == "[1, 2]":
        kind = FormatError
    with pytest.raises(kind, match=words) as caught:
        Npy().probe(os.fspath(path))
    assert caught.value.path == os.fspath(sidecar)


@pytest.mark.parametrize(
    "odd",
    [
        {"dimensional_calibrations": "none"},
        {"dimensional_calibrations": [1, 2, 3, 4]},
        {"dimensional_calibrations": [{"scale": 0}] * 4},
        {"dimensional_calibrations": [{"scale": float("nan")}] * 4},
        {"dimensional_calibrations": [{"scale": 1.0}] * 3},
        {"metadata": 7, "intensity_calibration": [], "title": {}},
        {"metadata": {"instrument": "x", "scan": None}},
    ],
)
def test_odd_properties_lose_the_calibration_not_the_data(tmp_path: Path, odd: dict[str, Any]) -> None:
    scan = ExactScan((2, 3), (4, 6))
    path = write_npy(scan, tmp_path / "a.npy")
    path.with_suffix(".json").write_text(json.dumps(odd))
    header, frames = read(Npy(), path)
    assert header.det_axes == ()
    np.testing.assert_array_equal(frames, scan.frames(0, 6))


RAW = {"shape": [2, 3, 4, 6], "dtype": "<u2"}


@pytest.mark.parametrize(
    ("sidecar", "kind", "words"),
    [
        (None, Incomplete, "no sidecar"),
        ({}, FormatError, "shape is None"),
        ({**RAW, "dtype": "object"}, FormatError, "not counts"),
        ({**RAW, "dtype": None}, FormatError, "not counts"),
        ({**RAW, "order": "K"}, FormatError, "order is"),
        ({**RAW, "offset": -1}, FormatError, "offset is"),
        ({**RAW, "offset": True}, FormatError, "offset is"),
        ({**RAW, "shpae": 1}, FormatError, "unknown key 'shpae'"),
        ({**RAW, "shape": [2, 3, 4, "6"]}, FormatError, "shape is"),
        ({**RAW, "shape": [2, 3, 4, 0]}, FormatError, "no image"),
        ({**RAW, "shape": [10**30, 3, 4, 6]}, FormatError, "can't be"),
        ({**RAW, "shape": [3, 3, 4, 6]}, Incomplete, "6 of 9 frames"),
        ({**RAW, "shape": [1, 3, 4, 6]}, FormatError, "bytes more"),
    ],
)
def test_raw_sidecars_that_are_refused(
    tmp_path: Path, sidecar: dict[str, Any] | None, kind: type[KernelError], words: str
) -> None:
    path = write_raw(ExactScan((2, 3), (4, 6)), tmp_path / "a.raw")
    if sidecar is None:
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(kind, match=words) as caught:
        Raw().open(os.fspath(path))
    assert caught.value.next_step


def test_raw_takes_swifts_calibrations(tmp_path: Path) -> None:
    path = write_raw(ExactScan((3,), (4, 6)), tmp_path / "a.raw")
    described = json.loads(path.with_suffix(".json").read_text())
    described["dimensional_calibrations"] = [{"scale": 2.0, "units": "s"}, {"scale": 3.0}, {"scale": 4.0}]
    path.with_suffix(".json").write_text(json.dumps(described))
    header = Raw().probe(os.fspath(path))
    assert [(a.name, a.scale, a.unit) for a in header.scan_axes] == [("frame", 2.0, "s")]
    assert [(a.scale, a.unit) for a in header.det_axes] == [(3.0, "px"), (4.0, "px")]


def test_a_huge_sidecar_is_not_read(tmp_path: Path) -> None:
    path = write_raw(ExactScan((3,), (4, 6)), tmp_path / "a.raw")
    with path.with_suffix(".json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(FormatError, match="more than"):
        Raw().probe(os.fspath(path))
