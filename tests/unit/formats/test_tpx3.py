"""Timepix3 streams, packed here bit by bit from the description of the packets: hits whose frames are known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.formats import tpx3_scan
from mpi_kernels.formats.tpx3 import Tpx3, Tpx3Source
from mpi_kernels.protocols import Moments, Sum
from mpi_kernels.ranks import Ranks
from mpi_kernels.sparse import SparseFused, SparseSource

ROWS, COLUMNS, DWELL_NS = 4, 6, 2000
LINE_NS = DWELL_NS * COLUMNS + 1700
END = 0x71B0 << 48
OTHER = {0xF: 0xE, 0xA: 0xB, 0xE: 0xA, 0xB: 0xE}
"""Of each edge, another one that the stream has too and that means nothing."""


def packed(*fields: tuple[int, int]) -> int:
    """(value, bits) from bit 63 down, as manuals draw a packet."""
    word = 0
    for value, bits in fields:
        assert 0 <= value < 1 << bits
        word = word << bits | value
    assert sum(bits for _, bits in fields) == 64
    return word


def pixel(ns: Fraction, column: int, row: int) -> int:
    """A hit: its coarse time is the clock's next tick of 25 ns, less the fine time in 1/16 of it."""
    sixteenths = int(ns * 16 / 25)
    ticks = (sixteenths + 15) // 16
    address = (column // 2, 7), (row // 4, 6), (2 * 2 * (column % 2) + row % 4, 3)
    spidr, toa = ticks // 2**14 % 2**16, ticks % 2**14
    return packed((0xB, 4), *address, (toa, 14), (9, 10), (16 * ticks - sixteenths, 4), (spidr, 16))


def tdc(ns: Fraction, count: int, edge: int = 0xF) -> int:
    ticks, rest = divmod(ns, Fraction(25, 8))
    return packed((0x6, 4), (edge, 4), (count % 4096, 12), (ticks % 2**35, 35), (1 + int(rest * 96 / 25), 4), (0, 5))


def global_low(ns: int) -> int:
    return packed((0x44, 8), (0, 8), (ns // 25 % 2**32, 32), (0, 16))


def chunk(chip: int, words: list[int]) -> bytes:
    head = packed((8 * len(words), 16), (0, 8), (chip, 8), (int.from_bytes(b"TPX3", "little"), 32))
    return np.array([head, *words], "<u8").tobytes()


def sidecar(path: Path, **changes: Any) -> Path:
    said = {"scan_shape": [ROWS, COLUMNS], "dwell_ns": DWELL_NS, "line_trigger": "tdc1 rising", **changes}
    path.with_suffix(".json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return path


def where(chip: int, column: int, row: int, gap: int) -> tuple[int, int]:
    """(y, x) in the frame of four chips, drawn as 3 0 above 2 1, the lower ones upside down."""
    side = 256 + gap
    return {
        3: (row, column),
        0: (row, side + column),
        2: (side + 255 - row, 255 - column),
        1: (side + 255 - row, side + 255 - column),
    }[chip]


def stream(
    path: Path,
    begin_ns: Fraction = Fraction(1000),
    *,
    edge: int = 0xF,
    gap: int = 0,
    delay_ns: int = 0,
    seed: int = 0,
    hits: int = 900,
    of_a_chunk: int = 50,
    shuffled: bool = True,
) -> np.ndarray:
    """Write hits at random times, of before the scan to after it; returns the frames that they make."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((ROWS * COLUMNS, 512 + gap, 512 + gap), np.uint32)
    packets: list[list[tuple[Fraction, int]]] = [[] for _ in range(4)]
    for line in range(ROWS):
        trigger = begin_ns + line * LINE_NS
        # 25/96 ns apart, in which the fine time counts
        packets[line % 2].append((trigger, tdc(trigger, line, edge)))
        packets[3].append((trigger + 40, tdc(trigger + 40, line, OTHER[edge])))
    for since in rng.integers(-5000, ROWS * LINE_NS + 5000, hits).tolist():
        chip, column, row = rng.integers(0, [4, 256, 256]).tolist()
        # on the pixels' clock of 25/16 ns, as it is delivered
        time = Fraction(int((begin_ns + since) * 16 / 25)) * 25 / 16
        packets[chip].append((time, pixel(time, column, row)))
        line, within = divmod(time - begin_ns - delay_ns, LINE_NS)
        if 0 <= line < ROWS and within < COLUMNS * DWELL_NS:
            frames[(line * COLUMNS + int(within // DWELL_NS), *where(chip, column, row, gap))] += 1
    after = int(begin_ns) + ROWS * LINE_NS + 6000
    chunks = []
    for chip, found in enumerate(packets):
        words = [word for _, word in sorted(found)]
        words = [*words, global_low(after)] if chip % 2 else [*words, END]
        for i in range(0, len(words) - 2, 2) if shuffled else ():  # neighbours change places
            words[i], words[i + 1] = words[i + 1], words[i]
        chunks += [(i, chunk(chip, words[i : i + of_a_chunk])) for i in range(0, len(words), of_a_chunk)]
    if shuffled:
        rng.shuffle(chunks)
    chunks.sort(key=lambda c: c[0] // (3 * of_a_chunk if shuffled else 1))  # in any order within a bound, or in theirs
    path.write_bytes(b"".join(data for _, data in chunks))
    return frames


def opened(path: Path) -> Tpx3Source:
    source = Tpx3().open(os.fspath(path))
    assert isinstance(source, Tpx3Source)
    assert isinstance(source, SparseSource)
    return source


def read(path: Path, step: int = ROWS * COLUMNS) -> np.ndarray:
    source = opened(path)
    out = np.full((source.header.frames, *source.header.det_shape), 77, np.uint32)
    for start in range(0, len(out), step):
        stop = min(len(out), start + step)
        source.frames(start, stop, out[start:stop])
    source.complete()
    source.close()
    return out


@pytest.mark.parametrize("begin_s", ["0.00001", "26.8435456", "107.37418", "107.3741824", "80.53061"])
@pytest.mark.parametrize("fine", [0, 7])
def test_hits_by_their_own_times_over_every_clocks_end(tmp_path: Path, begin_s: str, fine: int) -> None:
    """The pixels' clock begins anew after 26.8 s, the TDC's and the global one after four times that."""
    begin = Fraction(begin_s) * 10**9 + 24_000 * (begin_s[0] == "0") - Fraction(7, 1) * (begin_s[0] != "0")
    begin = Fraction(int(begin * 96 / 25)) * 25 / 96 + Fraction(25, 96) * fine
    path = sidecar(tmp_path / "a.tpx3")
    wanted = stream(path, begin)
    np.testing.assert_array_equal(read(path), wanted)
    assert wanted.sum() > 600


@pytest.mark.parametrize("piece_bytes", [1 << 9, 1 << 11])
@pytest.mark.parametrize("step", [1, 5])
def test_pieces_of_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, step: int) -> None:
    monkeypatch.setattr(tpx3_scan, "PIECE_BYTES", piece_bytes)
    path = sidecar(tmp_path / "a.tpx3")
    wanted = stream(path, Fraction(26_843_530_000), seed=1)
    np.testing.assert_array_equal(read(path, step), wanted)
    source = opened(path)
    events = source.events(3, 9)
    assert events.counts is None
    for i, frame in enumerate(wanted[3:9]):
        pixels = events.indices[events.bounds[i] : events.bounds[i + 1]]
        np.testing.assert_array_equal(np.bincount(pixels, minlength=frame.size), frame.reshape(-1))
    assert source.events(4, 4).bounds.tolist() == [0]
    source.close()


@pytest.mark.parametrize(("name", "edge"), [("tdc1 falling", 0xA), ("tdc2 rising", 0xE), ("tdc2 falling", 0xB)])
def test_each_edge_of_the_inputs(tmp_path: Path, name: str, edge: int) -> None:
    path = sidecar(tmp_path / "a.tpx3", line_trigger=name)
    wanted = stream(path, Fraction(50_000), edge=edge)
    np.testing.assert_array_equal(read(path), wanted)
    sidecar(path)
    with pytest.raises(Incomplete, match=r"0 of 4 lines have their trigger \(tdc1 rising\)") as caught:
        Tpx3().open(os.fspath(path))
    assert caught.value.frame == 0


def test_a_gap_between_the_chips_and_a_delay_of_the_line(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "a.tpx3", gap=5, line_delay_ns=700)
    wanted = stream(path, Fraction(50_000), gap=5, delay_ns=700)
    np.testing.assert_array_equal(read(path), wanted)


def test_lines_of_before_and_after(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "a.tpx3", scan_shape=[2, COLUMNS])
    wanted = stream(path, Fraction(50_000))
    with pytest.raises(FormatError, match=r"4 triggers .* for 2 lines"):
        Tpx3().open(os.fspath(path))
    sidecar(path, scan_shape=[2, COLUMNS], first_line=1)
    np.testing.assert_array_equal(read(path), wanted[COLUMNS : 3 * COLUMNS])
    sidecar(path, first_line=2)
    with pytest.raises(Incomplete, match="2 of 4 lines") as caught:
        Tpx3().open(os.fspath(path))
    assert caught.value.frame == 2 * COLUMNS


def test_a_trigger_that_several_chips_report_counts_once(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "a.tpx3", chips=1, scan_shape=[2, 2])
    words = [tdc(Fraction(1000), 0), tdc(Fraction(1000), 0), pixel(Fraction(1100), 3, 200)]
    words += [tdc(Fraction(9000), 1), pixel(Fraction(12_999), 255, 0), pixel(Fraction(13_000), 7, 7), END]
    path.write_bytes(chunk(0, words[:1]) + chunk(0, words[1:]))
    out = read(path, 4)
    assert np.argwhere(out).tolist() == [[0, 200, 3], [3, 0, 255]]


def test_terms_are_summed_from_the_events(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "a.tpx3")
    wanted = stream(path, Fraction(50_000)).astype(np.int64)
    source = opened(path)
    fused = SparseFused([Sum(), Moments()], source.header, len(wanted))
    for start in range(0, len(wanted), 7):
        fused.add(source.events(start, min(len(wanted), start + 7)), start)
    source.close()
    merged = fused.merge(Ranks())
    assert merged is not None
    total, moments = (*merged.values(), *fused.rows(len(wanted)).values())
    y, x = np.indices(wanted.shape[1:])
    np.testing.assert_array_equal(total, wanted.sum(axis=0))
    np.testing.assert_array_equal(moments, np.stack([(wanted * w).sum(axis=(1, 2)) for w in (1, y, x)], axis=1))


def test_no_sidecar_says_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a.tpx3"
    stream(path)
    with pytest.raises(Incomplete, match=r"what scan.*line_trigger"):
        Tpx3().probe(os.fspath(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dwell": 1}, "unknown key 'dwell'"),
        ({"dwell_ns": None}, "dwell_ns is 0"),
        ({"dwell_ns": "2 us"}, "dwell_ns is '2 us'"),
        ({"dwell_ns": float("nan")}, "dwell_ns is nan"),
        ({"scan_shape": [24]}, "scan_shape is"),
        ({"scan_shape": [4, -6]}, "scan_shape is"),
        ({"line_trigger": "tdc3 rising"}, "line_trigger is 'tdc3 rising'"),
        ({"chips": 2}, "chips is 2"),
        ({"chips": 1}, "hits of chips"),
        ({"gap": 65}, "gap is 65"),
        ({"first_line": True}, "first_line is True"),
        ({"dwell_ns": 4000}, "less than 6 positions take"),
    ],
)
def test_sidecars_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = sidecar(tmp_path / "a.tpx3", **changes)
    stream(path)
    with pytest.raises(FormatError, match=words):
        Tpx3().open(os.fspath(path))


def _counting(data: bytes) -> bytes:
    return data + chunk(0, [0xA << 60])


def _no_chunk(data: bytes) -> bytes:
    return data[:8] + bytes(8) + data[8:]


def _uneven(data: bytes) -> bytes:
    return data[:6] + b"\x09\0" + data[8:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_counting, "counting mode"),
        (_no_chunk, "no chunk of Timepix3 packets begins at byte"),
        (_uneven, "begins at byte 0"),
    ],
)
def test_streams_that_are_refused(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    path = sidecar(tmp_path / "a.tpx3")
    stream(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=words):
        Tpx3().open(os.fspath(path))
    path.write_bytes(b"TPX2" + path.read_bytes()[4:])
    with pytest.raises(NotThisFormat):
        Tpx3().probe(os.fspath(path))


def test_a_stream_cut_off_between_chunks_is_incomplete(tmp_path: Path) -> None:
    """Wherever it is cut, no frame loses a hit in silence, where each chip's chunks come in their order."""
    path = sidecar(tmp_path / "a.tpx3")
    wanted = stream(path, shuffled=False)
    data, at, whole = path.read_bytes(), 0, []
    while at < len(data):
        whole.append(at)
        at += 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    refused: list[int | None] = []
    for length in whole[1:]:
        path.write_bytes(data[:length])
        try:
            np.testing.assert_array_equal(read(path), wanted)
        except Incomplete as error:
            refused.append(error.frame)
    assert len(refused) > len(whole) // 2
    assert None not in refused
    path.write_bytes(data[: whole[-1] + 8])
    with pytest.raises(Incomplete, match="within a chunk"):
        Tpx3().probe(os.fspath(path))


def test_the_end_of_a_long_stream_is_looked_at_alone(tmp_path: Path) -> None:
    """A hit near the end that looks like the begin of a chunk does not mislead; the last chunk is followed."""
    path = sidecar(tmp_path / "a.tpx3")
    stream(path)
    data = path.read_bytes()
    false = 0xB << 60 | 0x33585054
    padding = chunk(0, [pixel(Fraction(60_000), 1, 1)] * 7000 + [false] + [pixel(Fraction(60_000), 1, 1)] * 900) * 5
    path.write_bytes(data + padding)
    assert Tpx3().probe(os.fspath(path)).frames == ROWS * COLUMNS
    path.write_bytes((data + padding)[:-8])
    with pytest.raises(KernelError, match=r"within a chunk|no chunk"):
        Tpx3().probe(os.fspath(path))


def test_a_stream_that_changes_while_it_is_open(tmp_path: Path) -> None:
    path = sidecar(tmp_path / "a.tpx3")
    stream(path)
    source = opened(path)
    os.truncate(path, path.stat().st_size - 16)
    with pytest.raises(MissingData) as caught:
        source.events(5, 7)
    assert caught.value.frame == 5
    with pytest.raises(MissingData):
        source.complete()
    with pytest.raises(ValueError, match="are not within"):
        source.events(0, ROWS * COLUMNS + 1)
    source.close()
