"""What rank 0 makes of what the nodes say, and known frames as files hold them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from mpi_kernels import exact_files, preflight
from mpi_kernels.contract import JobSpec, Recipe, ReductionSpec, SourceSpec
from mpi_kernels.exact import ExactScan
from mpi_kernels.extension import native
from mpi_kernels.feed import Feed
from mpi_kernels.formats.npy import Npy
from mpi_kernels.formats.plan import LayoutSource
from mpi_kernels.plan import make
from mpi_kernels.preflight import Looked, NoRoom
from mpi_kernels.ranks import Ranks

S = 1_000_000_000


def said(node: str, told_ns: int, folder: str = "", **more: Any) -> dict[str, Any]:
    return {"node": node, "told_ns": told_ns, "folder": folder} | more


@pytest.mark.parametrize(
    ("of_b_ns", "told"),
    [
        (100 * S, []),
        (99 * S + 1, []),
        (95 * S, ["the clock of b is at least 5.0 s behind that of a"]),
        (101 * S, []),
        (103 * S, ["the clock of b is at least 2.5 s ahead of that of a"]),
    ],
)
def test_a_clock_is_told_only_if_no_delay_explains_it(of_b_ns: int, told: list[str]) -> None:
    """Rank 0 asked at 100 s and had all answers at 100.5 s: whatever lies between may be right."""
    looked = Looked()
    ranks = [said("a", 100 * S), said("b", of_b_ns), said("b", of_b_ns)]
    assert preflight._judged(ranks, 100 * S + S // 2, looked) == ""
    assert looked.warnings == told
    assert looked.checked == ["ranks", "folder", "clock"]


def test_nodes_that_do_not_see_the_folder_are_named() -> None:
    ranks = [said("a", 0), said("b", 0), *(said(f"c{i}", 0, "does not see it") for i in range(5))]
    told = preflight._judged(ranks, 0, Looked())
    assert told.split("; ") == [f"rank {2 + i} on node c{i} does not see it" for i in range(3)]


def test_a_claim_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "claim").write_bytes(b"another's")
    assert preflight._seen(tmp_path / "claim", b"another's") == ""
    monkeypatch.setattr(preflight, "VISIBLE_S", 0.1)
    before = time.monotonic()
    assert preflight._seen(tmp_path / "claim", b"mine") == "sees another folder under the same path"
    assert time.monotonic() - before >= 0.1
    assert preflight._seen(tmp_path / "no" / "claim", b"mine").startswith("does not see the run folder: No such file")
    assert preflight._seen(tmp_path / "late", b"mine").startswith("does not see late in it: No such file")


def test_room_is_asked_for_by_the_shapes_of_the_outputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), "<u2"))
    header = Npy().open(str(tmp_path / "a.npy")).header
    spec = ReductionSpec(use="mpi_kernels.reductions.centre_of_mass:CentreOfMass", name="com")
    preflight.room(tmp_path, make(Recipe(name="r", reductions=(spec,)), header))
    endless = make(Recipe(name="r", reductions=(spec,)), replace(header, scan_shape=(1 << 50,)))
    with pytest.raises(NoRoom, match=r"MiB are free, and the result takes at least \d{10,}") as caught:
        preflight.room(tmp_path, endless)
    assert (caught.value.code, caught.value.retryable) == ("no-space", True)


@pytest.mark.parametrize("stored", ["|u1", "<u2", ">u4", "<f4", "<f8"])
@pytest.mark.parametrize("codec", ["bitshuffle-lz4", "lz4"])
def test_the_filters_of_others_read_our_compressed_frames(tmp_path: Path, stored: str, codec: Any) -> None:
    scan = ExactScan((3, 4), (21, 18), np.dtype(stored).newbyteorder("=").name, seed=1)
    frames = scan.frames(0, scan.count)
    made = exact_files.records(scan, stored, codec)
    assert sum(map(len, made)) < frames.nbytes
    options = hdf5plugin.Bitshuffle() if codec == "bitshuffle-lz4" else hdf5plugin.LZ4()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("data", frames.shape, stored, chunks=(1, *frames.shape[1:]), **options)
        for i, record in enumerate(made):
            data.id.write_direct_chunk((i, 0, 0), record)
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["data"][()], frames)


@pytest.mark.needs_native
@pytest.mark.parametrize("size", [0, 1, 5, 12, 13, 17, 300, 512, 513, 70_000])
@pytest.mark.parametrize("what", ["zeros", "noise", "runs"])
def test_our_own_decoder_reads_blocks_of_any_length(size: int, what: str) -> None:
    noise = np.random.default_rng(size)
    data = {
        "zeros": np.zeros(size, np.uint8),
        "noise": noise.integers(0, 256, size, np.uint8),
        "runs": np.repeat(noise.integers(0, 256, size, np.uint8), noise.integers(1, 600, size))[:size],
    }[what]
    out = np.empty(size, np.uint8)
    native.decode("lz4", 1, exact_files.lz4(data.tobytes()), out)
    np.testing.assert_array_equal(out, data)


def job_of(recipe: Recipe) -> JobSpec:
    source = SourceSpec(path="/nowhere", format="m:F")
    return JobSpec(job="0123456789abcdef-01", acquisition="0123456789abcdef", trace="t", recipe=recipe, source=source)


@pytest.mark.needs_native
@pytest.mark.parametrize(
    ("stored", "codec", "use", "way"),
    [
        ("<u2", "", "reductions.centre_of_mass:CentreOfMass", "<u2 cpu auto auto 0 threads, whole"),
        (">u4", "", "reductions.centre_of_mass:CentreOfMass", ">u4 cpu auto auto 0 threads, whole"),
        ("<u2", "lz4", "reductions.centre_of_mass:CentreOfMass", "<u2 lz4 cpu auto auto 0 threads, whole"),
        (
            "<u4",
            "bitshuffle-lz4",
            "selftest:Brightest",
            "<u4 bitshuffle-lz4 cpu auto auto 0 threads, blocks of turned frames",
        ),
        ("|u1", "events", "reductions.centre_of_mass:CentreOfMass", "|u1 events cpu auto auto 0 threads, whole"),
        ("<u2", "gzip", "reductions.centre_of_mass:CentreOfMass", "<u2 cpu auto auto 0 threads, whole"),
        ("|i1", "", "reductions.centre_of_mass:CentreOfMass", "|i1 cpu auto auto 0 threads, whole"),
        ("<f8", "", "reductions.centre_of_mass:CentreOfMass", "<f8 cpu auto auto 0 threads, whole"),
        ("<i8", "", "reductions.centre_of_mass:CentreOfMass", "<i8 cpu auto auto 0 threads, whole"),
        ("<f2", "", "reductions.centre_of_mass:CentreOfMass", ""),
    ],
)
def test_the_path_of_a_job_is_the_one_that_is_proven(
    tmp_path: Path, stored: str, codec: str, use: str, way: str
) -> None:
    scan = ExactScan((3, 4), (21, 18), np.dtype(stored).newbyteorder("=").name, seed=1)
    packed: Any = codec if codec in ("lz4", "bitshuffle-lz4") else ""
    made = exact_files.records(scan, stored, packed)
    (tmp_path / "frames").write_bytes(bytes(exact_files.HEAD_BYTES) + b"".join(made))
    layout = exact_files.layout_of(made, str(tmp_path / "frames"), scan, stored, packed)
    header = exact_files.header_of(scan)
    source: Any = exact_files.DeflatedFrames(scan, stored) if codec == "gzip" else LayoutSource(header, layout)
    source = Feed(header, layout, reading="read") if packed else source
    source = exact_files.EventFrames(scan, layout) if codec == "events" else source
    recipe = Recipe(name="r", reductions=(ReductionSpec(use=f"mpi_kernels.{use}", name="it"),))
    preflight._DONE.clear()
    assert preflight.golden(job_of(recipe), source, make(recipe, header), Ranks()) == way
    assert ({(way, 1)} if way else set()) == preflight._DONE
    source.close()
