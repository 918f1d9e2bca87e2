"""The compiled extension, and the dense oracle beside these tests."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = ("portable", "avx2", "avx512")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the extension."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.needs_native)
