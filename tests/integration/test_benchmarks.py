"""The benchmarks run, lose nothing and leave nothing; their figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_an_unknown_name_lists_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nope"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "detect" in done.stderr
