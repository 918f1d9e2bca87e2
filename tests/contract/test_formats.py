"""What every registered format must do, on samples that our own exact generator writes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emflow import registry
from emflow.synthetic import (
    ExactScan,
    write_dectris,
    write_emd,
    write_empad,
    write_hspy,
    write_merlin,
    write_nion_h5,
    write_npy,
    write_nxdata,
    write_raw,
    write_stempy,
    write_topspin,
)
from emflow.synthetic_streams import Inset, write_k2is, write_tpx3
from emflow.synthetic_vendor import (
    write_blo,
    write_de,
    write_dm,
    write_mrc,
    write_ndata,
    write_nordif,
    write_ripple,
    write_seq,
    write_ser,
    write_tiff,
    write_tvips,
    write_velox,
    write_zarr,
)
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, NotThisFormat
from mpi_kernels.formats.choose import choose
from mpi_kernels.protocols import Format

SMALL = ExactScan((3, 5), (6, 8), "uint16", seed=1, empty_every=7)
SQUARE = ExactScan((3, 5), (8, 8), "uint8", seed=3, empty_every=7)
STACK = ExactScan((15,), (6, 8), "uint16", seed=1, empty_every=7)
COUNTS = ExactScan((2, 3), (4, 5), "uint32", seed=3, empty_every=5)
EMPAD = ExactScan((2, 3), (128, 128), "float32", seed=2)
K2 = Inset((2, 2), (1860, 2048), "uint16", (12, 16), (926, 250), seed=5)  # in four blocks of two sectors
ONE_CHIP = Inset((2, 3), (256, 256), "uint32", (5, 6), (100, 30), seed=5, empty_every=5)
FOUR_CHIPS = Inset((3, 2), (512, 512), "uint32", (8, 10), (251, 250), seed=6)

Sample = tuple[str, ExactScan, Callable[[Path], Path]]

SAMPLES: dict[str, Sample] = {
    "npy": ("npy", SMALL, lambda f: write_npy(SMALL, f / "a b.npy", byte_order=">")),
    "npy-alone": ("npy", SMALL, lambda f: write_npy(SMALL, f / "alone.npy", sidecar=False)),
    "npy-fortran": ("npy", SMALL, lambda f: write_npy(SMALL, f / "f.npy", fortran=True)),
    "raw": ("raw", SMALL, lambda f: write_raw(SMALL, f / "a.raw", byte_order=">", offset=100)),
    "raw-dat": ("raw", SMALL, lambda f: write_raw(SMALL, f / "a.dat")),
    "k2is": ("k2is", K2, lambda f: write_k2is(K2, f / "a b_.gtg")),
    "merlin": ("merlin", SMALL, lambda f: write_merlin(SMALL, f / "a.mib")),
    "merlin-alone": ("merlin", SMALL, lambda f: write_merlin(SMALL, f / "b.mib", hdr=False)),
    "empad": ("empad", EMPAD, lambda f: write_empad(EMPAD, f / "scan_x3_y2.raw", xml="acquisition_1.xml")),
    "nion": ("hdf5", SMALL, lambda f: write_nion_h5(SMALL, f / "a.h5")),
    "nion-chunked": ("hdf5", SMALL, lambda f: write_nion_h5(SMALL, f / "c.h5", chunk=(1, 2, 5, 3), byte_order=">")),
    "dectris": ("dectris", SMALL, lambda f: write_dectris(SMALL, f / "a b_master.h5")),
    "dectris-alone": ("dectris", SMALL, lambda f: write_dectris(SMALL, f / "c_master.h5", codec="lz4", sidecar=False)),
    "stempy": ("stempy", COUNTS, lambda f: write_stempy(COUNTS, f / "counted.h5")),
    "topspin": ("topspin", SMALL, lambda f: write_topspin(SMALL, f / "a.app5")),
    "emd": ("hdf5", SMALL, lambda f: write_emd(SMALL, f / "a.emd", byte_order=">")),
    "hspy": ("hdf5", SMALL, lambda f: write_hspy(SMALL, f / "a.hspy")),
    "blo": ("blo", SQUARE, lambda f: write_blo(SQUARE, f / "a.blo")),
    "dm": ("dm", SMALL, lambda f: write_dm(SMALL, f / "a.dm4")),
    "dm-detector-first": ("dm", SMALL, lambda f: write_dm(SMALL, f / "b.dm3", version=3, swapped=False, order=">")),
    "mrc": ("mrc", STACK, lambda f: write_mrc(STACK, f / "a.mrcs", order=">", extended=80)),
    "direct-electron": ("mrc", SMALL, lambda f: write_de(SMALL, f / "a_movie.mrc")),
    "ndata": ("ndata", SMALL, lambda f: write_ndata(SMALL, f / "a.ndata1")),
    "nordif": ("nordif", SQUARE, lambda f: write_nordif(SQUARE, f / "Pattern.dat")),
    "ripple": ("rsciio", STACK, lambda f: write_ripple(STACK, f / "a.rpl")),
    "seq": ("seq", STACK, lambda f: write_seq(STACK, f / "a.seq")),
    "ser": ("ser", SMALL, lambda f: write_ser(SMALL, f / "a_1.ser")),
    "tiff": ("tiff", STACK, lambda f: write_tiff(STACK, f / "a.tif", strips=2)),
    "tiff-big": ("tiff", STACK, lambda f: write_tiff(STACK, f / "a.tiff", order=">", big=True)),
    "tpx3": ("tpx3", ONE_CHIP, lambda f: write_tpx3(ONE_CHIP, f / "a.tpx3")),
    "tpx3-quad": ("tpx3", FOUR_CHIPS, lambda f: write_tpx3(FOUR_CHIPS, f / "b.tpx3")),
    "tvips": ("tvips", STACK, lambda f: write_tvips(STACK, f / "a_000.tvips", parts=(4, 11))),
    "velox": ("velox", STACK, lambda f: write_velox(STACK, f / "a.emd", chunk=(4, 8, 2))),
    "nxdata": ("hdf5", SMALL, lambda f: write_nxdata(SMALL, f / "a.nxs", chunk=(2, 3, 6, 8), compression="gzip")),
}


FOLDERS: dict[str, Sample] = {
    "zarr": ("zarr", SMALL, lambda f: write_zarr(SMALL, f / "a.zarr", (2, 2, 4, 5))),
    "zarr-3": ("zarr", SMALL, lambda f: write_zarr(SMALL, f / "b.zarr", (1, 5, 6, 8), version=3, separator="/")),
}
"""Acquisitions that are a folder; what is done to a file's bytes is done to those of one of its chunks elsewhere."""

