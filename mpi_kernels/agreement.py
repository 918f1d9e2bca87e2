"""What fails on one rank fails on all: none is left waiting in a collective call, and warm ranks go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from mpi_kernels import failure
from mpi_kernels.contract import ErrorRecord
from mpi_kernels.errors import KernelError
from mpi_kernels.ranks import Ranks

T = TypeVar("T")


class Elsewhere(KernelError):
    """Another rank could not do its part; code and words are that rank's."""

    def __init__(self, record: ErrorRecord) -> None:
        super().__init__(record.message, path=record.path, frame=record.frame, next_step=record.next_step)
        self.code, self.retryable = record.code, record.retryable


def together(ranks: Ranks, act: Callable[[], T]) -> T:
    """Do something that may fail on some ranks; if it does, every rank raises.  Every rank calls it.

    Parameters
    ----------
    act : callable
        This rank's part.  It must hold no collective call that another rank may not come to.

    Raises
    ------
    Exception
        Where it failed, what it raised; elsewhere an `Elsewhere` about the first rank that failed.
        `agreed` knows both.
    Stopped
        SIGTERM and SIGINT wait for nobody: `agreed` does not know them.
    """
    error: Exception | None = None
    try:
        value = act()
    except failure.Stopped:
        raise
    except Exception as caught:  # noqa: BLE001 - whatever it is, the others wait
        error = caught
    if ranks.all(error is None):
        return value
    raise _settled(ranks, error)


def agreed(error: BaseException) -> bool:
    """Whether every rank has raised with this one, so that all of them can go on with something else."""
    return owner(error) is not None


def owner(error: BaseException) -> int | None:
    """The rank that tells of an error that all raise together; None where each rank is on its own."""
    found = vars(error).get("agreed_owner")
    return found if isinstance(found, int) else None


def known_to_all(error: KernelError) -> KernelError:
    """Mark an error that every rank raises at the same place, since all of them have decided the same; rank 0 tells."""
    vars(error)["agreed_owner"] = 0
    return error


def _settled(ranks: Ranks, error: Exception | None) -> Exception:
    """Give this rank's error once all know whose it is."""
    mine = None if error is None else asdict(failure.describe(error, job="", rank=ranks.rank))
    told = ranks.gather_json(mine)
    first: dict[str, Any] | None = None if told is None else next(record for record in told if record is not None)
    record = ErrorRecord(**json.loads(ranks.broadcast(None if first is None else json.dumps(first).encode("ascii"))))
    found = Elsewhere(record) if error is None else error
    vars(found)["agreed_owner"] = record.rank
    return found
