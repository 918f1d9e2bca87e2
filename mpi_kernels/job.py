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

from mpi_kernels import failure, jsonfile, plan, preflight, stopping
from mpi_kernels.agreement import owner, together
from mpi_kernels.contract import (
    CLAIM_FILE,
    HEARTBEAT_FILE,
    JOB_FILE,
    JOB_NAME,
    PARTIAL,
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


def run(folder: Path, ranks: Ranks, *, allocation: bool | None = None) -> ResultManifest | None:
    """Do the job of a run folder; every rank calls it.

    Parameters
    ----------
    allocation : bool, optional
        Whether these ranks hold cores of a cluster, or stay warm: then somebody may ask for a stop before the end
        (`mpi_kernels.stopping`), and the first results are proven with known frames (`preflight.golden`).
        None: whether rank 0's environment names a job of Slurm.

    Returns
    -------
    ResultManifest or None
        What was published, on rank 0.  None on the others, and on all ranks if another attempt has claimed the folder:
        then nothing in it is touched.

    Raises
    ------
    KernelError, OSError, MemoryError
        Recorded in ``error.json`` by the first rank that fails.  Where all ranks raise together
        (`mpi_kernels.agreement.agreed`) they can go on with something else; otherwise the caller ends the other ranks
        (`Ranks.abort`).
    """
    attempt = Attempt(folder, ranks, allocation=allocation)
    try:
        return attempt.run()
    except BaseException as error:
        attempt.fail(error)
        raise


class Attempt:
    """The state of one rank's part in a job."""

    def __init__(self, folder: Path, ranks: Ranks, *, allocation: bool | None = None) -> None:
        self.folder, self.ranks = folder, ranks
        self.allocation = "SLURM_JOB_ID" in os.environ if allocation is None else allocation
        self.stoppable = self.allocation or stopping.limited()
        self.job: JobSpec | None = None
        self.claimed = False
        self._looked = preflight.Looked()
        self._pulse_at = 0.0

    def run(self) -> ResultManifest | None:
        """Claim, look, reduce and publish."""
        begin = time.perf_counter()
        job = self.job = self._read_job()
        if not self._claim(job):
            return None
        if self.ranks.rank == 0:
            threading.Thread(target=_load_writer, daemon=True).start()
        source = open_source(job, self.ranks)
        try:
            planned, reduced = self._reduce(job, source)
        finally:
            source.close()
        return together(self.ranks, lambda: None if reduced is None else self._publish(planned, reduced, begin))

    def _publish(self, planned: plan.Plan, reduced: Reduced, begin: float) -> ResultManifest:
        """Write the result, on rank 0."""
        self._proven(reduced)
        self._event("reduced", frames=planned.header.frames, seconds=reduced.seconds)
        self._pulse("write", 0, 0)
        assert self.job is not None
        manifest = publish_result(self.folder, self.job, planned, reduced, ranks=self.ranks.size, begin=begin)
        with contextlib.suppress(OSError):  # the result is committed: nothing that follows may fail the job
            self._event("written", quality=manifest.quality, seconds=manifest.seconds)
        return manifest

    def _proven(self, reduced: Reduced) -> None:
        """Say with a result what was looked at before it."""
        looked = self._looked
        told = {"golden": looked.golden, "preflight": "; ".join(looked.warnings)}
        reduced.method = reduced.method | {name: text for name, text in told.items() if text}

    def fail(self, error: BaseException) -> None:
        """Write ``error.json``, unless the folder belongs to another attempt or the disk says no."""
        teller = owner(error)
        try:
            if teller is None or teller == self.ranks.rank:
                self._record(error)
        finally:
            if teller is not None:
                self.ranks.all(True)  # nobody ends, and so ends the others, before it is written

    def _record(self, error: BaseException) -> None:
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
        data = self.ranks.broadcast(together(self.ranks, lambda: None if self.ranks.rank else path.read_bytes()))

        def decoded() -> JobSpec:
            job = jsonfile.decode(JobSpec, data, path=path)
            if not JOB_NAME.fullmatch(job.job) or not job.job.startswith(f"{job.acquisition}-"):
                raise FormatError(f"{job.job!r} is no name for a job of acquisition {job.acquisition!r}", path=path)
            check_size(self.ranks, job.ranks, JOB_FILE)
            return job

        return together(self.ranks, decoded)

    def _claim(self, job: JobSpec) -> bool:
        """Claim the folder, and see that every rank sees the claim; False: another attempt has it."""
        written = together(self.ranks, lambda: None if self.ranks.rank else self._written_claim(job))
        begin, told_ns = time.perf_counter(), time.time_ns()
        flags = bytes([self.allocation, self.stoppable])  # rank 0's count: an environment may differ between nodes
        said = self.ranks.broadcast(None if written is None else flags + written)
        self.allocation, self.stoppable, claim = bool(said[0]), bool(said[1]), said[2:]
        self.claimed = bool(claim)
        if self.claimed:
            told_ns = time.time_ns() if self.ranks.rank else told_ns
            self._looked = preflight.nodes(self.folder, job, claim, self.ranks, told_ns=told_ns)
            self._looked.seconds = time.perf_counter() - begin
        return self.claimed

    def _written_claim(self, job: JobSpec) -> bytes:
        """The claim as it stands in the folder; empty: it is another's."""
        scheduler = next((os.environ[n] for n in SCHEDULER_IDS if n in os.environ), "")
        claim = Claim(job=job.job, host=host_name(), pid=os.getpid(), scheduler_id=scheduler, wall_ns=time.time_ns())
        data = jsonfile.encode(claim)
        if not failure.create(self.folder / CLAIM_FILE, data):
            return b""
        self.claimed = True
        self._event("claimed", scheduler_id=scheduler, ranks=self.ranks.size)
        return data

    def _planned(self, job: JobSpec, source: Source) -> plan.Plan:
        """The plan, once nothing speaks against it."""
        looked = self._looked

        def fitting() -> plan.Plan:
            if not self.ranks.rank and not job.growing:
                source.complete()
            planned = plan.make(job.recipe, source.header)
            if not self.ranks.rank:
                preflight.room(self.folder, planned)
            return planned

        planned = together(self.ranks, fitting)
        begin = time.perf_counter()
        looked.checked.append("space")
        if self.allocation:
            looked.golden = preflight.golden(job, source, planned, self.ranks)
            looked.checked += ["golden"] if looked.golden else []
        looked.seconds += time.perf_counter() - begin
        return planned

    def _reduce(self, job: JobSpec, source: Source) -> tuple[plan.Plan, Reduced | None]:
        planned, looked = self._planned(job, source), self._looked
        self._event(
            "preflight",
            checked=looked.checked,
            warnings=looked.warnings,
            golden=looked.golden,
            seconds=round(looked.seconds, 6),
        )
        self._event("started", frames=planned.header.frames, kind=planned.header.kind)
        self._pulse("read", 0, 0)
        if job.growing:
            return planned, self._follow(job, planned, source)
        if self.stoppable:
            return planned, self._reduce_in_slices(job, planned, source)
        return planned, reduce(
            planned,
            source,
            self.ranks,
            method=job.method,
            block_bytes=job.block_bytes,
            progress=self._progress,
        )

    def _follow(self, job: JobSpec, planned: plan.Plan, source: Source) -> Reduced | None:
        def publish(number: int, partial: Reduced) -> None:
            self._publish_partial(job, planned, number, partial)

        reduced, digest = follow(job, planned, source, self.ranks, self.folder, publish, self._progress)
        self.job = replace(job, source=replace(job.source, digest=digest))
        return reduced

    def _reduce_in_slices(self, job: JobSpec, planned: plan.Plan, source: Source) -> Reduced | None:
        reduced, asked, done = stopping.reduce_in_slices(job, planned, source, self.ranks, progress=self._progress)
        if asked is None:
            return reduced
        together(self.ranks, lambda: None if reduced is None else self._publish_partial(job, planned, 1, reduced))
        raise stopping.early(asked, done, planned.header.frames, PARTIAL.format(1) if done else "")

    def _publish_partial(self, job: JobSpec, planned: plan.Plan, number: int, partial: Reduced) -> None:
        self._proven(partial)
        publish_partial(self.folder, number, job, planned, partial, ranks=self.ranks.size)
        self._event("partial", number=number, frames=int(partial.covered.sum()))

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
