"""What a pool does before it says that it is idle, so that its first task waits for nothing."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

from mpi_kernels.contract import Device

PACKAGES = ("mpi_kernels.formats", "mpi_kernels.reductions")
FURTHER = ("h5py", "hdf5plugin", "mpi_kernels.extension", "concurrent.futures.thread")


def warm(device: Device) -> str:
    """Import what jobs import, and open this rank's card if jobs compute on cards; what was found, in words.

    What can't be imported here is not needed, or the job that needs it says so.
    """
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__, f"{name}."):
            _imported(module.name)
    for name in FURTHER:
        _imported(name)
    if device == "cpu":
        return "CPU"
    from mpi_kernels.gpu.card import open_card

    _, why = open_card()
    return why


def _imported(name: str) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
