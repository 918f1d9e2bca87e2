"""What CONTRIBUTING.md and docs/how-to/reduction.md tell a newcomer to write does work, on one rank and on two."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import h5py
import numpy as np
import pytest

from emflow import registry
from mpi_kernels import jsonfile
from mpi_kernels.contract import JOB_FILE, RESULT_H5, JobSpec, Recipe, ReductionSpec, SourceSpec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
HOW_TO = ROOT / "docs" / "how-to" / "reduction.md"
IMPORTS = """
from collections.abc import Mapping
from dataclasses import dataclass
import numpy as np
from mpi_kernels.contract import Header
from mpi_kernels.protocols import Block, Output, Reduction
"""


@pytest.mark.needs_mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_reduction_of_the_page_computes(tmp_path: Path, mpiexec: str, ranks: int) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "newcomer.py").write_text(IMPORTS + example)
    rng = np.random.default_rng(1)
    frames = rng.poisson(0.5, (5, 7, 6, 9)).astype(np.uint16)
    np.save(tmp_path / "scan.npy", frames)
    acquisition = "0123456789abcdef"
    folder = tmp_path / "runs" / "2024-05-01" / acquisition / "01"
    folder.mkdir(parents=True)
    spec = JobSpec(
        job=f"{acquisition}-01",
        acquisition=acquisition,
        trace=acquisition,
        recipe=Recipe(name="newcomer", reductions=(ReductionSpec(use="newcomer:Coverage", name="coverage"),)),
        source=SourceSpec(path=str(tmp_path / "scan.npy"), format=registry.target("formats", "npy")),
        ranks=ranks,
    )
    jsonfile.publish(folder / JOB_FILE, jsonfile.encode(spec))
    start = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py"] if ranks > 1 else [sys.executable]
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    done = subprocess.run(
        [*start, "-m", "mpi_kernels", str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with h5py.File(folder / RESULT_H5) as result:
        np.testing.assert_array_equal(result["/coverage/pixels/data"][()], np.count_nonzero(frames, axis=(2, 3)))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, mpiexec: str) -> dict[str, Path]:
    """The page's files in a folder, and an environment over this one with its package in it, as pip leaves it."""
    folder = tmp_path_factory.mktemp("newcomer")
    module, scan, look, _ = blocks("python")
    (package,), (recipe,) = blocks("ini"), blocks("toml")
    for name, text in {"brightest.py": module, "scan.py": scan, "look.py": look, "spots.toml": recipe}.items():
        (folder / name).write_text(text)
    venv.create(folder / "env", symlinks=True, with_pip=False)
    python = folder / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    (packages / "beneath.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for library in Path(sys.prefix, "lib").glob("*"):  # mpi4py looks for its MPI there
        if not library.name.startswith("python"):
            (folder / "env" / "lib" / library.name).symlink_to(library)
    project = tomllib.loads(package)["project"]
    info = packages / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    for group, entries in project["entry-points"].items():
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    assert tomllib.loads(package)["tool"]["setuptools"]["py-modules"] == ["brightest"]
    (packages / "brightest.py").symlink_to(folder / "brightest.py")
    return {"folder": folder, "python": python, "launchers": Path(mpiexec).parent}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", HOW_TO.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def ran(newcomer: dict[str, Path], *arguments: str, folder: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(newcomer["launchers"]), os.environ["PATH"]])
    done = subprocess.run(
        [newcomer["python"], *arguments],
        cwd=folder or newcomer["folder"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.needs_mpi
def test_the_page_on_reductions_does_what_it_says(newcomer: dict[str, Path]) -> None:
    commands, said = blocks("bash"), blocks("text")
    (command,) = [c for c in commands if c.startswith("emflow ")]
    ran(newcomer, "scan.py")
    told = ran(newcomer, "-m", *shlex.split(command))
    took = re.compile(r"\S+_emflow|\d+\.\d+ s")
    assert took.sub("…", told) == took.sub("…", said[0])
    assert ran(newcomer, "look.py") == said[1]


@pytest.mark.needs_mpi
def test_the_contract_suite_takes_up_the_pages_reduction(newcomer: dict[str, Path]) -> None:
    (command,) = [c for c in blocks("bash") if "pytest" in c]
    python, *arguments = shlex.split(command)
    assert python == "python"
    told = ran(newcomer, *arguments, "-q", "-p", "no:cacheprovider", folder=ROOT)
    assert re.search(r"\d\d passed", told), told
