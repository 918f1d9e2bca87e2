"""Jobs under Slurm, through its commands: one static script, one question for all jobs, and never a job sent blindly.

A job's name is its key.  sbatch may fail although the job was taken, and its answer may get lost; so after any doubt
the name is asked for.  A job that turns up late all the same finds the ``claim`` of the other in its run folder.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import msgspec

from emflow.config import Config
from emflow.errors import SubmitError, Unavailable
from emflow.records import EndCause, JobStatus, Resources, SchedulerPhase
from emflow.schedulers import site, slurm_check, slurm_commands, slurm_status
from emflow.schedulers.protocol import Finding, Rehearsal
from emflow.schedulers.slurm_rows import Row
from emflow.schedulers.slurm_states import judge
from emflow.schedulers.slurm_transport import Transport
from mpi_kernels import jsonfile
from mpi_kernels.contract import CLAIM_FILE, JOB_NAME, Claim
from mpi_kernels.errors import FormatError

log = logging.getLogger("emflow")

OUTPUT_FILE = "job.out"
SETTLE_S = 3.0
"""How long the controller must have answered that it has no such job before a doubtful one is sent again: what lay in
its queue while it hung is taken by then."""

CANCEL_S = 100.0
"""Slurm itself sends SIGTERM, and SIGKILL after KillWait: 30 s by default."""

ACCOUNTING_S = 60.0
"""Between two tries of an accounting that does not answer: it is only asked for what the controller has forgotten."""

ASK_EVERY_S = 1.0
"""squeue locks the list of jobs that a whole site shares; and results are seen in run folders, sooner than by it."""

_LOOK_S = 0.1
_PLACEHOLDER = Path("/RUNS/<day>/<acquisition>/<nn>")
_LIVELY = (SchedulerPhase.RUNNING, SchedulerPhase.UNKNOWN, SchedulerPhase.PENDING, SchedulerPhase.ENDED)
"""Of several jobs of one name the one that runs is taken, and the newest of those that are alike."""

T = TypeVar("T")


class SlurmScheduler:
    """Sends each run folder as one batch job.

    Parameters
    ----------
    config : Config
        Where the site's profile, the account and the rest of ``[slurm]`` come from.
    settle_s : float
        Seconds that a doubtful job must be missing from Slurm's answers before it counts as not sent.
    transport : Transport
        The way to Slurm; its commands by default.
    """

    name: ClassVar[str] = "slurm"
    ends_with_service: ClassVar[bool] = False

    def __init__(self, config: Config, *, settle_s: float = SETTLE_S, transport: Transport = slurm_commands) -> None:
        self._slurm = transport
        self._config = config
        self._settle_s = settle_s
        self._doubts: dict[str, float | None] = {}
        self._ending: dict[str, float] = {}
        self._ask_accounting_from = 0.0
        self._away_until = 0.0
        self._away = ""
        self._heard: tuple[float, dict[str, str], dict[str, JobStatus]] = (0.0, {}, {})

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Ask for what ``[slurm]`` and the site's profile say."""
        return cls(config)

    def submit(self, name: str, folder: Path, resources: Resources) -> str:
        """Send the job of a run folder; its output goes to ``job.out`` there."""
        request = site.request(self._config, resources)
        flags = (*_identity(name, folder), *request.flags)
        self._refuse_while_away()
        self._heard = (0.0, {}, {})
        try:
            found = self._asked(lambda: self._slurm.submit(flags, request.script, folder, _given(request)))
        except SubmitError as error:
            if error.transient:
                self._doubts[name] = None
            raise
        except Unavailable:
            self._doubts[name] = None
            raise
        self._doubts.pop(name, None)
        return found

    def find(self, name: str, folder: Path) -> list[str]:
        """Jobs that the controller, the accounting or the run folder knows under a name; those that live come first.

        Raises
        ------
        Unavailable
            Slurm can't be asked, or sbatch failed a moment ago and its request may still be taken.
        """
        rows = self._asked(lambda: self._slurm.listed([name])) or self._accounted([name])
        rows = [row for row in rows if row.name == name and not _record_of_a_refusal(row)]
        rows.sort(key=lambda row: (_LIVELY.index(judge(row.state).phase), -int(row.id)))
        found = [row.id for row in rows] or _claimed(name, folder)
        if found:
            self._doubts.pop(name, None)
        elif name in self._doubts:
            self._settle(name)
        return found

    def poll(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        """How jobs are, by one squeue; what the controller has forgotten is looked for in the accounting.

        What was said less than a second ago, since when nothing was sent or cancelled here, is said again.
        """
        asked, known, said = self._heard
        if time.monotonic() < asked + ASK_EVERY_S and jobs.items() <= known.items():
            return {name: said[name] for name in jobs}
        said = self._look(jobs)
        self._heard = (time.monotonic(), dict(jobs), said)
        return said

    def cancel(self, *scheduler_ids: str) -> None:
        """End jobs with all their processes; raises `Unavailable` where some are left after long.

        The time is that since the first try: a job whose node is away stays for minutes, and must not hold up all that
        the service does each time that it is tried again.
        """
        self._heard = (0.0, {}, {})
        ids = [one for one in scheduler_ids if one.isascii() and one.isdigit()]
        known = self._asked(lambda: self._slurm.named(ids)) if ids else []
        # by name: whatever else was sent for the same run folder, and nothing that got an old id
        names = sorted({row.name for row in known if JOB_NAME.fullmatch(row.name)})
        if not names:
            return
        told: set[str] = set()
        while alive := self._alive(names):
            if new := [one for one in alive if one not in told]:
                self._asked(functools.partial(self._slurm.cancel, new))
                told.update(new)
            now = time.monotonic()
            if now - min(self._ending.setdefault(one, now) for one in alive) > CANCEL_S:
                raise Unavailable(
                    f"{CANCEL_S:g} s after scancel there are still processes of {', '.join(alive)}",
                    next_step="See squeue and sinfo -R: Slurm waits for a node that does not answer; ask the site",
                )
            time.sleep(_LOOK_S)
        for one in ids:
            self._ending.pop(one, None)

    def tend(self) -> None:
        """Do nothing: nothing is held between jobs."""

    def rehearse(self, resources: Resources) -> Rehearsal:
        """The command of a job, and what Slurm says to it with ``--test-only``: when it would start, or why not."""
        request = site.request(self._config, resources)
        flags = (*_identity("0123456789abcdef-01", _PLACEHOLDER), *request.flags)
        command = slurm_commands.submission(flags, request.script, _PLACEHOLDER)
        trial = slurm_commands.submission(flags, request.script, _PLACEHOLDER, "--test-only")
        try:
            answer = slurm_commands.run(trial, env=_given(request), timeout_s=slurm_commands.SUBMIT_S)
            ok, said = answer.code == 0, answer.said
        except Unavailable as error:
            ok, said = False, str(error)
        text = request.script.read_text("utf-8")
        return Rehearsal(command=command, environment=request.environment, script=text, said=said, ok=ok)

    def check(self) -> list[Finding]:
        """Commands, controller, partition, accounting, and a job that is sent for trial."""
        return slurm_check.findings(self._config, self.rehearse)

    def close(self) -> None:
        """Forget the jobs; they go on."""
        self._doubts.clear()

    def _look(self, jobs: Mapping[str, str]) -> dict[str, JobStatus]:
        names = [name for name in jobs if JOB_NAME.fullmatch(name)]
        if not names:
            return {name: slurm_status.gone(scheduler_id) for name, scheduler_id in jobs.items()}
        rows = slurm_status.by_name(self._asked(lambda: self._slurm.listed(names)))
        missing = [name for name in names if slurm_status.chosen(rows.get(name, []), jobs[name]) is None]
        for name, more in slurm_status.by_name(self._accounted(missing)).items():
            rows[name] = [*rows.get(name, []), *more]
        said = {name: slurm_status.status(rows.get(name, []), scheduler_id) for name, scheduler_id in jobs.items()}
        return {name: _with_memory(one) for name, one in said.items()}

    def _asked(self, question: Callable[[], T]) -> T:
        """Ask, unless Slurm did not answer a moment ago.

        What failed after some seconds is not tried again for as many: a controller that hangs takes at most half of
        the time of the service, whose other work goes on.
        """
        self._refuse_while_away()
        begin = time.monotonic()
        try:
            return question()
        except Unavailable as error:
            end = time.monotonic()
            self._away_until, self._away = end + (end - begin), error.message
            raise

    def _refuse_while_away(self) -> None:
        if time.monotonic() < self._away_until:
            raise Unavailable(self._away, next_step="Slurm is asked again in some seconds")

    def _accounted(self, names: list[str]) -> list[Row]:
        if not names or time.monotonic() < self._ask_accounting_from:
            return []
        try:
            rows = self._slurm.accounted(names)
        except Unavailable as error:
            log.warning("Slurm's accounting does not answer: %s", error.message)
            self._ask_accounting_from = time.monotonic() + ACCOUNTING_S
            return []
        if rows is None:  # a site that has none does not get one while we run
            self._ask_accounting_from = math.inf
        return rows or []

    def _alive(self, names: list[str]) -> list[str]:
        rows = self._asked(lambda: self._slurm.listed(names))
        return [row.id for row in rows if not judge(row.state).ended]

    def _settle(self, name: str) -> None:
        since = self._doubts[name]
        if since is None:
            self._doubts[name] = since = time.monotonic()
        if time.monotonic() - since < self._settle_s:
            raise Unavailable(f"sbatch failed for {name}, and the job may still turn up: Slurm is asked again")
        del self._doubts[name]


def _given(request: site.Request) -> dict[str, str]:
    """What sbatch is started with: by ``--export=ALL`` the job sees exactly this."""
    return request.environment | {k: v for k, v in slurm_commands.environment().items() if k == "SLURM_CONF"}


def _identity(name: str, folder: Path) -> tuple[str, ...]:
    """The flags that say which job it is and where its output goes, and that emflow rests on."""
    return (
        f"--job-name={name}",
        f"--comment=emflow {name}",
        f"--chdir={folder}",
        f"--output={slurm_commands.verbatim(folder / OUTPUT_FILE)}",
        "--open-mode=append",
        "--no-requeue",
        "--kill-on-invalid-dep=yes",
        "--export=ALL",
    )


def _claimed(name: str, folder: Path) -> list[str]:
    """The job that has worked in a run folder, which Slurm may have forgotten since."""
    try:
        claim = jsonfile.read(Claim, folder / CLAIM_FILE)
    except (FileNotFoundError, NotADirectoryError, FormatError):
        return []
    known = claim.job == name and claim.scheduler_id.isascii() and claim.scheduler_id.isdigit()
    return [claim.scheduler_id] if known else []


def _record_of_a_refusal(row: Row) -> bool:
    """Whether this was never a job: Slurm keeps a record of some that it refused, as failed and without a node."""
    return row.state == "FAILED" and not row.node


def _with_memory(status: JobStatus) -> JobStatus:
    """What a job had that ran out of memory, so that the next attempt gets more."""
    if status.cause is not EndCause.OUT_OF_MEMORY:
        return status
    return msgspec.structs.replace(status, memory_mib=slurm_commands.memory_mib(status.scheduler_id))
