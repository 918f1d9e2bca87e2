"""One attempt: claim, reduce, publish; all that a run folder sees of it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpi_kernels import failure, jsonfile, plan
from mpi_kernels.contract import (
    CLAIM_FILE,
    HEARTBEAT_FILE,
    JOB_FILE,
    JOB_NAME,
    RESULT_FILE,
    SCHEMA,
    Claim,
    JobSpec,
    ResultManifest,
)
from mpi_kernels.engine import Reduced, reduce
from mpi_kernels.errors import FormatError
from mpi_kernels.events import EventLog, host_name
from mpi_kernels.following import follow
from mpi_kernels.opening import open_source
from mpi_kernels.protocols import Source
from mpi_kernels.publishing import publish_partial, publish_result
from mpi_kernels.ranks import Ranks, check_size

PULSE_S = 1.0
"""Shortest time between two heartbeats, and between two progress events."""

SCHEDULER_IDS = ("SLURM_JOB_ID", "EMFLOW_SCHEDULER_ID")


def run(folder: Path, ranks: Ranks) -> ResultManifest | None:
    """Do the job of a run folder; every rank calls it.

    Returns
    -------
    ResultManifest or None
        What was published, on rank 0.  None on the others, and on all ranks if another attempt has claimed the folder:
        then nothing in it is touched.

    Raises
    ------
    KernelError, OSError, MemoryError
        Recorded in ``error.json`` by the first rank that fails; the caller ends the other ranks (`Ranks.abort`).
    """
    attempt = Attempt(folder, ranks)
    try:
        return attempt.run()
    except BaseException as error:
        attempt.fail(error)
        raise


class Attempt:
    """The state of one rank's part in a job."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.job: JobSpec | None = None
        self.claimed = False
        self._pulse_at = 0.0

    def run(self) -> ResultManifest | None:
        """Claim, reduce and publish."""
        begin = time.perf_counter()
        job = self.job = self._read_job()
        check_size(self.ranks, job.ranks, JOB_FILE)
        self.claimed = self._claim(job)
        if not self.claimed:
            return None
        if self.ranks.rank == 0:
            threading.Thread(target=_load_writer, daemon=True).start()
        source = open_source(job, self.ranks)
        try:
            planned, reduced = self._reduce(job, source)
        finally:
            source.close()
        if reduced is None:
            return None
        self._event("reduced", frames=planned.header.frames, seconds=reduced.seconds)
        self._pulse("write", 0, 0)
        assert self.job is not None
        manifest = publish_result(self.folder, self.job, planned, reduced, ranks=self.ranks.size, begin=begin)
        with contextlib.suppress(OSError):  # the result is committed: nothing that follows may fail the job
            self._event("written", quality=manifest.quality, seconds=manifest.seconds)
        return manifest

    def fail(self, error: BaseException) -> None:
        """Write ``error.json``, unless the folder belongs to another attempt or the disk says no."""
        if not self.claimed and (self.folder / CLAIM_FILE).exists():
            return
        if (self.folder / RESULT_FILE).exists():  # committed
            return
        name = self.job.job if self.job else self.folder.name
        record = failure.describe(error, job=name, rank=self.ranks.rank)
        try:
            failure.record(self.folder, record)
            if self.job:
                self._event("failed", code=record.code, message=record.message, rank=self.ranks.rank)
        except OSError:
            return  # a full or read-only disk: the exit code and the line on stderr remain

    def _read_job(self) -> JobSpec:
        path = self.folder / JOB_FILE
        job = jsonfile.decode(
            JobSpec, self.ranks.broadcast(path.read_bytes() if not self.ranks.rank else None), path=path
        )
        if not JOB_NAME.fullmatch(job.job) or not job.job.startswith(f"{job.acquisition}-"):
            raise FormatError(f"{job.job!r} is no name for a job of acquisition {job.acquisition!r}", path=path)
        return job

    def _claim(self, job: JobSpec) -> bool:
        won = b"1"
        if not self.ranks.rank:
            scheduler = next((os.environ[n] for n in SCHEDULER_IDS if n in os.environ), "")
            claim = Claim(
                job=job.job, host=host_name(), pid=os.getpid(), scheduler_id=scheduler, wall_ns=time.time_ns()
            )
            if failure.create(self.folder / CLAIM_FILE, jsonfile.encode(claim)):
                self.claimed = True
                self._event("claimed", scheduler_id=scheduler, ranks=self.ranks.size)
            else:
                won = b"0"
        return self.ranks.broadcast(won) == b"1"

    def _reduce(self, job: JobSpec, source: Source) -> tuple[plan.Plan, Reduced | None]:
        if not self.ranks.rank and not job.growing:
            source.complete()
        planned = plan.make(job.recipe, source.header)
        self._event("started", frames=planned.header.frames, kind=planned.header.kind)
        self._pulse("read", 0, 0)
        if not job.growing:
            return planned, reduce(
                planned,
                source,
                self.ranks,
                method=job.method,
                block_bytes=job.block_bytes,
                progress=self._progress,
            )

        def publish(number: int, partial: Reduced) -> None:
            publish_partial(self.folder, number, job, planned, partial, ranks=self.ranks.size)
            self._event("partial", number=number, frames=int(partial.covered.sum()))

        reduced, digest = follow(job, planned, source, self.ranks, self.folder, publish, self._progress)
        self.job = replace(job, source=replace(job.source, digest=digest))
        return planned, reduced

    def _progress(self, done: int, frames: int) -> None:
        self.ranks.look()
        if not self.ranks.rank and self._pulse("read", done, frames):
            self._event("progress", frames=done, of=frames)

    def _pulse(self, step: str, done: int, frames: int) -> bool:
        """Rewrite the heartbeat, at most once a second; no fsync: a lost one is soon followed by the next."""
        if self.ranks.rank or time.monotonic() - self._pulse_at < PULSE_S:
            return False
        self._pulse_at = time.monotonic()
        state = {"v": SCHEMA, "wall_ns": time.time_ns(), "step": step, "frames": done, "of": frames}
        temporary = self.folder / f".{HEARTBEAT_FILE}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(state), encoding="ascii")
            temporary.replace(self.folder / HEARTBEAT_FILE)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return True

    def _event(self, name: str, **attrs: Any) -> None:
        """Append an event, of rank 0 or of a rank that fails."""
        if self.ranks.rank and name != "failed":
            return
        assert self.job is not None
        with EventLog(self.folder, "data", self.job.trace, self.job.job) as log:
            log.write(name, **attrs)


def _load_writer() -> None:
    """Load h5py while the frames are read: it is needed at the very end, and takes a tenth of a second."""
    import h5py  # noqa: F401