EVERY = SAMPLES | FOLDERS


@pytest.fixture(scope="module")
def formats() -> dict[str, Format]:
    return {name: registry.load("formats", name)() for name in registry.names("formats")}


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ExactScan, Path]:
    name, scan, write = SAMPLES[request.param]
    folder = tmp_path / "share"
    folder.mkdir()
    return name, scan, write(folder)


@pytest.fixture(params=EVERY)
def acquisition(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ExactScan, Path]:
    name, scan, write = EVERY[request.param]
    folder = tmp_path / "share"
    folder.mkdir()
    return name, scan, write(folder)


def read(known: Format, path: Path | str, bounds: list[int] | None = None) -> tuple[Header, np.ndarray]:
    source = known.open(os.fspath(path))
    try:
        header = source.header
        out = np.full((header.frames, *header.det_shape), 77, header.dtype)
        bounds = bounds or [0, header.frames]
        for a, b in itertools.pairwise(bounds):
            source.frames(a, b, out[a:b])
        source.complete()
        assert source.align >= 1
        layout = getattr(source, "layout", None)  # shares that cut no chunk cut no record either, if there are two
        assert layout is None or source.align % layout.record_frames == 0 or source.align >= header.frames
    finally:
        source.close()
        source.close()
    return header, out


def scanned(scan: ExactScan, header: Header) -> tuple[int, ...]:
    """A .mib without .hdr knows the number of frames only."""
    return scan.scan_shape if header.kind == "4d" else (scan.count,)


def test_every_registered_format_has_a_sample(formats: dict[str, Format]) -> None:
    assert {name for name, _, _ in EVERY.values()} == set(formats)
    for known in formats.values():
        assert isinstance(known, Format)
        assert known.suffixes
        assert all(s[0] in "._" and s == s.lower() for s in known.suffixes)  # "_master.h5" is more than a suffix


def test_claims_its_sample_and_reads_it_exactly(
    acquisition: tuple[str, ExactScan, Path], formats: dict[str, Format]
) -> None:
    name, scan, path = acquisition
    chosen, header = choose(os.fspath(path), formats)
    assert chosen == name == header.format
    assert header.det_shape == scan.det_shape
    assert header.scan_shape == scanned(scan, header)
    assert np.dtype(header.dtype) == scan.dtype
    assert np.dtype(header.dtype).isnative
    opened, frames = read(formats[name], path)
    assert opened == header == formats[name].probe(os.fspath(path))
    np.testing.assert_array_equal(frames, scan.frames(0, scan.count))
    np.testing.assert_array_equal(frames.sum(axis=(1, 2), dtype=np.int64), scan.totals())


