"""The benchmarks run, lose nothing and leave nothing; their figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
