"""How a job of a pool is, from the files of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from emflow.records import EndCause, SchedulerPhase
from emflow.schedulers.pool_folder import Closed, PoolFolder, Sent
from emflow.schedulers.pool_jobs import PoolJobs, pool_id
from mpi_kernels import jsonfile
from mpi_kernels.contract import CLAIM_FILE, Claim

JOB = "0123456789abcdef-01"


@pytest.mark.parametrize(
    ("pools", "jobs", "says"),
    [
        (EndCause.TIMEOUT, EndCause.FAILED, "Raise relay_s in [pool]"),  # that the job's own limit was met is not so
        (EndCause.NODE_FAIL, EndCause.NODE_FAIL, "with pool"),
        (EndCause.UNSAID, EndCause.FAILED, "with pool"),
    ],
)
def test_a_job_ends_with_the_pool_that_had_begun_it(tmp_path: Path, pools: EndCause, jobs: EndCause, says: str) -> None:
    folder, runs = PoolFolder(tmp_path / "pool"), tmp_path / "runs"
    name = folder.new_name()
    runs.mkdir()
    sent = Sent(job=JOB, folder=str(runs), ranks=1, time_limit_s=60, to=pool_id(name, JOB))
    claim = Claim(job=JOB, host="n1", pid=1, scheduler_id=pool_id(name, JOB), wall_ns=1)
    jsonfile.publish(runs / CLAIM_FILE, jsonfile.encode(claim))
    folder.write_closed(name, Closed(reason="its time was up", wall_ns=1, cause=pools))
    verdict, status = PoolJobs(folder).judge(sent)
    assert (verdict, status.phase, status.cause) == ("said", SchedulerPhase.ENDED, jobs)
    assert says in status.reason