def test_members_name_every_file_with_its_size(sample: tuple[str, ExactScan, Path], formats: dict[str, Format]) -> None:
    name, _, path = sample
    members = formats[name].probe(os.fspath(path)).members
    assert members[0].path == os.fspath(path)
    assert sorted(m.path for m in members) == sorted(os.fspath(p) for p in path.parent.iterdir())
    assert all(m.size == Path(m.path).stat().st_size for m in members)
    assert len({m.suffix for m in members}) == len(members)


def test_members_staged_under_id_names_read_the_same(
    sample: tuple[str, ExactScan, Path], formats: dict[str, Format], tmp_path: Path
) -> None:
    name, scan, path = sample
    header = formats[name].probe(os.fspath(path))
    staged = tmp_path / "source"
    staged.mkdir()
    for member in header.members:
        shutil.copyfile(member.path, staged / f"0123456789abcdef{member.suffix}")
    # the share is gone: nothing of it may be needed
    shutil.rmtree(path.parent)
    main = staged / f"0123456789abcdef{header.members[0].suffix}"
    chosen, again = choose(os.fspath(main), formats)
    assert chosen == name
    _, frames = read(formats[name], main)
    np.testing.assert_array_equal(frames, scan.frames(0, scan.count))
    assert (again.kind, again.scan_shape, again.dtype, again.scan_axes, again.det_axes, again.rule) == (
        header.kind,
        header.scan_shape,
        header.dtype,
        header.scan_axes,
        header.det_axes,
        header.rule,
    )


def test_frames_in_any_split_equal_the_whole(
    acquisition: tuple[str, ExactScan, Path], formats: dict[str, Format]
) -> None:
    name, scan, path = acquisition
    whole = scan.frames(0, scan.count)
    generator = random.Random(7)
    for _ in range(6):
        inner = generator.sample(range(scan.count + 1), generator.randint(1, 4))
        bounds = sorted([0, scan.count, *inner])  # equal bounds too: an empty block is no error
        np.testing.assert_array_equal(read(formats[name], path, bounds)[1], whole)


def test_a_wrong_buffer_is_the_callers_mistake(
    acquisition: tuple[str, ExactScan, Path], formats: dict[str, Format]
) -> None:
    name, scan, path = acquisition
    source = formats[name].open(os.fspath(path))
    other = scan.dtype.newbyteorder("S") if scan.dtype.itemsize > 1 else np.dtype(np.int8)
    try:
        for start, stop, out in (
            (0, 1, np.empty((2, *scan.det_shape), scan.dtype)),
            (0, 1, np.empty((1, *scan.det_shape), other)),
            (scan.count, scan.count + 1, np.empty((1, *scan.det_shape), scan.dtype)),
            (-1, 0, np.empty((1, *scan.det_shape), scan.dtype)),
        ):
            with pytest.raises(ValueError, match=r"expected a buffer|are not within"):
                source.frames(start, stop, out)
    finally:
        source.close()


def test_refuses_the_files_of_others(acquisition: tuple[str, ExactScan, Path], formats: dict[str, Format]) -> None:
    name, _, path = acquisition
    for other, known in formats.items():
        if other != name:
            with pytest.raises((NotThisFormat, FormatError, Incomplete)):
                known.probe(os.fspath(path))


def test_any_truncation_is_refused_or_read_right(
    sample: tuple[str, ExactScan, Path], formats: dict[str, Format]
) -> None:
    """A shorter file may be a shorter acquisition only where the format can't tell, and then its frames are right."""
    name, scan, path = sample
    data, whole = path.read_bytes(), scan.frames(0, scan.count)
    generator = random.Random(3)
    lengths = {0, 1, 3, 8, 9, 47, 48, 100, 383, 384, len(data) - 1, len(data) // 2}
    lengths |= {generator.randrange(len(data)) for _ in range(40)}
    for length in sorted(n for n in lengths if n < len(data)):
        path.write_bytes(data[:length])
        try:
            header, frames = read(formats[name], path)
        except KernelError as error:
            refusal = error
            assert refusal.path is not None
            assert refusal.next_step or isinstance(refusal, NotThisFormat), f"{length}: {refusal}"
            continue
        assert header.rule == "stability", f"{length} of {len(data)} bytes were called whole"
        assert header.frames < scan.count
        np.testing.assert_array_equal(frames, whole[: header.frames])


def test_a_truncation_is_incomplete_and_not_final(
    sample: tuple[str, ExactScan, Path], formats: dict[str, Format]
) -> None:
    name, _, path = sample
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 1])
    with pytest.raises(Incomplete) as caught:
        choose(os.fspath(path), formats)
    assert os.fspath(path) in str(caught.value) or path.name in str(caught.value)
    assert name in formats


