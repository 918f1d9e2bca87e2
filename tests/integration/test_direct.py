"""``emflow reduce``: one file where it lies, with the same numbers as through the service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow.direct import output_path, reduce_file
from emflow.errors import UsageError
from emflow.recipes import load_recipe
from emflow.synthetic import ExactScan
from emflow.synthetic_vendor import write_zarr
from mpi_kernels.errors import FormatError, Incomplete, KernelError

GOOD = np.arange(4 * 5 * 8 * 9, dtype=np.uint16).reshape(4, 5, 8, 9)


@pytest.fixture
def quick():
    return load_recipe("quick", relative_to=Path())


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    np.save(tmp_path / "scan.npy", GOOD)
    return tmp_path / "scan.npy"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; empty afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def sums(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file["pattern/sum/data"])


def test_one_rank(tmp_path: Path, scan: Path, quick, scratch: Path) -> None:
    before = scan.stat()
    manifest = reduce_file(scan, quick, tmp_path / "out" / "r.h5")
    assert (manifest.frames, manifest.ranks) == (20, 1)
    assert np.array_equal(sums(tmp_path / "out" / "r.h5"), GOOD.sum(axis=(0, 1)))
    assert (tmp_path / "out" / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["r.h5", "r.png"]
    assert list(scratch.iterdir()) == []
    after = scan.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


@pytest.mark.needs_mpi
def test_ranks_agree(tmp_path: Path, scan: Path, quick) -> None:
    manifest = reduce_file(scan, quick, tmp_path / "r.h5", ranks=2)
    assert manifest.ranks == 2
    assert np.array_equal(sums(tmp_path / "r.h5"), GOOD.sum(axis=(0, 1)))


def test_a_scan_shape_that_the_file_does_not_say(tmp_path: Path, quick) -> None:
    np.save(tmp_path / "stack.npy", GOOD.reshape(20, 8, 9))
    reduce_file(tmp_path / "stack.npy", quick, tmp_path / "r.h5", scan_shape=(4, 5))
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["bright_field/image/data"].shape == (4, 5)
    with pytest.raises(KernelError, match="20"):
        reduce_file(tmp_path / "stack.npy", quick, tmp_path / "r2.h5", scan_shape=(4, 6))
    assert not (tmp_path / "r2.h5").exists()


def test_what_is_wrong_with_a_file_is_told_and_nothing_is_written(tmp_path: Path, scan: Path, quick, scratch) -> None:
    os.truncate(scan, scan.stat().st_size - 1)
    with pytest.raises(Incomplete, match="frame 19"):
        reduce_file(scan, quick, tmp_path / "r.h5")
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    with pytest.raises(FormatError):
        reduce_file(tmp_path / "bad.npy", quick, tmp_path / "r.h5")
    with pytest.raises(KernelError):
        reduce_file(tmp_path / "missing.npy", quick, tmp_path / "r.h5")
    assert not (tmp_path / "r.h5").exists()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("how", ["itself", "link"])
def test_the_input_is_never_replaced(tmp_path: Path, scan: Path, quick, how: str) -> None:
    before = scan.read_bytes()
    target = scan
    if how == "link":
        target = tmp_path / "link.h5"
        target.symlink_to(scan)
    with pytest.raises(UsageError, match="replace the input"):
        reduce_file(scan, quick, target)
    assert scan.read_bytes() == before


def test_an_older_result_stays_until_the_new_one_is_whole(tmp_path: Path, scan: Path, quick) -> None:
    (tmp_path / "r.h5").write_text("older")
    with pytest.raises(KernelError):
        reduce_file(scan, quick, tmp_path / "r.h5", scan_shape=(3, 3))
    assert (tmp_path / "r.h5").read_text() == "older"
    reduce_file(scan, quick, tmp_path / "r.h5")
    assert sums(tmp_path / "r.h5").sum() == GOOD.sum()


def test_hostile_names(tmp_path: Path, quick) -> None:
    folder = tmp_path / os.fsdecode(b"$(touch pwned)\n\xff")
    folder.mkdir()
    path = folder / os.fsdecode(b"-rf '\xfe.npy")
    np.save(path, GOOD)
    reduce_file(path, quick, output_path(path, folder))
    assert len(list(folder.glob("*_emflow.h5"))) == 1
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("scan.npy", "scan_emflow.h5"),
        ("a.b.mib", "a.b_emflow.h5"),
        ("noend", "noend_emflow.h5"),
        ("x" * 251 + ".npy", "x" * 245 + "_emflow.h5"),
    ],
)
def test_names_of_results(tmp_path: Path, name: str, made: str) -> None:
    found = output_path(Path("/data") / name, tmp_path)
    assert found.parent == tmp_path
    assert found.name == made
    found.touch()  # not longer than a file system allows


def test_a_long_name_that_is_not_ascii_still_fits(tmp_path: Path) -> None:
    output_path(Path("/data") / ("ä" * 125 + ".npy"), tmp_path).touch()


@pytest.mark.needs_mpi
@pytest.mark.parametrize(
    ("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM), (1, signal.SIGHUP)]
)
def test_interrupted_it_ends_all_its_processes_and_cleans_up(
    tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint16, shape=(128, 128, 128, 128)).flush()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "emflow", "reduce", "big.npy", "-n", str(ranks)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 30
    while not list(scratch.glob("emflow-*/**/claim")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # another one does not cut the cleaning short
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130, said
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "big_emflow.h5").exists()
    left = [p for p in Path("/proc").glob("[0-9]*") if os.fsencode(scratch) in _command(p)]
    assert left == []


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert output_path(Path("a.npy"), tmp_path / "new", folder=True) == tmp_path / "new" / "a_emflow.h5"
    assert output_path(Path("a.npy"), tmp_path / "new") == tmp_path / "new"


def test_a_folder_that_is_an_acquisition(tmp_path: Path, quick, scratch: Path) -> None:
    scan = ExactScan((3, 4), (8, 9), "uint16")
    folder = write_zarr(scan, tmp_path / "scan.zarr", (2, 2, 8, 9))
    manifest = reduce_file(folder, quick, tmp_path / "out.h5")
    assert manifest.frames == 12
    np.testing.assert_array_equal(sums(tmp_path / "out.h5"), scan.frames(0, 12).sum(axis=0, dtype=np.int64))
    (folder / "1.1.0.0").unlink()
    with pytest.raises(Incomplete, match="chunk") as caught:
        reduce_file(folder, quick, tmp_path / "again.h5")
    assert caught.value.frame == 10
    assert not list(scratch.iterdir())
    with pytest.raises(FormatError, match="folder"):
        reduce_file(tmp_path, quick, tmp_path / "no.h5")
