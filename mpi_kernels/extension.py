"""The compiled extension, where there was a compiler when the package was installed."""

from __future__ import annotations

import importlib
from types import ModuleType

native: ModuleType | None
try:
    native = importlib.import_module("mpi_kernels._native")
except ImportError:
    native = None

MISSING = "the compiled kernels are not there: install a C compiler, then emflow again"
