"""A run folder through one attempt without MPI: claim, result, commit, errors, quality."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpi_kernels import failure, job, jsonfile, preview
from mpi_kernels.contract import ErrorRecord, JobSpec, Recipe, ReductionSpec, ResultManifest, SourceSpec
from mpi_kernels.errors import FormatError, KernelError, MissingData, RecipeError
from mpi_kernels.events import read_events
from mpi_kernels.ranks import Ranks

USES = ("virtual_image:VirtualImage", "pattern:Pattern", "centre_of_mass:CentreOfMass", "image:Image")


def run_folder(tmp_path: Path, data: np.ndarray, **changes: Any) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    np.save(tmp_path / "a.npy", data)
    reductions = tuple(ReductionSpec(use=f"mpi_kernels.reductions.{u}", name=u.partition(":")[0]) for u in USES)
    facts: dict[str, Any] = {
        "job": "0123456789abcdef-07",
        "acquisition": "0123456789abcdef",
        "trace": "t",
        "recipe": Recipe(name="r", reductions=reductions),
        "source": SourceSpec(path=str(tmp_path / "a.npy"), format="mpi_kernels.formats.npy:Npy"),
    }
    (folder / "job.json").write_bytes(jsonfile.encode(JobSpec(**facts | changes)))
    return folder


def test_the_manifest_is_the_commit(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, np.arange(2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5))
    manifest = job.run(folder, Ranks())
    assert manifest == jsonfile.read(ResultManifest, folder / "result.json")
    assert manifest is not None
    assert manifest.result_sha256 == hashlib.sha256((folder / "result.h5").read_bytes()).hexdigest()
    assert (manifest.frames, manifest.coverage, manifest.quality, manifest.skipped) == (6, 1.0, "OK", ("image",))
    assert set(manifest.seconds) >= {"read", "reduce", "merge", "write", "total"}
    with h5py.File(folder / "result.h5") as file:
        for path in manifest.outputs:
            assert file[path]["data"].shape in ((2, 3), (4, 5))
    names = {p.name for p in folder.iterdir() if not p.name.startswith("events-")}
    assert names == {"job.json", "claim", "heartbeat", "result.h5", "result.json", "preview.png"}
    (log,) = folder.glob("events-*.jsonl")
    wanted = ["claimed", "preflight", "started", "reduced", "written"]
    assert [e.name for e in read_events(log) if e.name != "progress"] == wanted
    others = [p for p in folder.iterdir() if p != log]  # its last line, "written", is all that follows the commit
    assert max(p.stat().st_mtime_ns for p in others) == (folder / "result.json").stat().st_mtime_ns
    assert job.run(folder, Ranks()) is None


@pytest.mark.parametrize(
    ("data", "quality", "reason"),
    [
        (np.ones((3, 4, 4), np.uint8), "OK", ""),
        (np.zeros((3, 4, 4), np.uint8), "INVALID", "no frame has any count"),
        (np.full((3, 4, 4), np.nan, np.float32), "INVALID", "no pixel is finite"),
        (np.array([np.ones((4, 4)), np.zeros((4, 4))], np.uint8), "DOUBTFUL", "1 of 2 frames have no counts"),
        (np.array([[[255, 1], [1, 255]]] * 2, np.uint8), "DOUBTFUL", "4 of 8 pixels are at the top of uint8"),
        (np.array([[[1, np.nan], [1, np.inf]]] * 2), "DOUBTFUL", "4 of 8 pixels are not finite"),
        (np.array([[[1, -1], [2, -2]]] * 2, np.float32), "OK", ""),  # sums to 0, but is not empty
    ],
)
def test_quality(tmp_path: Path, data: np.ndarray, quality: str, reason: str) -> None:
    manifest = job.run(run_folder(tmp_path, data), Ranks())
    assert manifest is not None
    assert (manifest.quality, ", ".join(manifest.quality_reasons)) == (quality, reason)
    json.dumps(manifest.scalars, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "kind", "code", "retryable"),
    [
        ({"source": SourceSpec(path="/none", format="mpi_kernels.formats.npy:Npy")}, Exception, None, None),
        ({"source": SourceSpec(path="/none", format="none:None_")}, RecipeError, "recipe", False),
        ({"recipe": Recipe(name="r", reductions=())}, RecipeError, "recipe", False),
        ({"job": "../../etc"}, FormatError, "format", False),
    ],
)
def test_errors_are_recorded_once(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], code: str | None, retryable: bool | None
) -> None:
    folder = run_folder(tmp_path, np.zeros((2, 2, 2), np.uint8), **changes)
    with pytest.raises(kind):
        job.run(folder, Ranks())
    record = jsonfile.read(ErrorRecord, folder / "error.json")
    if code:
        assert (record.code, record.retryable) == (code, retryable)
    assert record.message
    assert record.traceback
    assert not (folder / "result.json").exists()
    assert not failure.record(folder, record)  # the first word stands


def test_a_short_file_names_file_and_frame(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, np.ones((9, 8, 8), np.uint8))
    path = tmp_path / "a.npy"
    os.truncate(path, path.stat().st_size - 130)
    with pytest.raises(KernelError):
        job.run(folder, Ranks())
    record = jsonfile.read(ErrorRecord, folder / "error.json")
    assert record.path == str(path)
    assert record.code in ("missing-data", "incomplete")


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no-space", True),
        (OSError(errno.EIO, "Input/output error", "x"), "io", True),
        (PermissionError(errno.EACCES, "denied", b"\xff"), "permission", False),
        (MemoryError(), "memory", True),
        (ZeroDivisionError("x"), "unexpected", False),
        (KeyboardInterrupt(), "stopped", True),
        (MissingData("short", path="a", frame=3), "missing-data", False),
        (MissingData("short", path=b"\xff", frame=np.int64(3)), "missing-data", False),  # type: ignore[arg-type]
    ],
)
def test_what_each_error_is_called(error: BaseException, code: str, retryable: bool) -> None:
    record = failure.describe(error, job="j", rank=2)
    assert (record.code, record.retryable, record.rank) == (code, retryable, 2)
    assert jsonfile.decode(ErrorRecord, jsonfile.encode(record)) == record


def test_hostile_text_is_one_line() -> None:
    text = failure.one_line(MissingData("a\nb\x1b[31m", path="c\n\udcff"))
    assert "\n" not in text
    assert text.isprintable()


def test_publish_once_keeps_the_first(tmp_path: Path) -> None:
    assert failure.publish_once(tmp_path / "x", b"1")
    assert not failure.publish_once(tmp_path / "x", b"2")
    assert not failure.create(tmp_path / "x", b"3")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"1"]


def test_preview_is_a_png_of_every_map() -> None:
    maps = [
        ("flat", np.zeros((3, 4))),
        ("nan", np.full((2, 2), np.nan)),
        ("wide", np.random.default_rng(0).random((1, 500))),
        ("int", np.arange(12, dtype=np.uint64).reshape(3, 4)),
        ("curve", np.arange(7.0)),
        ("deep", np.zeros((2, 2, 2))),
        ("huge", np.array([[1e308, -1e308]])),
    ]
    data = preview.contact_sheet(maps)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"flat, nan, wide, int, curve, huge" in data
    at, pixels, size = 8, b"", (0, 0)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + length : at + 12 + length])
        if kind == b"IHDR":
            size = int.from_bytes(body[:4]), int.from_bytes(body[4:8])
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    grey = np.frombuffer(zlib.decompress(pixels), np.uint8).reshape(size[1], size[0] + 1)[:, 1:]
    assert size == (3 * (preview.TILE + preview.GAP) + preview.GAP, 2 * (preview.TILE + preview.GAP) + preview.GAP)
    integers = grey[preview.GAP + preview.TILE + preview.GAP :, preview.GAP :][: preview.TILE, : preview.TILE]
    assert integers.max() == 255  # the ramp of "int" goes from black to white


def test_preview_of_nothing_is_still_a_png() -> None:
    assert preview.contact_sheet([]).startswith(b"\x89PNG")
