"""The compiled extension, and the dense oracle beside these tests."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = ("portable", "avx2", "avx512")
SOURCES = Path(__file__).parents[3] / "mpi_kernels" / "native"
FLAGS = ("-std=gnu11", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}")


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The module mpi_kernels._native."""
    return importlib.import_module("mpi_kernels._native")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, native: ModuleType) -> str:
    """Each instruction set that this machine has."""
    name = str(request.param)
    if name not in native.kernels():
        pytest.skip(f"this machine has no {name}")
    return name


@pytest.fixture(scope="session")
def dense() -> ModuleType:
    """The module dense.py of this folder."""
    spec = importlib.util.spec_from_file_location("native_dense", Path(__file__).with_name("dense.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sanitized(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """Builds a program of this folder, with sources of the extension that a pattern names, under the sanitizers."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc")
    trial = tmp_path / "trial.c"
    trial.write_text("int main(void) { return 0; }\n")
    for command in ([compiler, *FLAGS, trial, "-o", tmp_path / "trial"], [tmp_path / "trial"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cc has no sanitizers here (libasan, libubsan): {done.stderr.strip()[:200]}")

    def build(program: str, sources: str, level: str) -> Path:
        made = tmp_path / Path(program).stem
        files = [Path(__file__).with_name(program), *sorted(SOURCES.glob(sources)), "-lm", "-pthread"]
        subprocess.run([compiler, *FLAGS, level, "-Wall", "-Wextra", "-Werror", *files, "-o", made], check=True)
        return made

    return build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the extension."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.needs_native)
