"""Files of microscope makers: cut off at every byte, and with headers that were tampered with."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emflow.synthetic import ExactScan
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
)
from mpi_kernels.contract import Header
from mpi_kernels.errors import Incomplete, KernelError, NotThisFormat
from mpi_kernels.formats.blockfile import Blockfile
from mpi_kernels.formats.dm import Dm
from mpi_kernels.formats.mrc import Mrc
from mpi_kernels.formats.ndata import Ndata
from mpi_kernels.formats.nordif import Nordif
from mpi_kernels.formats.plan import offset
from mpi_kernels.formats.rsciio import Rsciio
from mpi_kernels.formats.seq import Seq
from mpi_kernels.formats.ser import Ser
from mpi_kernels.formats.tiff import Tiff
from mpi_kernels.formats.tvips import Tvips
from mpi_kernels.formats.velox import Velox
from mpi_kernels.protocols import Format

SCAN = ExactScan((2, 2), (3, 4), "uint16", seed=5)
STACK = ExactScan((4,), (3, 4), "uint16", seed=5)
BYTES = ExactScan((2, 2), (4, 4), "uint8", seed=5)
FLOATS = ExactScan((4,), (3, 4), "float32", seed=6)
IMAGEJ = "ImageJ=1.54f\nimages=4\n"
SHAPED = '{"shape": [4, 3, 4]}'

CASES: dict[str, tuple[Format, ExactScan, Callable[[Path], Path], int]] = {
    # the format, what is in the file, its writer, and how much of it is a header worth tampering with
    "blo": (Blockfile(), BYTES, lambda f: write_blo(BYTES, f / "a.blo"), 60),
    "dm3": (Dm(), STACK, lambda f: write_dm(STACK, f / "a.dm3", version=3, order=">"), 900),
    "dm4": (Dm(), SCAN, lambda f: write_dm(SCAN, f / "a.dm4"), 1600),
    "dm4-detector-first": (Dm(), SCAN, lambda f: write_dm(SCAN, f / "b.dm4", swapped=False), 1600),
    "mrc": (Mrc(), FLOATS, lambda f: write_mrc(FLOATS, f / "a.mrc", extended=16), 220),
    "mrc-big-endian": (Mrc(), STACK, lambda f: write_mrc(STACK, f / "a.mrcs", order=">"), 220),
    "de": (Mrc(), SCAN, lambda f: write_de(SCAN, f / "a_movie.mrc"), 220),
    "ndata": (Ndata(), SCAN, lambda f: write_ndata(SCAN, f / "a.ndata1"), 180),
    "ndata-zip64": (Ndata(), SCAN, lambda f: write_ndata(SCAN, f / "a.ndata1", zip64=True), 180),
    "nordif": (Nordif(), BYTES, lambda f: write_nordif(BYTES, f / "Pattern.dat"), 8),
    "ripple": (Rsciio(), STACK, lambda f: write_ripple(STACK, f / "a.rpl"), 120),
    "seq": (Seq(), STACK, lambda f: write_seq(STACK, f / "a.seq", version=4), 620),
    "seq-endless": (Seq(), STACK, lambda f: write_seq(STACK, f / "a.seq", version=4, announced=False), 620),
    "ser": (Ser(), STACK, lambda f: write_ser(STACK, f / "a_1.ser"), 220),
    "ser-narrow": (Ser(), SCAN, lambda f: write_ser(SCAN, f / "a.ser", wide=False), 220),
    "tiff": (Tiff(), STACK, lambda f: write_tiff(STACK, f / "a.tif", strips=3), 300),
    "tiff-big": (Tiff(), FLOATS, lambda f: write_tiff(FLOATS, f / "a.tif", order=">", big=True), 400),
    "tiff-imagej": (Tiff(), STACK, lambda f: write_tiff(STACK, f / "a.tif", description=IMAGEJ), 300),
    "tiff-shaped": (Tiff(), STACK, lambda f: write_tiff(STACK, f / "a.tif", description=SHAPED), 300),
    "tvips": (Tvips(), STACK, lambda f: write_tvips(STACK, f / "a_000.tvips"), 60),
    "tvips-1": (Tvips(), STACK, lambda f: write_tvips(STACK, f / "b_000.tvips", version=1, parts=(3,)), 60),
    "velox": (Velox(), STACK, lambda f: write_velox(STACK, f / "a.emd", chunk=(2, 4, 3)), 0),
}
RISING = ("seq-endless", "tiff", "tiff-big", "tvips", "tvips-1", "velox")
"""Nothing in them says how many frames there shall be: a shorter file may be a shorter stack."""

NAMING = ("blo", "mrc", "mrc-big-endian", "de", "ndata", "ndata-zip64", "nordif", "seq", "ser", "ser-narrow", "tvips")
"""Where a file that is cut off says which frame is the first missing one."""

every_case = pytest.mark.parametrize("case", CASES)


def read(known: Format, path: Path) -> tuple[Header, np.ndarray]:
    source = known.open(os.fspath(path))
    try:
        header = source.header
        if header.frames * np.prod(header.det_shape) > 1 << 20:
            raise Incomplete("too much for a test")  # what a header may claim is held against the file elsewhere
        out = np.full((header.frames, *header.det_shape), 77, header.dtype)
        source.frames(0, header.frames, out)
        source.complete()
    finally:
        source.close()
    return header, out


@every_case
def test_whole_files_are_read_exactly(case: str, tmp_path: Path) -> None:
    known, scan, write, _ = CASES[case]
    header, frames = read(known, write(tmp_path))
    np.testing.assert_array_equal(frames, scan.frames(0, scan.count))
    assert header.det_shape == scan.det_shape
    assert np.dtype(header.dtype) == scan.dtype


@every_case
def test_cut_off_at_every_byte(case: str, tmp_path: Path) -> None:
    known, scan, write, _ = CASES[case]
    path = write(tmp_path)
    data, whole = path.read_bytes(), scan.frames(0, scan.count)
    source = known.open(os.fspath(path))
    source.close()
    layout, named = source.layout, 0
    # every byte of small files; of larger ones every byte of both ends, and some hundred between
    step = max(1, len(data) // (40 if case == "velox" else 300))
    lengths = {*range(0, len(data), step), *range(len(data) - 40, len(data)), *range(min(130, len(data)))}
    for length in sorted(lengths if case != "velox" else range(0, len(data), step)):
        path.write_bytes(data[:length])
        try:
            header, frames = read(known, path)
        except KernelError as refused:
            error = refused
            assert not isinstance(error, NotThisFormat) or length < 12, f"{length}: {error}"
            if error.frame is not None and layout is not None and layout.file_of is None and case != "ripple":
                ends = [offset(layout, i) + layout.lead + layout.payload for i in range(scan.count)]
                there = sum(end <= length for end in ends)
                # a page of a TIFF file is there when its directory is, which stands behind its pixels
                exact = error.frame in (there, scan.count - 1) and not case.startswith("tiff")
                assert exact or error.frame <= there, f"{length}: {error}"
                named += exact
            continue
        assert case in RISING, f"{length} of {len(data)} bytes were called whole"
        assert header.rule == "stability"
        assert header.frames < scan.count
        np.testing.assert_array_equal(frames, whole[: header.frames])
    if case in NAMING:
        assert named > 20, "no refusal named a frame"


@every_case
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_tampered_headers_end_in_our_errors_and_little_memory(
    case: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    known, _, write, size = CASES[case]
    path = write(tmp_path_factory.mktemp("t"))
    content = bytearray(path.read_bytes())
    if size:
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(size, len(content)) - 1))
            new = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(_NASTY)))
            content[at : at + len(new)] = new
    else:
        at = data.draw(st.integers(0, len(content) - 8))
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read(known, path)
    except KernelError as refused:
        error = refused
        assert error.next_step or isinstance(error, NotThisFormat) or error.message == "too much for a test"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 48 << 20


_NASTY = [b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x01\x00\x00\x00", b"\x80"]
