"""The benchmarks run, lose nothing and leave nothing; their figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._reduce import checks, peers, recipes, sets

ROOT = Path(__file__).resolve().parents[2]


def run(work: Path, *arguments: str) -> Any:
    out = work / "out.json"
    command = [sys.executable, "-m", "benchmarks", *arguments, "--work", str(work), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout)
    assert [p.name for p in work.iterdir()] == ["out.json"]
    return report


def test_detect_loses_nothing(tmp_path: Path) -> None:
    report = run(tmp_path, "detect", "--files", "10", "--recent", "0.1")
    assert report["machine"]["cores"] >= 1
    for mode in ("inotify", "scans only"):
        assert report["figures"][mode]["lost"] == 0
        assert report["figures"][mode]["journal_row"]["p50_ms"] > 0


def test_transfer_compares_both(tmp_path: Path) -> None:
    report = run(tmp_path, "transfer", "--mib", "2", "--rounds", "2")
    assert {len(v) for v in report["figures"]["seconds"].values()} == {2}
    assert report["figures"]["stage_over_cp"] > 0


@pytest.mark.needs_mpi
@pytest.mark.timeout(180)
def test_loop_comes_to_its_end_with_every_figure(tmp_path: Path) -> None:
    arguments = ("--seeds", "1", "--ungated-seeds", "1", "--faulty-seeds", "0", "--calls", "50", "--sets", "5")
    figures = run(tmp_path, "loop", *arguments)["figures"]
    assert set(figures["convergence"]) == set(figures["by_seed"]) - {"scrambled, gate", "scrambled, no gate"}
    for way, one in figures["convergence"].items():
        assert one["experiments"] == sum(one["endings"].values()) == 1
        (row,) = figures["by_seed"][way]
        assert one["both_within_5_nm"] == (max(row["residual_nm"].values()) <= 5)
        assert row["start_nm"]["C10"] >= 100
    made = figures["by_seed"]["gate"][0]["acquisitions"]
    latency = figures["last_byte_to_decision"]
    assert latency["acquisitions"] == made >= 2
    whole = latency["last_byte_to_decision"]["p50_ms"]
    assert 0 < latency["agent_result_visible_to_next_command"].get("p50_ms", 1) < whole
    assert all(step >= 0 for step in latency["steps_median_ms"].values())
    assert 0 < figures["rpc"]["status"]["p50_ms"] <= figures["rpc"]["status"]["p95_ms"]


@pytest.mark.needs_mpi
def test_reduce_compares_in_the_same_rounds(tmp_path: Path) -> None:
    """Results are checked by the benchmark itself, and a wrong one ends it.  LiberTEM takes minutes: not here."""
    groups = ("raw", "compressed", "whole", "growing")
    figures = run(tmp_path, "reduce", "--quick", "--peers", "h5py", "--rows", *groups)["figures"]
    rows = {row["row"]: row for row in figures["rows"]}
    fused = rows["raw uint16, fused"]
    assert fused["rounds"] >= 2
    assert {"kernels", "map limit"} <= set(fused["gigabytes_per_second"])
    assert fused["times_as_fast_as"]["map limit"] > 0
    assert [(asked["of"], asked["at least"]) for asked in fused["asked"]] == [("LiberTEM", 8), ("map limit", 0.85)]
    assert "h5py, reading alone" in rows["gzip chunk 1, fused"]["gigabytes_per_second"]
    assert rows["2 ranks"]["figures"]["ratio"] > 0
    assert rows["growing: last frame to result"]["figures"]["2 rank(s), ms"] > 0


def test_a_wrong_sum_ends_the_benchmark() -> None:
    counts = np.arange(12).reshape(3, 4)
    moved = counts[::-1].copy()
    wanted = checks.digest(counts)
    assert checks.differs(checks.digest(counts.astype(np.uint64)), wanted, relative=0) is None
    assert checks.differs(checks.digest(moved), wanted, relative=0) == "integers differ"
    assert checks.differs(checks.digest(moved.astype(np.float32)), wanted, relative=1e-4) is not None
    assert checks.differs(checks.digest(counts.astype(np.float32)), wanted, relative=1e-4) is None
    with pytest.raises(RuntimeError, match="kernels: sum: integers differ"):
        peers.check("kernels", {"sum": checks.digest(moved)}, {"sum": wanted}, relative=0)


@pytest.mark.parametrize(("name", "dtype"), [("A", np.uint16), ("C", np.float32)])
def test_what_a_set_must_sum_to(tmp_path: Path, name: str, dtype: type) -> None:
    """The truth, which follows from repeated groups, against plain sums over the file."""
    scan = sets.make(name, 0.005)
    path = tmp_path / "scan.npy"
    sets.npy(scan, path)
    data, found = np.load(path), sets.truth(scan)
    assert data.shape == scan.shape
    assert data.dtype == dtype
    exact = np.float64 if dtype is np.float32 else np.int64
    masks = np.einsum("yxij,kij->yxk", data.astype(exact), recipes.masks(scan.shape[2:]).astype(exact))
    y, x = np.indices(scan.shape[2:])
    total = data.sum(axis=(2, 3), dtype=exact)
    com = np.stack([np.einsum("yxij,ij->yx", data.astype(np.float64), axis) / total for axis in (y, x)], axis=-1)
    whole = {"sum": data.sum(axis=(0, 1), dtype=exact), "max": data.max(axis=(0, 1)), "masks 4": masks, "com": com}
    for output, array in whole.items():
        assert checks.differs(checks.digest(array), found[output], relative=0) is None, output


def test_an_unknown_name_lists_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nope"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "detect" in done.stderr


def test_gpu_says_why_it_has_no_figures_or_gives_them_all(tmp_path: Path) -> None:
    figures = run(tmp_path, "gpu", "--gigabytes", "0.3", "--rounds", "1", "--dtype", "uint16")["figures"]
    assert figures["why"]
    if figures["device"] is not None:
        assert set(figures["fused, uint16"]) == {"streamed", "of_the_link", "resident", "of_the_memory"}
