"""The compiled readers: every form of layout, read in every way by any number of threads, gives the frames; what is not
there is named."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpi_kernels.contract import Header, Reading
from mpi_kernels.errors import MissingData
from mpi_kernels.feed import Feed
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout
from mpi_kernels.storage import choose

_native = pytest.importorskip("mpi_kernels._native", reason="the extension is not built: pip install -e . (needs cc)")

READINGS: tuple[Reading, ...] = ("mmap", "read", "direct")


def header(frames: np.ndarray) -> Header:
    return Header(
        format="test",
        kind="stack",
        scan_shape=(len(frames),),
        det_shape=(frames.shape[1], frames.shape[2]),
        dtype=frames.dtype.newbyteorder("=").name,
        members=(),
        rule="exact",
    )


def encoded(codec: str, record: np.ndarray) -> bytes:
    """The chunk that HDF5 makes of a record."""
    filters: Any = hdf5plugin.Bitshuffle(cname="lz4") if codec == "bitshuffle-lz4" else hdf5plugin.LZ4()
    with h5py.File("unnamed", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("d", data=record, chunks=record.shape, **filters)
        return bytes(dataset.id.read_direct_chunk((0,) * record.ndim)[1])


@dataclass(frozen=True, kw_only=True)
class Form:
    """How records are laid out."""

    record_frames: int = 1
    first: int = 0
    lead: int = 0
    tail: int = 0
    gap: int = 0
    scattered: bool = False
    files: int = 1
    codec: str = ""
    numbered: int | None = None
    magic: bytes = b""
    flag: int | None = None

    @property
    def regular(self) -> bool:
        """Whether records follow one another, so that no table says where they are."""
        return not (self.scattered or self.gap or self.files > 1 or self.codec)


def head(form: Form, record: int) -> bytes:
    number = b"" if form.numbered is None else b",%06d,rest," % ((form.numbered + record) % 10**6)
    return (form.magic + number).ljust(form.lead, b"h")[: form.lead]


def write(folder: Path, frames: np.ndarray, form: Form) -> Layout:
    """Write frames (n, det_y, det_x) as a form says."""
    per = form.record_frames
    padded = np.full((-(-len(frames) // per) * per, *frames.shape[1:]), 77, frames.dtype)
    padded[: len(frames)] = frames
    records = [padded[i : i + per] for i in range(0, len(padded), per)]
    places = np.random.default_rng(len(frames)).permutation(len(records)) if form.scattered else range(len(records))
    paths = [folder / f"data-{i}" for i in range(form.files)]
    contents = [bytearray(b"F" * form.first) for _ in paths]
    offsets, file_of, sizes = (np.zeros(len(records), d) for d in (np.int64, np.int32, np.int64))
    for place in places:
        file_of[place] = int(place) * form.files // len(records)
        stored = encoded(form.codec, records[place]) if form.codec else records[place].tobytes()
        content = contents[file_of[place]]
        offsets[place], sizes[place] = len(content), len(stored)
        content += head(form, int(place)) + stored + b"t" * form.tail + b"g" * form.gap
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    regular = form.regular
    return Layout(
        files=tuple(os.fspath(p) for p in paths),
        dtype=frames.dtype.str,
        payload=records[0].nbytes,
        record_frames=per,
        first=form.first if regular else 0,
        offsets=None if regular else offsets,
        file_of=file_of if form.files > 1 else None,
        sizes=sizes if form.codec else None,
        codec=form.codec,  # type: ignore[arg-type]
        lead=form.lead,
        tail=form.tail,
        magic=form.magic,
        numbered=form.numbered,
        flag=form.flag,
    )


def counts(n: int, det: tuple[int, int], dtype: str, *, full: bool = False) -> np.ndarray:
    rng = np.random.default_rng(n)
    made = rng.poisson(2, (n, *det)) if np.dtype(dtype).kind != "f" else rng.normal(0, 100, (n, *det))
    frames = made.astype(dtype)
    if full:
        frames[:, 0, 0] = np.iinfo(dtype).max
    return frames


def read(layout: Layout, frames: np.ndarray, start: int, stop: int, **how: Any) -> np.ndarray:
    feed = Feed(header(frames), layout, **how)
    out = np.full((stop - start, *frames.shape[1:]), 55, feed.header.dtype)
    try:
        feed.frames(start, stop, out)
    finally:
        feed.close()
    return out


plain_forms = st.builds(
    Form,
    record_frames=st.integers(1, 4),
    first=st.integers(0, 20),
    lead=st.sampled_from([0, 1, 40, 64]),
    tail=st.integers(0, 9),
    gap=st.sampled_from([0, 0, 3, 8, 70_000]),
    scattered=st.booleans(),
    files=st.integers(1, 3),
)
stored_forms = st.builds(
    Form,
    record_frames=st.integers(1, 4),
    first=st.integers(0, 20),
    gap=st.sampled_from([0, 5]),
    scattered=st.booleans(),
    files=st.integers(1, 2),
    codec=st.sampled_from(["bitshuffle-lz4", "lz4"]),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    form=st.one_of(plain_forms, stored_forms),
    count=st.integers(1, 11),
    det=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["|u1", "|i1", "<u2", ">u2", "<i2", ">i4", "<u4", "<f4", ">f4", ">f8", "<i8", ">u8"]),
    marks=st.booleans(),
    flagged=st.booleans(),
    bounds=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    threads=st.integers(1, 3),
    reading=st.sampled_from([*READINGS, "auto"]),
)
def test_frames_of_every_form(
    tmp_path: Path,
    form: Form,
    count: int,
    det: tuple[int, int],
    dtype: str,
    marks: bool,
    flagged: bool,
    bounds: tuple[int, int],
    threads: int,
    reading: Reading,
) -> None:
    flagged = flagged and np.dtype(dtype).kind in "iu"
    frames = counts(count, det, dtype, full=flagged)
    flag = int(np.iinfo(dtype).max) if flagged else None
    if marks and form.lead >= 40:
        form = replace(form, magic=b"MQ1", numbered=999_998 if form.regular else None)
    layout = write(tmp_path, frames, replace(form, flag=flag))
    start, stop = sorted(min(b, count) for b in bounds)
    wanted = frames[start:stop].astype(frames.dtype.newbyteorder("="))
    if flag is not None:
        wanted[wanted == flag] = 0
    assert Feed.can(header(frames), layout) is None
    got = read(layout, frames, start, stop, reading=reading, threads=threads)
    np.testing.assert_array_equal(got, wanted)
    Feed(header(frames), layout).complete()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "form",
    [
        Form(first=3),
        Form(lead=384, magic=b"MQ1", numbered=1),
        Form(record_frames=32, gap=512, tail=8),
        Form(files=40),
        Form(scattered=True),
    ],
    ids=["packed", "merlin", "chunks", "files", "scattered"],
)
def test_more_than_any_buffer(tmp_path: Path, form: Form, threads: int, reading: Reading) -> None:
    count, det = (500, (16, 256)) if form.scattered else (10_000, (16, 32))  # 20 MB: more than two buffers of O_DIRECT
    frames = (np.arange(count * det[0] * det[1]) * 2654435761 >> 7).astype(">u4").reshape(count, *det)
    layout = write(tmp_path, frames, form)
    for start, stop in [(0, count), (1, count - 1), (321, 322)]:
        got = read(layout, frames, start, stop, reading=reading, threads=threads)
        assert (got == frames[start:stop]).all()


def test_it_agrees_with_the_source_in_numpy(tmp_path: Path) -> None:
    frames = counts(9, (5, 7), ">u2")
    layout = write(tmp_path, frames, Form(first=5, lead=40, tail=3, magic=b"MQ1", numbered=1))
    source = LayoutSource(header(frames), layout)
    out = np.empty(frames.shape, np.uint16)
    source.frames(0, 9, out)
    source.close()
    for reading in READINGS:
        np.testing.assert_array_equal(read(layout, frames, 0, 9, reading=reading), out)


# --- into the kernels -------------------------------------------------------------------------------------------------


class Sums:
    """A pass that wants the sum, the largest values and some masks of frames; or masks only."""

    def __init__(self, frames: np.ndarray, rows: int, *, masks_only: bool = False) -> None:
        det, self.dtype = frames.shape[1:], frames.dtype.newbyteorder("=")
        whole = {"u": "u8", "i": "i8", "f": "f8"}[self.dtype.kind]
        rng = np.random.default_rng(0)
        self.weights = np.concatenate([np.ones((1, *det), bool), rng.random((3, *det)) < 0.4])
        self.masks = np.full((rows, 4), 99, whole)
        floats = self.dtype.kind == "f"
        # floats are kept as high + low
        self.sum = None if masks_only else np.zeros((2, *det) if floats else det, whole)
        self.max = None if masks_only else np.full(det, -np.inf if floats else np.iinfo(self.dtype).min, self.dtype)
        self.it = _native.Pass(
            self.dtype.name, det, rows, masks=[(self.weights, self.masks)], sum=self.sum, max=self.max
        )

    def check(self, frames: np.ndarray) -> None:
        """Compare with dense arithmetic in numpy; floats within the bound of sums in float64."""
        self.it.flush()
        native = frames.astype(self.dtype)
        if self.sum is not None and self.max is not None:
            np.testing.assert_array_equal(self.max, native.max(axis=0))
            found = self.sum.sum(axis=0) if self.dtype.kind == "f" else self.sum
            np.testing.assert_allclose(found, native.sum(axis=0, dtype=found.dtype), rtol=1e-12, atol=1e-9)
        dense = np.einsum("nyx,kyx->nk", native.astype(self.masks.dtype), self.weights.astype(self.masks.dtype))
        np.testing.assert_allclose(self.masks, dense, rtol=1e-12, atol=1e-9 if self.dtype.kind == "f" else 0)

    def bits(self) -> list[bytes]:
        self.it.flush()
        assert self.sum is not None
        assert self.max is not None
        return [self.sum.sum(axis=0).tobytes(), self.max.tobytes(), self.masks.tobytes()]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    form=st.one_of(plain_forms, stored_forms),
    count=st.integers(1, 40),
    det=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["|u1", "<u2", ">u2", "<i2", "<u4", ">u4", "<f4", ">f4"]),
    masks_only=st.booleans(),
    flagged=st.booleans(),
    bounds=st.lists(st.integers(0, 40), min_size=2, max_size=5),
    threads=st.integers(1, 3),
    reading=st.sampled_from(READINGS),
)
def test_frames_of_every_form_are_reduced(
    tmp_path: Path,
    form: Form,
    count: int,
    det: tuple[int, int],
    dtype: str,
    masks_only: bool,
    flagged: bool,
    bounds: list[int],
    threads: int,
    reading: Reading,
) -> None:
    flagged = flagged and np.dtype(dtype).kind in "iu"
    frames = counts(count, det, dtype, full=flagged)
    flag = int(np.iinfo(dtype).max) if flagged else None
    feed = Feed(header(frames), write(tmp_path, frames, replace(form, flag=flag)), reading=reading, threads=threads)
    cuts = sorted(min(b, count) for b in bounds)
    start, stop = cuts[0], cuts[-1]
    sums = Sums(frames, stop - start, masks_only=masks_only and np.dtype(dtype).kind == "u")
    for a, b in itertools.pairwise(cuts):
        feed.add(sums.it, a, b, a - start)
    feed.close()
    wanted = frames[start:stop].copy()
    if flag is not None:
        wanted[wanted == flag] = 0
    if len(wanted):
        sums.check(wanted)
    saturated = np.count_nonzero(wanted == np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else 0
    assert sums.it.quality()["pixels"] == wanted.size
    assert sums.it.quality()["saturated"] == saturated


@pytest.mark.parametrize(
    ("per", "det"),
    [(1, (16, 24)), (5, (64, 64)), (6, (64, 128)), (5, (64, 72)), (7, (16, 24)), (3, (9, 7))],
    ids=["one frame", "one block of a frame", "blocks", "a short block", "frames of a block", "pixels of a byte"],
)
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4", ">u2"])
def test_masks_on_the_bit_planes(
    tmp_path: Path, dtype: str, flagged: bool, dead: bool, per: int, det: tuple[int, int]
) -> None:
    frames = counts(200, det, dtype)
    if dead:
        frames[20:, 3:9, 5] = np.iinfo(dtype).max  # the first frames have none, so that both ways are taken
    flag = int(np.iinfo(dtype).max) if flagged else None
    form = Form(codec="bitshuffle-lz4", flag=flag, record_frames=per)
    feed = Feed(header(frames), write(tmp_path, frames, form), threads=2)
    sums = Sums(frames, 200, masks_only=True)
    assert sums.it.masks_only
    for start, stop in ((0, 101), (101, 200)):  # a bound within a record
        feed.add(sums.it, start, stop, start)
    feed.close()
    sums.check(np.where(frames == flag, 0, frames).astype(dtype) if flagged else frames)
    assert sums.it.quality()["saturated"] == (180 * 6 if dead and not flagged else 0)


@pytest.mark.parametrize(
    "form", [Form(), Form(record_frames=100, gap=8), Form(codec="bitshuffle-lz4", record_frames=7)]
)
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_neither_threads_nor_the_way_of_reading_change_a_bit(tmp_path: Path, form: Form, dtype: str) -> None:
    frames = counts(2_100, (32, 48), dtype)
    frames *= np.float32(1.1) ** np.random.default_rng(0).integers(-90, 90, frames.shape)
    layout = write(tmp_path, frames, form)
    whole = Sums(frames, 2_000)
    whole.it.add(np.ascontiguousarray(frames[50:2_050].astype("=f4")), 0)
    for reading in READINGS:
        for threads in (1, 2, 3):
            for cuts in ([50, 2_050], [50, 51, 700, 1_023, 1_500, 2_050]):
                feed, sums = Feed(header(frames), layout, reading=reading, threads=threads), Sums(frames, 2_000)
                for a, b in itertools.pairwise(cuts):
                    feed.add(sums.it, a, b, a - 50)
                feed.close()
                assert sums.bits() == whole.bits()


@pytest.mark.parametrize("reading", READINGS)
def test_a_reduction_names_the_first_bad_frame_too(tmp_path: Path, reading: Reading) -> None:
    frames = counts(3_000, (64, 64), "<u2")
    layout = write(tmp_path, frames, Form())
    os.truncate(layout.files[0], 2_345 * layout.payload + 1)
    feed = Feed(header(frames), layout, reading=reading, threads=3)
    with pytest.raises(MissingData, match="bytes early") as caught:
        feed.add(Sums(frames, 3_000).it, 0, 3_000, 0)
    assert caught.value.frame == 2_345
    sums = Sums(frames, 2_345)
    feed.add(sums.it, 0, 2_345, 0)
    sums.check(frames[:2_345])


def test_a_pass_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    frames = counts(9, (4, 4), "<u2")
    feed = Feed(header(frames), write(tmp_path, frames, Form(codec="bitshuffle-lz4")))
    for other, rows, row in [
        (frames, 8, 0),
        (frames, 9, 1),
        (frames, 9, -1),
        (frames[:, :3], 9, 0),
        (frames.astype("i2"), 9, 0),
    ]:
        for masks_only in (False, True):
            with pytest.raises(ValueError, match=r"do not fit|takes other pixels"):
                feed.add(Sums(other, rows, masks_only=masks_only and other.dtype.kind == "u").it, 0, 9, row)
    with pytest.raises(TypeError, match="not a Pass"):
        feed.add(frames, 0, 9, 0)
    with pytest.raises(ValueError, match="within"):
        feed.add(Sums(frames, 99).it, 0, 10, 0)


@pytest.mark.parametrize("reading", READINGS)
def test_progress_is_told_and_can_end_it(tmp_path: Path, reading: Reading) -> None:
    count = 1 << 18
    frames = np.broadcast_to(np.uint16(1), (count, 128, 128))
    path = tmp_path / "data"
    path.write_bytes(np.ones(1 << 19, np.uint16).tobytes())
    # 32 frames over and over: 8 GB of work without a file of that size
    layout = Layout(files=(os.fspath(path),), dtype="<u2", payload=32768, offsets=np.arange(count) % 32 * 32768)
    feed = Feed(header(frames), layout, reading=reading, threads=2)
    told: list[int] = []
    rows = np.zeros((count, 1), "u8")
    with pytest.raises(LookupError):
        feed.add(
            _native.Pass("uint16", (128, 128), count, masks=[(np.ones((1, 128, 128), bool), rows)]),
            0,
            count,
            0,
            lambda done: told.append(done) or {}[done],
        )
    feed.close()
    assert len(told) == 1
    assert 0 <= told[0] < count


# --- what is not there ------------------------------------------------------------------------------------------------


def missing(layout: Layout, frames: np.ndarray, start: int = 0, **how: Any) -> MissingData:
    with pytest.raises(MissingData) as caught:
        read(layout, frames, start, len(frames), **how)
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("form", [Form(), Form(lead=4), Form(tail=3), Form(lead=4, tail=3, first=9)])
def test_a_cut_names_the_first_frame_that_is_not_whole(tmp_path: Path, form: Form, reading: Reading) -> None:
    frames = counts(7, (3, 4), "|u1")
    layout = write(tmp_path, frames, form)
    path = Path(layout.files[0])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        there = min(7, max(0, (size - form.first + form.tail) // layout.record))
        np.testing.assert_array_equal(read(layout, frames, 0, there, reading=reading), frames[:there])
        if there == 7:
            continue
        error = missing(layout, frames, reading=reading, threads=2)
        source = LayoutSource(header(frames), layout)
        with pytest.raises(MissingData) as other:
            source.frames(0, 7, np.empty(frames.shape, np.uint8))
        source.close()
        with pytest.raises(MissingData) as told:
            Feed(header(frames), layout).complete()
        assert error.frame == other.value.frame == told.value.frame == there
        assert error.path == other.value.path == told.value.path == layout.files[0]
        assert error.next_step == other.value.next_step


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_of_several_bad_frames_is_named(tmp_path: Path, reading: Reading, threads: int) -> None:
    frames = counts(5_000, (32, 32), "<u2")
    layout = write(tmp_path, frames, Form(lead=64, magic=b"MQ1", numbered=1))
    path = Path(layout.files[0])
    content = bytearray(path.read_bytes())
    for bad in (4_999, 2_600, 2_400, 1_237):
        content[bad * layout.record] = 0
        path.write_bytes(content)
        error = missing(layout, frames, reading=reading, threads=threads)
        assert error.frame == bad
        assert error.message == "its record does not start with b'MQ1': the frame was not written"
        assert missing(layout, frames, bad - 3, reading=reading, threads=threads).frame == bad
    path.write_bytes(content[: 1_000 * layout.record + 70])
    error = missing(layout, frames, reading=reading, threads=threads)
    assert (error.frame, error.message) == (1_000, f"the file ends {layout.record - 70} bytes early")


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    ("number", "told"), [(b"000003", "000003"), (b"12x456", "12x456"), (b"", "missing"), (b"-00002", "-00002")]
)
def test_a_doubled_frame_is_named_as_in_numpy(tmp_path: Path, number: bytes, told: str, reading: Reading) -> None:
    frames = counts(6, (4, 4), "<u2")
    layout = write(tmp_path, frames, Form(lead=64, magic=b"MQ1", numbered=1))
    path = Path(layout.files[0])
    content = bytearray(path.read_bytes())
    content[3 * layout.record :][: layout.lead]
    content[3 * layout.record : 3 * layout.record + 64] = (b"MQ1," + number + b",").ljust(64, b"h")
    path.write_bytes(content)
    error = missing(layout, frames, reading=reading)
    assert error.frame == 3
    assert error.message == f"its record has number {told} instead of 4: a frame is missing or doubled"
    content[3 * layout.record : 3 * layout.record + 64] = b"MQ1".ljust(64, b"h")
    path.write_bytes(content)
    assert "has number missing instead of 4" in missing(layout, frames, reading=reading).message


def test_numbers_begin_anew_after_six_digits(tmp_path: Path) -> None:
    frames = counts(6, (4, 4), "<u2")
    layout = write(tmp_path, frames, Form(lead=64, magic=b"MQ1", numbered=999_997))
    np.testing.assert_array_equal(read(layout, frames, 0, 6), frames)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("codec", ["bitshuffle-lz4", "lz4"])
@pytest.mark.parametrize("per", [1, 3])
def test_damage_names_its_frame(tmp_path: Path, codec: str, per: int, reading: Reading) -> None:
    frames = counts(9, (16, 16), "<u2")
    layout = write(tmp_path, frames, Form(codec=codec, record_frames=per))
    assert layout.offsets is not None
    path = Path(layout.files[0])
    content = bytearray(path.read_bytes())
    at = int(layout.offsets[6 // per])
    content[at : at + 12] = b"\xff" * 12
    path.write_bytes(content)
    error = missing(layout, frames, reading=reading, threads=2)
    assert error.frame == 6
    assert error.message == "its chunk can't be decoded: the file is damaged"
    path.write_bytes(content[: int(layout.offsets[3 // per]) + 5])
    error = missing(layout, frames, reading=reading, threads=2)
    assert error.frame == 3
    assert "bytes early" in error.message
    with pytest.raises(MissingData) as told:
        Feed(header(frames), layout).complete()
    assert told.value.frame == 3


@pytest.mark.parametrize("reading", READINGS)
def test_a_chunk_that_was_never_written(tmp_path: Path, reading: Reading) -> None:
    frames = counts(9, (16, 16), "<u2")
    layout = write(tmp_path, frames, Form(codec="lz4", record_frames=2))
    assert layout.offsets is not None
    layout.offsets[2] = -1
    for call in (lambda: read(layout, frames, 0, 9, reading=reading), Feed(header(frames), layout).complete):
        with pytest.raises(MissingData, match="its chunk was never written") as caught:
            call()
        assert caught.value.frame == 4
    np.testing.assert_array_equal(read(layout, frames, 0, 4, reading=reading), frames[:4])


@pytest.mark.parametrize("reading", READINGS)
def test_a_file_that_is_gone_and_one_that_is_none(tmp_path: Path, reading: Reading) -> None:
    frames = counts(12, (4, 4), "<u2")
    layout = write(tmp_path, frames, Form(files=3))
    Path(layout.files[1]).unlink()
    error = missing(layout, frames, reading=reading)
    assert (error.frame, error.path) == (4, layout.files[1])
    assert error.message == "can't be read: No such file or directory"
    with pytest.raises(MissingData, match="No such file") as told:
        Feed(header(frames), layout).complete()
    assert told.value.frame == 4
    Path(layout.files[1]).mkdir()
    assert missing(layout, frames, reading=reading).message == "can't be read: Is a directory"
    Path(layout.files[1]).rmdir()
    os.mkfifo(layout.files[1])
    assert missing(layout, frames, reading=reading).frame == 4  # and does not wait for a writer
    Path(layout.files[1]).unlink()
    Path(layout.files[1]).symlink_to("/dev/zero")
    assert missing(layout, frames, reading=reading).frame == 4  # and is no endless file of zeros


@pytest.mark.parametrize("reading", ["read", "direct"])
def test_an_error_of_the_disk_is_told_in_its_words(reading: Reading) -> None:
    frames = np.zeros((4, 64, 64), np.uint8)
    # nothing is mapped in the first page of a process, and reading it there is EIO: proc_pid_mem(5)
    layout = Layout(files=("/proc/self/mem",), dtype="|u1", payload=4096)
    error = missing(layout, frames, reading=reading)
    assert (error.frame, error.message) == (0, "can't be read: Input/output error")


# --- what it leaves behind --------------------------------------------------------------------------------------------


def held() -> tuple[int, int, int]:
    """Descriptors, maps of data files and threads of this process."""
    maps = Path("/proc/self/maps").read_text().count("/data-")
    return len(list(Path("/proc/self/fd").iterdir())), maps, len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("reading", READINGS)
def test_nothing_is_left_open(tmp_path: Path, reading: Reading) -> None:
    frames = counts(200, (8, 8), "<u2")
    layout = write(tmp_path, frames, Form(files=100))
    before, handler = held(), signal.getsignal(signal.SIGBUS)
    feed = Feed(header(frames), layout, reading=reading, threads=3)
    out = np.empty(frames.shape, np.uint16)
    feed.frames(0, 200, out)
    assert held()[0] - before[0] <= 40  # of 100 files
    assert held()[1:] == before[1:]
    os.truncate(layout.files[60], 5)
    for _ in range(3):
        with pytest.raises(MissingData):
            feed.frames(0, 200, out)
    assert held()[1:] == before[1:]
    feed.close()
    feed.close()
    assert held() == before
    assert signal.getsignal(signal.SIGBUS) == handler
    with pytest.raises(ValueError, match="closed"):
        feed.frames(0, 200, out)


def test_one_call_at_a_time(tmp_path: Path) -> None:
    frames = np.zeros((3_000, 128, 128), np.uint16)
    layout = write(tmp_path, frames, Form())
    feed = Feed(header(frames), layout, threads=2)
    out = np.empty(frames.shape, np.uint16)
    busy = threading.Thread(target=lambda: [feed.frames(0, 3_000, out) for _ in range(5)])
    busy.start()
    refused = 0
    while busy.is_alive():
        try:
            feed.frames(0, 1, out[:1])
        except RuntimeError:
            refused += 1
    busy.join()
    feed.close()
    assert refused


# --- where and how ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("offsets", [False, True])
def test_far_behind_in_a_large_file(tmp_path: Path, offsets: bool, reading: Reading) -> None:
    first, size, count = 5 * 2**31 + 24, 3 * 2**20, 1_000
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(first + count * size)
        for i in (0, 700, 999):
            file.seek(first + i * size + 4)
            file.write(bytes([i % 251 + 1]))
    frames = np.broadcast_to(np.uint8(0), (count, 1024, 3072))
    layout = Layout(
        files=(os.fspath(path),),
        dtype="|u1",
        payload=size,
        first=0 if offsets else first,
        offsets=first + size * np.arange(count, dtype=np.int64) if offsets else None,
    )
    for i in (0, 700, 999):
        got = read(layout, frames, i, i + 1, reading=reading)
        assert got[0, 0, 4] == i % 251 + 1
        assert got.sum() == i % 251 + 1
    os.truncate(path, first + 999 * size + 5)
    with pytest.raises(MissingData) as caught:
        read(layout, frames, 998, 1_000, reading=reading)
    assert caught.value.frame == 999


def test_a_file_system_that_refuses_direct_reading_is_read_through_the_cache() -> None:
    path = "/sys/kernel/btf/vmlinux"
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except FileNotFoundError:
        pytest.skip(f"there is no {path}")
    except OSError:
        pass  # as it should be
    else:
        pytest.skip("sysfs takes O_DIRECT here")
    content = Path(path).read_bytes()[: 64 * 4096]
    frames = np.frombuffer(content, np.uint8).reshape(64, 64, 64)
    feed = Feed(header(frames), Layout(files=(path,), dtype="|u1", payload=4096), reading="direct", threads=2)
    out = np.empty(frames.shape, np.uint8)
    feed.frames(0, 64, out)
    np.testing.assert_array_equal(out, frames)
    assert "1 files refuse O_DIRECT" in feed.why
    feed.close()


def test_what_is_cached_is_mapped_and_what_is_not_is_read_past_the_cache(tmp_path: Path) -> None:
    frames = counts(500, (64, 64), "<u2")
    layout = write(tmp_path, frames, Form())
    with Path(layout.files[0]).open("rb") as file:
        os.fsync(file.fileno())
        file.read()
        assert choose(layout) == ("mmap", "100 % cached, local disk")
        assert choose(replace(layout, codec="lz4"))[0] == "read"
        assert Feed(header(frames), layout).reading == "mmap"
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reading, why = choose(layout)
    if "100 % cached" in why:
        pytest.skip("this file system keeps its pages (tmpfs)")
    assert reading == "direct"
    apart = replace(layout, offsets=np.random.default_rng(0).permutation(500) * 8192)
    assert choose(apart) == ("read", f"{why}, in small pieces")
    assert choose(replace(layout, offsets=np.arange(500) * 8192))[0] == "direct"
    np.testing.assert_array_equal(read(layout, frames, 0, 500), frames)
    assert choose(replace(layout, files=("/nowhere",)))[0] == "read"


def test_what_it_can_not_read_it_says_beforehand(tmp_path: Path) -> None:
    frames = counts(4, (8, 8), "<u2")
    layout = write(tmp_path, frames, Form())
    head = header(frames)
    for other, why in [
        (replace(layout, decode="mpi_kernels.formats.merlin_raw:decode"), "merlin_raw:decode"),
        (replace(layout, dtype="<f2"), "float16 is delivered as uint16"),
        (replace(layout, payload=130), "does not hold 1 frames"),
        (replace(layout, magic=b"m" * 65), "65 bytes"),
        (replace(layout, codec="zip"), "its codec is zip"),
        (replace(layout, codec="lz4", record_frames=2**20, payload=2**27), "decoded in cache"),
    ]:
        assert why in (Feed.can(head, other) or "")
        with pytest.raises(ValueError, match=re.escape(why)):
            Feed(head, other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"first": -1},
        {"lead": -1},
        {"offsets": np.zeros(3, np.int64)},
        {"offsets": np.full(4, 2**62)},
        {"first": 2**62},
        {"file_of": np.array([0, 0, 1, 0])},
        {"file_of": np.array([0, 0, -1, 0])},
        {"codec": "lz4"},
        {"codec": "lz4", "sizes": np.full(4, 2**40), "offsets": np.zeros(4, np.int64)},
        {"files": ()},
        {"files": ("a\0b",)},
        {"magic": b"more than the record has", "payload": 4, "dtype": "|u1"},
    ],
    ids=str,
)
def test_a_layout_that_can_not_be_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    frames = counts(4, (2, 2), wrong.get("dtype", "<u2"))
    layout = write(tmp_path, frames, Form())
    with pytest.raises(ValueError, match=r"can't be|null byte"):
        Feed(header(frames), replace(layout, **wrong), reading="read")


def test_bounds_and_buffers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    frames = counts(4, (2, 2), "<u2")
    feed = Feed(header(frames), write(tmp_path, frames, Form()))
    for start, stop, out in [
        (0, 5, np.empty((5, 2, 2), "u2")),
        (-1, 2, np.empty((3, 2, 2), "u2")),
        (0, 2, np.empty((3, 2, 2), "u2")),
        (0, 2, np.empty((2, 2, 2), "u4")),
    ]:
        with pytest.raises(ValueError, match=r"frames|buffer"):
            feed.frames(start, stop, out)
    strided = np.zeros((4, 2, 4), "u2")
    feed.frames(0, 4, strided[:, :, ::2])
    np.testing.assert_array_equal(strided[:, :, ::2], frames)
    assert time.get_clock_info("monotonic").monotonic
    feed.close()
