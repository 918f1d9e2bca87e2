"""Which graphics card this rank computes on, and why none if none; nothing is looked at before somebody asks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LOCAL_RANK = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID")
"""Number of a rank on its node, as Slurm, Open MPI, hydra (MPICH, Intel MPI) and PALS say it."""

CAPABILITY = (7, 0)
"""Volta: the oldest cards on which warps synchronise as kernel.cu has them do."""

Want = Literal["auto", "cpu"]
"""``auto``: a card if there is one.  None is demanded: the CPU computes the same, and the provenance says which."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A device of CUDA, or None for the CPU, and a sentence for the provenance."""

    index: int | None
    why: str


def choose(want: Want = "auto", environment: Mapping[str, str] = os.environ) -> Choice:
    """Choose the device of this rank: ranks of a node take its visible devices in turn.

    Whatever stands in the way is a reason, never an error: the CPU computes the same.
    """
    if want == "cpu":
        return Choice(None, "asked for")
    try:
        import cupy
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        return Choice(None, "CuPy is not installed (extra gpu)" if missing else f"CuPy can't be imported: {error}")
    except Exception as error:  # noqa: BLE001 - a CuPy that does not fit its CUDA fails in many ways, all of them a reason
        return Choice(None, f"CuPy can't be imported: {type(error).__name__}: {error}")
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
        if not count:
            return Choice(None, f"no device{_hidden(environment)}")
        local = local_rank(environment)
        index = local % count
        facts = runtime.getDeviceProperties(index)
    except runtime.CUDARuntimeError as error:
        return Choice(None, f"no device{_hidden(environment)}: {error}")
    capability = facts["major"], facts["minor"]
    if capability < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return Choice(None, f"device {index} has compute capability {capability[0]}.{capability[1]}, not {least}")
    return Choice(index, f"device {index} of {count} for local rank {local}")


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this rank on its node; 0 where no launcher says it."""
    values = (environment.get(name, "") for name in LOCAL_RANK)
    return next((int(v) for v in values if v.isdecimal()), 0)


def _hidden(environment: Mapping[str, str]) -> str:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
