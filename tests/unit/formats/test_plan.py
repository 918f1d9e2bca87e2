"""The frame plan: every byte where it belongs, every short read an error."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpi_kernels.contract import Header, Member
from mpi_kernels.errors import MissingData
from mpi_kernels.formats import plan as plans
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.layout import Layout


def header(count: int, det_shape: tuple[int, int], dtype: str, path: Path) -> Header:
    return Header(
        format="test",
        kind="stack",
        scan_shape=(count,),
        det_shape=det_shape,
        dtype=dtype,
        members=(Member(path=os.fspath(path), suffix=".x", size=path.stat().st_size),),
        rule="exact",
    )


def doubled(stored: np.ndarray, out: np.ndarray) -> None:
    out[...] = 2 * stored.view("<u2").reshape(out.shape).astype(out.dtype)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    count=st.integers(1, 9),
    det=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(["|u1", "<u2", ">u2", ">i4", "<f4", ">f8"]),
    first=st.integers(0, 20),
    lead=st.integers(0, 9),
    tail=st.integers(0, 9),
    shuffled=st.booleans(),
    bounds=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    wide=st.booleans(),
)
def test_records_of_every_form(
    tmp_path: Path,
    count: int,
    det: tuple[int, int],
    dtype: str,
    first: int,
    lead: int,
    tail: int,
    shuffled: bool,
    bounds: tuple[int, int],
    wide: bool,
) -> None:
    generator = np.random.default_rng(count)
    frames = generator.integers(0, 100, (count, *det)).astype(dtype)
    order = generator.permutation(count) if shuffled else np.arange(count)
    records = [b"L" * lead + frames[i].tobytes() + b"T" * tail for i in order]
    path = tmp_path / "records"
    path.write_bytes(b"F" * first + b"".join(records))
    payload = frames[0].nbytes
    offsets = first + np.argsort(order) * (lead + payload + tail) if shuffled else None
    found = Layout(
        files=(os.fspath(path),),
        first=first,
        payload=payload,
        dtype=dtype,
        lead=lead,
        tail=tail,
        offsets=offsets,
        magic=b"L" * min(lead, 2),
    )
    delivered = "float64" if wide else np.dtype(dtype).newbyteorder("=").name
    source = LayoutSource(header(count, det, delivered, path), pickle.loads(pickle.dumps(found)))
    start, stop = sorted(min(b, count) for b in bounds)
    out = np.full((stop - start, *det), 55, delivered)
    source.frames(start, stop, out)
    np.testing.assert_array_equal(out, frames[start:stop])
    source.complete()
    source.close()


@pytest.mark.parametrize(("lead", "tail"), [(0, 0), (4, 0), (0, 3), (4, 3)])
def test_a_cut_names_the_first_frame_that_is_not_whole(tmp_path: Path, lead: int, tail: int) -> None:
    payload, count = 12, 7
    record = lead + payload + tail
    whole = b"".join(b"M" * lead + bytes([i]) * payload + b"t" * tail for i in range(count))
    path = tmp_path / "cut"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        source = LayoutSource(
            header(count, (3, 4), "uint8", path),
            Layout(files=(os.fspath(path),), payload=payload, dtype="|u1", lead=lead, tail=tail),
        )
        there = min(count, (size + tail) // record)
        out = np.full((count, 3, 4), 99, np.uint8)
        source.frames(0, there, out[:there])
        assert (out[:there] == np.arange(there)[:, None, None]).all()
        if there == count:
            source.complete()
        else:
            for call in (source.complete, lambda s=source, o=out: s.frames(0, count, o)):
                with pytest.raises(MissingData) as caught:
                    call()
                assert caught.value.frame == there
                assert os.fspath(path) in str(caught.value)
                assert caught.value.next_step
        source.close()


def test_more_frames_than_one_call_takes(tmp_path: Path) -> None:
    count = 2 * plans.RUN_FRAMES + 3
    frames = np.arange(count * 6, dtype=">u2").reshape(count, 2, 3)
    path = tmp_path / "many"
    path.write_bytes(b"".join(b"MQ1" + f.tobytes() + b"tail" for f in frames))
    for magic in (b"MQ1", b""):
        source = LayoutSource(
            header(count, (2, 3), "uint16", path),
            Layout(files=(os.fspath(path),), payload=12, dtype=">u2", lead=3, tail=4, magic=magic),
        )
        out = np.zeros((count, 2, 3), np.uint16)
        source.frames(0, count, out)
        np.testing.assert_array_equal(out, frames)
        source.close()


def test_decoding_goes_in_pieces_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "doubled_pixels", SimpleNamespace(doubled=doubled))
    monkeypatch.setattr(plans, "SCRATCH_BYTES", 40)  # three frames of 12 bytes at a time
    frames = np.arange(10 * 6, dtype="<u2").reshape(10, 2, 3)
    path = tmp_path / "coded"
    path.write_bytes(frames.tobytes())
    plan = Layout(files=(os.fspath(path),), payload=12, dtype="|u1", decode="doubled_pixels:doubled")
    source = LayoutSource(header(10, (2, 3), "uint32", path), plan)
    out = np.zeros((9, 2, 3), np.uint32)
    source.frames(1, 10, out)
    np.testing.assert_array_equal(out, 2 * frames[1:].astype(np.uint32))
    source.close()


def test_a_buffer_with_gaps_is_filled_too(tmp_path: Path) -> None:
    frames = np.arange(24, dtype=">u2").reshape(4, 2, 3)
    path = tmp_path / "gaps"
    path.write_bytes(frames.tobytes())
    source = LayoutSource(header(4, (2, 3), "uint16", path), Layout(files=(os.fspath(path),), payload=12, dtype=">u2"))
    wide = np.full((4, 2, 6), 9, np.uint16)
    source.frames(0, 4, wide[:, :, ::2])
    np.testing.assert_array_equal(wide[:, :, ::2], frames)
    assert (wide[:, :, 1::2] == 9).all()
    source.close()


def test_a_record_without_its_mark_names_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "marks"
    path.write_bytes(b"MQ1aaaa" * 3 + b"\0\0\0bbbb" + b"MQ1cccc")
    plan = Layout(files=(os.fspath(path),), lead=3, payload=4, dtype="|u1", magic=b"MQ1")
    source = LayoutSource(header(5, (2, 2), "uint8", path), plan)
    out = np.zeros((5, 2, 2), np.uint8)
    source.frames(0, 3, out[:3])
    source.frames(4, 5, out[4:])
    with pytest.raises(MissingData) as caught:
        source.frames(2, 5, out[2:])
    assert caught.value.frame == 3
    source.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    lead=st.integers(0, 5),
    first=st.integers(0, 7),
    step=st.integers(1, 20),
)
def test_records_over_several_files(tmp_path: Path, counts: list[int], lead: int, first: int, step: int) -> None:
    generator = np.random.default_rng(sum(counts))
    frames = generator.integers(0, 1 << 16, (sum(counts), 2, 3)).astype("<u2")
    files, offsets, at = [], [], 0
    for i, count in enumerate(counts):
        path = tmp_path / f"{i}.x"
        records = [b"\xaa" * lead + frames[at + k].tobytes() for k in range(count)]
        path.write_bytes(b"\xbb" * first + b"".join(records))
        offsets += [first + k * (lead + 12) for k in range(count)]
        files.append(os.fspath(path))
        at += count
    layout = Layout(
        files=tuple(files),
        dtype="<u2",
        payload=12,
        lead=lead,
        offsets=np.array(offsets, np.int64),
        file_of=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
    )
    source = LayoutSource(header(at, (2, 3), "uint16", tmp_path / "0.x"), layout)
    out = np.full((at, 2, 3), 77, np.uint16)
    for start in range(0, at, step):
        source.frames(start, min(start + step, at), out[start : start + step])
    source.complete()
    np.testing.assert_array_equal(out, frames)
    lost = len(counts) - 1
    os.truncate(files[lost], first + lead + 11)
    with pytest.raises(MissingData, match=f"{lost}.x") as caught:
        source.complete()
    assert caught.value.frame == at - counts[-1]
    with pytest.raises(MissingData) as caught:
        source.frames(0, at, out)
    assert caught.value.frame == at - counts[-1]
    source.close()


def test_even_records_need_no_table() -> None:
    table = np.array([7, 27, 47], np.int64)
    layout = Layout(files=("x",), dtype="<u2", payload=16, lead=2, offsets=table)
    even = plans.evenly(layout)
    assert (even.offsets, even.first, even.tail, even.record) == (None, 7, 2, 20)
    for uneven in (np.array([7, 27, 48]), np.array([47, 27, 7]), np.array([0, 500, 1000])):
        kept = Layout(files=("x",), dtype="<u2", payload=16, lead=2, offsets=uneven)
        assert plans.evenly(kept) is kept
    two = Layout(files=("x", "y"), dtype="<u2", payload=16, offsets=table, file_of=np.array([0, 0, 1], np.int32))
    assert plans.evenly(two) is two
