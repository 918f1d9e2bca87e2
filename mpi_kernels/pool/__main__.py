"""``python -m mpi4py -m mpi_kernels.pool POOL_FOLDER``: every rank of a pool, under mpiexec or srun.

Exit codes: 0 it has ended as it should, see ended.json; 1 it could not be started; 2 usage; 70 its ranks could not go
on together and may be started again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mpi_kernels import jsonfile
from mpi_kernels.contract import CLAIM_FILE
from mpi_kernels.errors import printable
from mpi_kernels.failure import one_line, publish_once
from mpi_kernels.pool.records import ENDED_FILE, POOL_FILE, TAKEN, Ended, Task, read_spec
from mpi_kernels.pool.server import ABORTED, serve
from mpi_kernels.pool.team import Stuck

LAST_WORD_S = 0.05
"""Time for a launcher to pass on the line that says why."""

USAGE = """usage: python -m mpi4py -m mpi_kernels.pool POOL_FOLDER   (the folder of an instance, which holds pool.json)
       python -m mpi_kernels.pool --gave-up POOL_FOLDER  (write down that its ranks are not started again)"""


def main(arguments: list[str] | None = None) -> int:
    """Be a rank of the pool that is named on the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    gave_up = arguments[:1] == ["--gave-up"]
    arguments = arguments[gave_up:]
    if len(arguments) != 1 or not (Path(arguments[0]) / POOL_FILE).is_file():
        wrong = f"no {POOL_FILE} in {printable(arguments[0])}\n" if len(arguments) == 1 else ""
        print(f"{wrong}{USAGE}", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).absolute()
    if gave_up:
        _give_up(folder)
        return 0
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    try:
        serve(folder, world)
    except BaseException as error:  # noqa: BLE001  the other ranks must end, whatever happened
        print(f"pool: rank {world.Get_rank()}: {one_line(error)}", file=sys.stderr, flush=True)
        code = ABORTED if isinstance(error, Stuck) else 1
        if world.Get_size() > 1:
            time.sleep(LAST_WORD_S)
            world.Abort(code)
        return code
    return 0


def _give_up(folder: Path) -> None:
    """Publish ``ended.json`` in the name of ranks that died too often."""
    spec = read_spec(folder)
    left = []
    for path in sorted((folder / TAKEN).glob("*.json")):
        task = jsonfile.read(Task, path)
        if not Path(spec.runs, task.folder, CLAIM_FILE).exists():
            left.append(task.job)
    message = "its ranks died too often, see its output"
    ended = Ended(why="gave-up", message=message, left=tuple(left), done=0, wall_ns=time.time_ns())
    publish_once(folder / ENDED_FILE, jsonfile.encode(ended))


if __name__ == "__main__":
    sys.exit(main())
