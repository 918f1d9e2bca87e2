"""What would make a job fail late, or wrong, fails at once, and names the node and the way out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mpi_kernels
from mpi_kernels.contract import Method
from mpi_kernels.events import host_name, read_events

pytestmark = pytest.mark.needs_mpi

NPY = "mpi_kernels.formats.npy:Npy"
ALLOCATION = {"SLURM_JOB_ID": "7"}
ALONE = 'exec unshare -m bash -c \'mount -t tmpfs none "$1" && shift && exec "$@"\' -'
"""A shell's way to run a program that sees an empty folder where the others see what is there."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "scan.npy", np.random.default_rng(5).poisson(4, (6, 7, 24, 20)).astype("<u2"))
    return tmp_path / "scan.npy"


@pytest.fixture
def altered(tmp_path: Path) -> Any:
    """Another installation of the kernels, in which one line of one module is another."""

    def make(module: str, old: str, new: str) -> str:
        package = tmp_path / "altered" / "mpi_kernels"
        shutil.copytree(Path(mpi_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        text = (package / module).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (package / module).write_text(text.replace(old, new), encoding="utf-8")
        return str(package.parent)

    return make


def preflight(folder: Path) -> dict[str, Any]:
    events = [e for path in folder.glob("events-*.jsonl") for e in read_events(path)]
    return next(e.attrs for e in events if e.name == "preflight")


def error_of(folder: Path) -> dict[str, Any]:
    assert not (folder / "result.json").exists()
    found: dict[str, Any] = json.loads((folder / "error.json").read_text())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["auto", "numpy"])
def test_the_first_job_of_an_allocation_is_proven(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, source: Path, ranks: int, kernel: str
) -> None:
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=ranks, method=Method(kernel=kernel))
    done = kernels.launch(mpiexec, ranks, "-m", "mpi_kernels", folder, env=ALLOCATION)
    assert done.returncode == 0, done.stderr
    looked = preflight(folder)
    between = ["folder", "clock"] if ranks > 1 else []
    assert looked["checked"] == ["ranks", *between, "space", "golden"]
    assert looked["warnings"] == []
    assert looked["golden"].startswith(f"<u2 cpu {kernel} ")
    assert json.loads((folder / "result.json").read_text())["method"]["golden"] == looked["golden"]


def test_a_job_without_an_allocation_pays_nothing_for_known_frames(
    kernels: SimpleNamespace, tmp_path: Path, source: Path
) -> None:
    folder = kernels.folder(tmp_path / "run", source, NPY)
    assert kernels.launch(None, 1, "-m", "mpi_kernels", folder).returncode == 0
    assert preflight(folder)["checked"] == ["ranks", "space"]
    assert "golden" not in json.loads((folder / "result.json").read_text())["method"]


def test_each_path_is_proven_once(kernels: SimpleNamespace, tmp_path: Path, source: Path) -> None:
    folders = [kernels.folder(tmp_path / str(i), source, NPY, method=Method(threads=1 + i // 2)) for i in range(3)]
    code = "import sys; from pathlib import Path; from mpi_kernels import job, preflight, ranks\n"
    code += "for f in sys.argv[1:]: job.run(Path(f), ranks.Ranks()); print(len(preflight._DONE))"
    done = kernels.launch(None, 1, "-c", code, *folders, env=ALLOCATION)
    assert done.stdout.split() == ["1", "1", "2"], done.stderr
    assert all("golden" in preflight(folder)["checked"] for folder in folders)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("kernel", "module", "old", "new"),
    [
        (
            "auto",
            "compiled.py",
            "        self.native.flush()\n",
            "        self.native.flush()\n        self._max += {}\n",
        ),
        ("numpy", "fused.py", "flat = frames.reshape(len(frames), -1)", "flat = frames.reshape(len(frames), -1) + {}"),
    ],
    ids=["compiled", "numpy"],
)
def test_wrong_arithmetic_publishes_nothing_and_names_the_node(
    kernels: SimpleNamespace,
    mpiexec: str,
    tmp_path: Path,
    source: Path,
    altered: Any,
    rank: str,
    kernel: str,
    module: str,
    old: str,
    new: str,
) -> None:
    where = altered(module, old, new.format(f"(__import__('os').environ['PMI_RANK'] == '{rank}')"))
    path = f"{where}:{kernels.here / 'mpi'}"
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=2, method=Method(kernel=kernel))
    done = kernels.launch(mpiexec, 2, "-m", "mpi_kernels", folder, env=ALLOCATION | {"PYTHONPATH": path}, cwd=tmp_path)
    assert done.returncode == 1
    error = error_of(folder)
    assert (error["code"], error["retryable"]) == ("golden", False)
    assert f"node {host_name()} computes known frames wrong (kernel " in error["message"]
    assert ("numpy" in error["message"]) == (kernel == "numpy")
    assert "--selftest" in error["next_step"]
    if (kernel, rank) == ("auto", "1"):  # the longer test sees it too
        again = kernels.launch(mpiexec, 2, "-m", "mpi_kernels", "--selftest", env={"PYTHONPATH": path}, cwd=tmp_path)
        assert again.returncode == 1
        assert "WRONG" in again.stdout


def test_a_wrong_merge_is_not_laid_at_the_door_of_a_node(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, source: Path, altered: Any
) -> None:
    old = "        merged = array.copy()\n        self._comm.Reduce("
    where = altered("ranks.py", old, "        merged = array.copy() + array.dtype.type(1)\n        self._comm.Reduce(")
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=2)
    done = kernels.launch(mpiexec, 2, "-m", "mpi_kernels", folder, env=ALLOCATION | {"PYTHONPATH": where}, cwd=tmp_path)
    assert done.returncode == 1
    assert "each node is right alone, but what MPI merges of 2 ranks is wrong" in error_of(folder)["message"]


