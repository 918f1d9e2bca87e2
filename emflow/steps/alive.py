"""Alive: what is said to run must show it; of a job that Slurm calls RUNNING there may be nothing left."""

from __future__ import annotations

from pathlib import Path

from emflow.records import Job, JobStatus
from emflow.steps.context import Context, Heard


def silent_s(context: Context, job: Job, folder: Path, status: JobStatus) -> float:
    """Seconds for which a job that is said to run has shown no sign of life.

    Counted from the first look at it as running, so that a first heartbeat may come as late as any other, and in the
    job's own time where the scheduler tells it: time for which a job is suspended is not silence.

    Parameters
    ----------
    job : Job
        It is said to run.
    folder : Path
        Its run folder, with the heartbeat.
    status : JobStatus
        What the scheduler says now.
    """
    now, age_s = context.clock(), context.runs.heartbeat_age(folder)
    heard = context.heard.get(job.name)
    beaten = heard is not None and age_s is not None and (heard.age_s is None or age_s < heard.age_s)
    if heard is None or beaten:
        context.heard[job.name] = Heard(at=now, elapsed_s=status.elapsed_s, age_s=age_s)
        return 0.0
    heard.age_s = age_s
    silent = now - heard.at
    return min(silent, status.elapsed_s - heard.elapsed_s) if status.elapsed_s else silent