def test_random_bytes_give_our_errors_only(sample: tuple[str, ExactScan, Path], formats: dict[str, Format]) -> None:
    _, _, path = sample
    magic = path.read_bytes()[:16]
    generator = random.Random(11)
    for i in range(30):
        noise = generator.randbytes(generator.randint(1, 3000))
        path.write_bytes((magic[: generator.randint(0, 16)] if i % 2 else b"") + noise)
        for known in formats.values():
            with pytest.raises(KernelError):
                known.probe(os.fspath(path))
            with pytest.raises(KernelError):
                known.open(os.fspath(path))


def test_a_file_that_shrinks_while_it_is_open_is_missing_data(
    sample: tuple[str, ExactScan, Path], formats: dict[str, Format]
) -> None:
    name, scan, path = sample
    source = formats[name].open(os.fspath(path))
    try:
        # of a master, which holds no frames itself
        parts = [p for end in ("_data_000001.h5", "_1.bin") for p in path.parent.glob(f"*{end}")]
        held = parts[0] if parts else path
        os.truncate(held, held.stat().st_size // 2)
        out = np.full((scan.count, *scan.det_shape), 77, source.header.dtype)
        with pytest.raises(KernelError) as caught:
            source.frames(0, scan.count, out)
        assert caught.value.code == "missing-data"
        assert caught.value.frame is not None
        assert 0 <= caught.value.frame < scan.count
    finally:
        source.close()


@pytest.mark.parametrize(
    "stem",
    [
        "-rf",
        "$(touch x)",
        "new\nline",
        "quote\"'`",
        "ü" * 120,
        os.fsdecode(b"\xff\xfe latin"),
        "a" * 240,
        " ",
        "\x1b[31m",
    ],
)
def test_hostile_names_are_only_names(stem: str, tmp_path: Path, formats: dict[str, Format]) -> None:
    for name, scan, write in SAMPLES.values():
        folder = tmp_path / "plain"
        folder.mkdir()
        path = write(folder)
        header = formats[name].probe(os.fspath(path))
        for member in header.members:
            Path(member.path).rename(folder / f"{stem}{member.suffix}")
        hostile = folder / f"{stem}{header.members[0].suffix}"
        if name == "empad":  # its XML names the file, but the same stem comes first
            assert formats[name].probe(os.fspath(hostile)).scan_shape == scan.scan_shape
        np.testing.assert_array_equal(read(formats[name], hostile)[1], scan.frames(0, scan.count))
        hostile.write_bytes(hostile.read_bytes()[:20])
        with pytest.raises(KernelError) as caught:
            choose(os.fspath(hostile), formats)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        str(caught.value).encode("utf-8")
        shutil.rmtree(folder)


def test_opening_leaves_no_file_open(sample: tuple[str, ExactScan, Path], formats: dict[str, Format]) -> None:
    name, _, path = sample
    read(formats[name], path)
    before, last = len(list(Path("/proc/self/fd").iterdir())), path.read_bytes()[-1:]
    for _ in range(3):
        read(formats[name], path)
        os.truncate(path, path.stat().st_size - 1)
        with contextlib.suppress(KernelError):  # a .mib without .hdr is then a shorter one
            formats[name].open(os.fspath(path)).close()
        with pytest.raises(KernelError):
            formats[name].probe(os.fspath(path.with_name("missing")))
        with path.open("ab") as file:
            file.write(last)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_sample_has_something_to_see() -> None:
    """A reader that swapped axes or dropped frames must not pass by chance."""
    for scan in (SMALL, EMPAD):
        frames = scan.frames(0, scan.count)
        assert len({f.tobytes() for f in frames}) > scan.count // 2
        assert not np.array_equal(frames, frames[:, ::-1])
        assert not np.array_equal(frames, frames[:, :, ::-1])
        assert math.prod(scan.scan_shape) == scan.count