@pytest.mark.needs_root
@pytest.mark.parametrize("other", [False, True], ids=["nothing", "another folder"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_node_without_the_run_folder_is_named(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, source: Path, other: bool, ranks: int
) -> None:
    folder = kernels.folder(tmp_path / "runs" / "run", source, NPY, ranks=ranks)
    start = tmp_path / "start.sh"
    into = f"mkdir {folder} && echo '{{}}' > {folder}/claim && " if other else ""
    hidden = ALONE.replace("&& shift", f"&& {into} shift").replace("'$1'", str(folder.parent))
    start.write_text(f'#!/bin/bash\nif [ "$PMI_RANK" = 1 ]; then {hidden} {folder.parent} "$@"; fi\nexec "$@"\n')
    start.chmod(0o755)
    command = [mpiexec, "-n", str(ranks), str(start), sys.executable, "-m", "mpi_kernels", str(folder)]
    done = subprocess.run(command, env=kernels.environment(), capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode != 0
    error = error_of(folder)
    assert (error["code"], error["path"], error["rank"]) == ("preflight", str(folder), 0), done.stderr
    assert error["retryable"]
    sees = "sees another folder under the same path" if other else "does not see the run folder"
    assert error["message"].startswith(f"rank 1 on node {host_name()} {sees}")
    assert "mount the file system of the run folders under the same path" in error["next_step"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "emflow-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.needs_root
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_result_that_can_not_fit_is_not_begun(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, small_disk: Path, ranks: int
) -> None:
    np.save(tmp_path / "base.npy", np.ones((2, 4, 4), "<u2"))
    (tmp_path / "long.cycling").write_text(json.dumps({"frames": 100_000, "of": str(tmp_path / "base.npy")}))
    reductions = kernels.standard[:4]
    folder = kernels.folder(
        small_disk / "run", tmp_path / "long.cycling", "cycling:Cycling", ranks=ranks, reductions=reductions
    )
    done = kernels.launch(mpiexec, ranks, "-m", "mpi_kernels", folder)
    assert done.returncode == 1
    error = error_of(folder)
    assert (error["code"], error["retryable"], error["path"]) == ("no-space", True, str(folder))
    assert "MiB are free, and the result takes at least" in error["message"]
    assert not [e for path in folder.glob("events-*") for e in read_events(path) if e.name == "started"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_card_that_is_not_there_is_told_and_the_cpu_computes(
    kernels: SimpleNamespace, mpiexec: str, tmp_path: Path, source: Path, ranks: int
) -> None:
    folder = kernels.folder(tmp_path / "run", source, NPY, ranks=ranks, method=Method(device="gpu"))
    env = ALLOCATION | {"CUDA_VISIBLE_DEVICES": ""}
    assert kernels.launch(mpiexec, ranks, "-m", "mpi_kernels", folder, env=env).returncode == 0
    looked = preflight(folder)
    assert "card" in looked["checked"]
    assert [w.partition(":")[0] for w in looked["warnings"]] == [
        f"rank {rank} on {host_name()} computes on the CPU" for rank in range(ranks)
    ]
    method = json.loads((folder / "result.json").read_text())["method"]
    assert method["device"] == "cpu"
    assert "computes on the CPU" in method["preflight"]
