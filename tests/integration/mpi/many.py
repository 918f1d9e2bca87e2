"""Runs many run folders, one after the other, in one world of ranks: ``mpiexec -n N python many.py FOLDER...``."""

from __future__ import annotations

import sys
from pathlib import Path

from mpi_kernels import job
from mpi_kernels.failure import one_line
from mpi_kernels.ranks import Ranks, world


def run(folders: list[Path], ranks: Ranks) -> None:
    for folder in folders:
        job.run(folder, ranks)


if __name__ == "__main__":
    everyone = world()
    try:
        run([Path(a) for a in sys.argv[1:]], everyone)
    except Exception as error:  # noqa: BLE001 - the other ranks must end
        print(f"rank {everyone.rank}: {one_line(error)}", file=sys.stderr, flush=True)
        everyone.abort(1)
        sys.exit(1)
