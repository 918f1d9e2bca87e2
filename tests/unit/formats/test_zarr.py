"""Zarr folders: chunk shapes, codecs, versions, HyperSpy's axes, and chunks that are not there."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.synthetic import ExactScan
from emflow.synthetic_vendor import write_zarr
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats.zarr import Zarr

SCAN = ExactScan((3, 4), (5, 6), "uint16", seed=2)
CHUNKS = (2, 3, 5, 4)


def read(path: Path, step: int = 0) -> tuple[Header, np.ndarray]:
    source = Zarr().open(os.fspath(path))
    header, step = source.header, step or source.header.frames
    out = np.full((header.frames, *header.det_shape), 77, header.dtype)
    for start in range(0, header.frames, step):
        source.frames(start, min(start + step, header.frames), out[start : start + step])
    source.complete()
    source.close()
    return header, out


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chunks=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    version=st.sampled_from([2, 3]),
    order=st.sampled_from(["<", ">"]),
    separator=st.sampled_from([".", "/"]),
    step=st.integers(1, 12),
)
def test_any_chunks(
    tmp_path_factory: pytest.TempPathFactory,
    chunks: tuple[int, ...],
    version: int,
    order: str,
    separator: str,
    step: int,
) -> None:
    path = tmp_path_factory.mktemp("z") / "a.zarr"
    write_zarr(SCAN, path, chunks, version=version, order=order, separator=separator)  # type: ignore[arg-type]
    header, frames = read(path, step)
    assert header.scan_shape == SCAN.scan_shape
    np.testing.assert_array_equal(frames, SCAN.frames(0, 12))


@pytest.mark.parametrize(("scan_shape", "kind"), [((), "image"), ((5,), "stack"), ((2, 3), "4d")])
def test_images_and_stacks(tmp_path: Path, scan_shape: tuple[int, ...], kind: str) -> None:
    scan = ExactScan(scan_shape, (4, 6), "float32")
    header, frames = read(write_zarr(scan, tmp_path / "a.zarr", (2,) * len(scan_shape) + (3, 4)))
    assert (header.kind, header.scan_shape) == (kind, scan_shape)
    np.testing.assert_array_equal(frames, scan.frames(0, scan.count))


def numcodecs_encoder(name: str) -> Callable[[bytes], bytes]:
    numcodecs = pytest.importorskip("numcodecs")
    codec = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4}[name]()
    return lambda data: bytes(codec.encode(data))


@pytest.mark.parametrize("codec", ["", "zlib", "gzip", "bz2", "lzma", "blosc", "zstd", "lz4"])
def test_codecs_and_chunks_of_another_size(tmp_path: Path, codec: str) -> None:
    own = {"gzip": gzip.compress, "bz2": bz2.compress, "lzma": lzma.compress}
    more = {"compress": own[codec]} if codec in own else {}
    if codec in ("blosc", "zstd", "lz4"):
        more = {"compress": numcodecs_encoder(codec)}
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS, codec=codec, **more)  # type: ignore[arg-type]
    np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 12))
    chunk = path / "1.1.0.0"  # frames 11 and, at the edge, nothing more
    whole = chunk.read_bytes()
    other = write_zarr(SCAN, tmp_path / "b.zarr", (1, 1, 2, 2), codec=codec, **more)  # type: ignore[arg-type]
    damaged = [whole[: len(whole) // 2], (other / "0.0.0.0").read_bytes(), b"\xff" * 40]
    if codec:
        damaged.append(b"")
    for data in damaged:
        chunk.write_bytes(data)
        with pytest.raises((MissingData, Incomplete)) as caught:
            read(path)
        assert caught.value.frame == 11
    chunk.write_bytes(whole)
    np.testing.assert_array_equal(read(path)[1], SCAN.frames(0, 12))


def test_a_bomb_stays_small(tmp_path: Path) -> None:
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS, codec="gzip", compress=gzip.compress)
    (path / "0.0.0.0").write_bytes(gzip.compress(bytes(200 << 20), 9))
    with pytest.raises(MissingData, match="holds 241 of 240 bytes") as caught:
        read(path)
    assert caught.value.frame == 0


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("missing", [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0), (1, 1, 0, 1)])
def test_a_missing_chunk_names_its_first_frame(tmp_path: Path, version: int, missing: tuple[int, ...]) -> None:
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS, version=version)
    source = Zarr().open(os.fspath(path))
    (path / (("c." if version == 3 else "") + ".".join(map(str, missing)))).unlink()
    wanted = missing[0] * 2 * 4 + missing[1] * 3
    with pytest.raises(Incomplete) as caught:
        Zarr().probe(os.fspath(path))
    assert caught.value.frame == wanted
    out = np.full((12, 5, 6), 77, np.uint16)
    with pytest.raises(MissingData) as lost:
        source.frames(0, 12, out)
    assert lost.value.frame == wanted
    with pytest.raises(MissingData):
        source.complete()
    np.testing.assert_array_equal(out[:wanted], SCAN.frames(0, wanted))


def test_hyperspy_axes_and_neighbours(tmp_path: Path) -> None:
    root = tmp_path / "a.zspy"
    group = root / "Experiments" / "scan"
    group.mkdir(parents=True)
    (root / ".zgroup").write_text('{"zarr_format": 2}')
    write_zarr(SCAN, group / "data", CHUNKS)
    write_zarr(ExactScan((), (5, 6)), group / "mask", (5, 6))
    for n, scale in enumerate((1.0, 2.0, 0.5, 0.25)):
        (group / f"axis-{n}").mkdir()
        said = {"scale": scale, "offset": -1.0, "units": "nm" if n < 2 else "<undefined>"}
        (group / f"axis-{n}" / ".zattrs").write_text(json.dumps(said))
    header, frames = read(root)
    assert [(a.scale, a.offset, a.unit) for a in header.scan_axes] == [(1.0, -1.0, "nm"), (2.0, -1.0, "nm")]
    assert [a.unit for a in header.det_axes] == ["px", "px"]
    assert header.metadata["dataset"] == "Experiments/scan/data"
    np.testing.assert_array_equal(frames, SCAN.frames(0, 12))
    shutil.copytree(group / "data", group / "data2")
    with pytest.raises(FormatError, match="several arrays"):
        Zarr().probe(os.fspath(root))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": "F"}, "order"),
        ({"filters": [{"id": "delta"}]}, "filters"),
        ({"compressor": {"id": "pickle"}}, "pickle"),
        ({"dtype": "|O"}, "not counts"),
        ({"shape": [3, 4, 5]}, "chunks"),
        ({"shape": [3, 4, 5, 0]}, "shape"),
        ({"chunks": [1 << 20, 1 << 20, 5, 6]}, "bytes"),
        ({"shape": "many"}, "shape"),
        ({"dimension_separator": "../"}, "separator"),
        ({"zarr_format": 9}, "not read"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS)
    said = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps(said | change))
    with pytest.raises(FormatError, match=words) as caught:
        Zarr().probe(os.fspath(path))
    assert caught.value.next_step


def test_a_header_that_claims_much_is_refused_quickly(tmp_path: Path) -> None:
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS)
    said = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps(said | {"shape": [1 << 19, 1 << 19, 5, 6]}))
    with pytest.raises(Incomplete) as caught:
        Zarr().probe(os.fspath(path))
    assert caught.value.frame is not None


def test_links_are_not_followed(tmp_path: Path) -> None:
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS)
    secret = tmp_path / "secret"
    (path / "0.0.0.0").rename(secret)
    (path / "0.0.0.0").symlink_to(secret)
    with pytest.raises(Incomplete):
        Zarr().probe(os.fspath(path))


def test_other_folders_are_not_zarr(tmp_path: Path) -> None:
    with pytest.raises(NotThisFormat):
        Zarr().probe(os.fspath(tmp_path))
    (tmp_path / ".zarray").write_text('{"zarr_format"')
    with pytest.raises(KernelError):
        Zarr().probe(os.fspath(tmp_path))


def test_without_numcodecs_the_next_step_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zarr(SCAN, tmp_path / "a.zarr", CHUNKS, codec="blosc")
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(FormatError, match="numcodecs is not installed") as caught:
        Zarr().open(os.fspath(path))
    assert "emflow[formats]" in caught.value.next_step
