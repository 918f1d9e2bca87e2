"""``python -m mpi_kernels RUN_FOLDER``: one process, or every rank under mpiexec or srun.

Exit codes: 0 the result is written, or the folder is claimed by another attempt; 1 failed, see error.json;
2 usage; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from mpi_kernels import job, stopping
from mpi_kernels.agreement import agreed, owner
from mpi_kernels.contract import JOB_FILE
from mpi_kernels.errors import KernelError, printable
from mpi_kernels.failure import Stopped, one_line
from mpi_kernels.ranks import Ranks, launched, world

LAST_WORD_S = 0.05
"""Time for a launcher to pass on the line that says why; with the abort it drops what it still holds."""

USAGE = """usage: python -m mpi_kernels RUN_FOLDER           (a folder that holds job.json)
       python -m mpi_kernels --selftest [--json]  (known frames on every path that this machine has)"""


def main(arguments: list[str] | None = None) -> int:
    """Run the job of the folder that is named on the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if arguments[:1] == ["--selftest"] and arguments[1:] in ([], ["--json"]):
        return _selftest(as_json=bool(arguments[1:]))
    # a rank among others goes on: rank 0 says what is wrong, and which node does not see the folder
    if len(arguments) != 1 or not ((Path(arguments[0]) / JOB_FILE).is_file() or launched(os.environ)):
        wrong = f"no {JOB_FILE} in {printable(arguments[0])}\n" if len(arguments) == 1 else ""
        print(f"{wrong}{USAGE}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    stopping.listen()
    folder, ranks = Path(arguments[0]), Ranks()
    try:
        try:
            ranks = world()
        except KernelError as error:
            job.Attempt(folder, ranks).fail(error)
            raise
        job.run(folder, ranks)
    except BaseException as error:  # noqa: BLE001  the other ranks must end, whatever happened: sys.exit in a plug-in too
        if owner(error) in (None, ranks.rank):
            print(f"mpi_kernels: rank {ranks.rank}: {one_line(error)}", file=sys.stderr, flush=True)
        code = 128 + error.number if isinstance(error, Stopped) else 1
        if ranks.size > 1:
            time.sleep(LAST_WORD_S)
        if not agreed(error):  # else every rank is here, and ends by itself
            ranks.abort(code)
        return code
    return 0


def _selftest(*, as_json: bool) -> int:
    from mpi_kernels import selftest

    ranks = world()
    try:
        found = selftest.run(ranks)
    except Exception as error:
        ranks.abort(1)
        raise error from None
    wrong = [checked for checked in found if checked.wrong]
    if as_json and not ranks.rank:
        print(json.dumps({"ranks": ranks.size, "wrong": len(wrong), "paths": [asdict(checked) for checked in found]}))
    elif not ranks.rank:
        for checked in wrong:
            print(f"WRONG  {checked.path}: {checked.wrong}")
        print(f"{len(found) - len(wrong)} of {len(found)} paths give the known answers on {ranks.size} rank(s)")
    return 1 if wrong else 0


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, signal.SIG_IGN)  # one is enough: error.json is being written
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
