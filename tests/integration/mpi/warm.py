"""Warm ranks: job after job in one world, the first one cancelled; ends well only if every error was raised by all."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from mpi_kernels import job, stopping
from mpi_kernels.contract import JobSpec
from mpi_kernels.failure import one_line
from mpi_kernels.jsonfile import read
from mpi_kernels.ranks import world


def cancel(folder: Path) -> None:
    beat = folder / "heartbeat"
    while not (beat.exists() and json.loads(beat.read_text())["frames"]):
        time.sleep(0.01)
    stopping.request("somebody thought better of it", job=read(JobSpec, folder / "job.json").job)


if __name__ == "__main__":
    everyone = world()
    folders = [Path(a) for a in sys.argv[1:]]
    if not everyone.rank:
        threading.Thread(target=cancel, args=(folders[0],), daemon=True).start()
    for folder in folders:
        try:
            job.run(folder, everyone, allocation=True)
        except Exception as error:
            if not stopping.agreed(error):
                print(f"rank {everyone.rank}: {one_line(error)}", file=sys.stderr, flush=True)
                everyone.abort(1)
                raise
    sys.exit(0)
