"""What the reductions need of a graphics card, and CuPy as one.

Copies to the card, kernels and copies back have a stream each: a block is on its way while the one before is reduced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mpi_kernels.device import Want, choose
from mpi_kernels.errors import KernelError
from mpi_kernels.gpu.program import KERNEL, THREADS

KERNELS = ("visit", "finish_rows", "finish_pixels", "regions")

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation (CUDA Runtime API, enum cudaError)."""


class CardError(KernelError):
    """The card or its driver refuses; the message is its own."""

    code = "card"
    retryable = True


class Card(Protocol):
    """A card; arrays on it are opaque, but for slices along their first axis, ``shape`` and ``nbytes``.

    Whatever has no room raises `MemoryError`; anything else that the card refuses is a `CardError`.
    """

    name: str
    """For people: model and index."""
    threads: int
    """Of a block of the kernels."""

    def host(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Page-locked memory of the host."""

    def full(self, shape: tuple[int, ...], dtype: np.dtype, value: float) -> Any:
        """Fill a new array on the card."""

    def constant(self, array: np.ndarray) -> Any:
        """Copy an array to the card, before any kernel runs."""

    def build(self, options: tuple[str, ...]) -> Any:
        """Compile the kernels for these options."""

    def upload(self, host: np.ndarray, target: Any) -> None:
        """Begin a copy to the card; kernels that are launched later wait for it."""

    def launch(self, built: Any, name: str, grid: tuple[int, int], threads: int, args: Sequence[Any]) -> None:
        """Begin a kernel, after all that were launched before; integers among its arguments are 64-bit."""

    def clear(self, target: Any) -> None:
        """Zero an array, in the order of the kernels."""

    def download(self, source: Any, host: np.ndarray) -> None:
        """Begin a copy to the host, after all kernels that were launched before."""

    def mark(self) -> Any:
        """Return a point after all that has begun, for ``wait``."""

    def wait(self, mark: Any) -> None:
        """Wait until that point is reached."""

    def trim(self) -> None:
        """Give memory that is not in use back to the card."""


class CupyCard:
    """One device through CuPy.

    Parameters
    ----------
    index : int
        Of the device, among those that are visible.

    Raises
    ------
    CardError
        The driver refuses.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self._cupy, self._index = cupy, index
        with self._here():
            facts = cupy.cuda.runtime.getDeviceProperties(index)
            self._uploads, self._kernels, self._results = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        model = facts["name"].decode("ascii", "replace")
        self.threads = THREADS
        self.name = f"{model} (device {index}, compute {facts['major']}.{facts['minor']}, CuPy {cupy.__version__})"

    @contextlib.contextmanager
    def _here(self, stream: Any = None) -> Iterator[None]:
        """Make the device, and a stream, current; what CUDA says becomes ours."""
        cuda = self._cupy.cuda
        try:
            with cuda.Device(self._index), stream or contextlib.nullcontext():
                yield
        except cuda.runtime.CUDARuntimeError as error:
            if error.status == OUT_OF_MEMORY:
                raise MemoryError(str(error)) from error
            raise CardError(str(error)) from error
        except (RuntimeError, OSError, ImportError, cuda.compiler.CompileException) as error:
            raise CardError(str(error).strip().partition("\n")[0]) from error

    def host(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Page-locked memory of the host."""
        count = int(np.prod(shape))
        with self._here():
            memory = self._cupy.cuda.alloc_pinned_memory(max(1, count * dtype.itemsize))
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def full(self, shape: tuple[int, ...], dtype: np.dtype, value: float) -> Any:
        """Fill a new array on the card."""
        with self._here(self._kernels):
            return self._cupy.full(shape, value, dtype)

    def constant(self, array: np.ndarray) -> Any:
        """Copy an array to the card, before any kernel runs."""
        with self._here(self._kernels):
            found = self._cupy.asarray(array)
            self._kernels.synchronize()
            return found

    def build(self, options: tuple[str, ...]) -> Any:
        """Compile the kernels for these options; CuPy keeps what it has compiled."""
        with self._here():
            module = self._cupy.RawModule(code=KERNEL.read_text(encoding="ascii"), options=options)
            return {name: module.get_function(name) for name in KERNELS}

    def upload(self, host: np.ndarray, target: Any) -> None:
        """Begin a copy to the card; kernels that are launched later wait for it."""
        with self._here(self._uploads):
            target.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._uploads)
            self._kernels.wait_event(self._uploads.record())

    def launch(self, built: Any, name: str, grid: tuple[int, int], threads: int, args: Sequence[Any]) -> None:
        """Begin a kernel, after all that were launched before; integers among its arguments are 64-bit."""
        given = tuple(np.int64(a) if isinstance(a, int) else a for a in args)
        with self._here(self._kernels):
            built[name](grid, (threads,), given)

    def clear(self, target: Any) -> None:
        """Zero an array, in the order of the kernels."""
        with self._here(self._kernels):
            target.data.memset_async(0, target.nbytes, self._kernels)

    def download(self, source: Any, host: np.ndarray) -> None:
        """Begin a copy to the host, after all kernels that were launched before."""
        with self._here(self._results):
            self._results.wait_event(self._kernels.record())
            source.data.copy_to_host_async(host.ctypes.data, host.nbytes, self._results)

    def mark(self) -> Any:
        """Return a point after all that has begun, for ``wait``."""
        with self._here(self._results):
            self._results.wait_event(self._kernels.record())
            return self._results.record()

    def wait(self, mark: Any) -> None:
        """Wait until that point is reached."""
        with self._here():
            mark.synchronize()

    def trim(self) -> None:
        """Give memory that is not in use back to the card."""
        with self._here():
            self._cupy.cuda.Device(self._index).synchronize()
            self._cupy.get_default_memory_pool().free_all_blocks()
            self._cupy.get_default_pinned_memory_pool().free_all_blocks()


def open_card(want: Want = "auto") -> tuple[Card | None, str]:
    """Open the card of this rank; None where it has none, and in either case why, for the provenance."""
    choice = choose(want)
    if choice.index is None:
        return None, choice.why
    try:
        return CupyCard(choice.index), choice.why
    except (CardError, MemoryError) as error:
        return None, str(error)
