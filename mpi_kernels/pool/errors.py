"""What a pool's client is told; standard library only.

PoolError
├── PoolGone         it has ended, or was never there: its tasks are for another one
├── PoolDrains       it finishes what runs and takes nothing new
├── PoolRefused      it will never take this task
├── PoolUnreachable  nobody answers, and nothing was handed over
└── WrongSecret      the two sides do not share a secret, or somebody else has been at the line
"""

from __future__ import annotations

from mpi_kernels.errors import KernelError


class PoolError(KernelError):
    """A pool of warm ranks did not do what was asked."""

    code = "pool"
    retryable = True


class PoolGone(PoolError):
    """The pool has ended, or was never there."""

    code = "pool-gone"


class PoolDrains(PoolError):
    """The pool finishes what runs and takes nothing new."""

    code = "pool-drains"


class PoolRefused(PoolError):
    """The pool will never take this task."""

    code = "pool-refused"
    retryable = False


class PoolUnreachable(PoolError):
    """Nobody answers in time."""

    code = "pool-unreachable"


class WrongSecret(PoolError):
    """The two sides do not share a secret, or a line was changed on its way."""

    code = "pool-secret"
    retryable = False
