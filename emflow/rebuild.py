"""The journal made anew from the run folders: they are the truth, it only remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from emflow.errors import EmflowError, JournalError, printable
from emflow.journal import Journal
from emflow.journal_usage import by_day
from emflow.records import AcquisitionState, Job, JobState
from emflow.runs import AcquisitionFile, RunFolders, failure_reason, lock
from mpi_kernels import jsonfile
from mpi_kernels.contract import Claim, ErrorRecord, JobSpec, ResultManifest
from mpi_kernels.errors import FormatError

R = TypeVar("R", JobSpec, Claim, ResultManifest, ErrorRecord)

_PAGE = 1000
_BESIDE = ("", "-wal", "-shm")
"""The three files of a SQLite database in WAL mode (sqlite.org/walformat.html)."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebuild found.

    ``problems`` names each file that was left out and why; ``backup`` is where the old journal lies now.
    """

    acquisitions: int
    jobs: int
    events: int
    problems: tuple[str, ...]
    backup: str | None


class _Found(msgspec.Struct, kw_only=True):
    records: list[AcquisitionFile]
    jobs: list[Job]
    problems: list[str]
    begun: dict[str, int]
    """When each job claimed its folder."""


def rebuild(runs: RunFolders, journal_path: Path, *, results: Path | None = None, force: bool = False) -> Counts:
    """Make a new journal from the run folders and put it in the old one's place.

    Parameters
    ----------
    runs : RunFolders
        Where to look.
    journal_path : Path
        The journal; its folder is the state folder.  An old one is kept as ``journal.<time>.bak``, and what its event
        table still tells is taken over.
    results : Path, optional
        Where results are copied to for people.  If given, an acquisition is DONE only where its copy is there; with
        any other result it is STAGED, and the service makes the copy.
    force : bool
        Go on although no run folder is found while the old journal knows acquisitions.

    Raises
    ------
    Busy
        A service holds the lock of the state folder.
    EmflowError
        Nothing is found (the runs folder may not be mounted) and the old journal knows more; it stays in its place.

    Notes
    -----
    Until it is complete the new journal is called ``<journal>.new``; while that exists nobody opens the journal, so
    that a rebuild that was killed at any point can only be followed by another one.
    """
    journal_path.parent.mkdir(parents=True, exist_ok=True)
    with lock(journal_path.parent):
        new = journal_path.with_name(journal_path.name + ".new")
        _remove(new)
        problems: list[str] = []
        try:
            with _old_journal(journal_path, problems) as old, Journal(new) as journal, journal.transaction():
                found = _read(runs, problems)
                if not found.records and not force:
                    _refuse_to_forget(old, runs)
                events = _take_over(journal, old, problems) + _collect(journal, runs, found)
                added, jobs = _write(journal, found, results, old)
        except BaseException:
            _remove(new)
            raise
        backup = _set_aside(journal_path)
        new.rename(journal_path)
        jsonfile.sync_folder(journal_path.parent)
    return Counts(
        acquisitions=added,
        jobs=jobs,
        events=events,
        problems=tuple(problems),
        backup=None if backup is None else str(backup),
    )


# --- reading


def _read(runs: RunFolders, problems: list[str]) -> _Found:
    found = _Found(records=[], jobs=[], problems=problems, begun={})
    for folder in runs.acquisition_folders():
        try:
            record = runs.read_acquisition(folder.parent.name, folder.name)
        except FileNotFoundError:
            continue  # not staged yet, or the source of a copy that was cut short: the next scan finds it again
        except (FormatError, OSError) as error:
            problems.append(str(error))
            continue
        found.records.append(record)
        for job_folder in runs.job_folders(folder):
            job = _job(runs, folder.name, job_folder, found)
            found.jobs += [job] if job is not None else []
    found.records.sort(key=lambda record: (record.seen_ns, record.id))
    return found


def _refuse_to_forget(old: Journal | None, runs: RunFolders) -> None:
    """Raise if the old journal knows acquisitions; one whose tables are damaged knows none that could be lost."""
    try:
        known = sum(old.counts()[0].values()) if old is not None else 0
    except (EmflowError, ValueError):
        return
    if known:
        raise EmflowError(
            f"no acquisition is found in {printable(str(runs.root))}, but the journal knows {known}: is runs mounted? "
            "Nothing was changed",
            next_step="Mount it, or correct runs in [service]; emflow rebuild --force goes on without them",
        )


def _job(runs: RunFolders, acquisition: str, folder: Path, found: _Found) -> Job | None:
    """A job in the state that its files prove; what they don't, the running service asks the scheduler."""
    name, problems = f"{acquisition}-{folder.name}", found.problems
    job = Job(
        name=name, acquisition=acquisition, attempt=int(folder.name), state=JobState.FAILED, recipe="", scheduler=""
    )
    spec, damaged = _file(runs.read_job, folder, name, problems)
    if damaged:  # kept, so that its number is not used again
        return msgspec.structs.replace(job, reason="job.json is damaged")
    if spec is None:
        return None
    claim, claimed = _file(runs.read_claim, folder, name, problems)  # made in place, so a crash can leave it empty
    result, _ = _file(runs.read_result, folder, name, problems)
    error, _ = _file(runs.read_error, folder, name, problems)
    # nothing there says that it was sent, so the name is looked up before it is sent again
    state = JobState.RUNNING if claim is not None or claimed else JobState.SUBMITTING
    if result is not None or error is not None:
        state = JobState.REDUCED if result is not None else JobState.FAILED
    last = result or error or claim
    if claim is not None:
        found.begun[name] = claim.wall_ns
    return msgspec.structs.replace(
        job,
        state=state,
        recipe=spec.recipe.name,
        scheduler=spec.scheduler,
        scheduler_id=claim.scheduler_id if claim is not None else "",
        reason=failure_reason(error) if error is not None and result is None else "",
        planned_ns=spec.planned_ns,
        changed_ns=last.wall_ns if last is not None else spec.planned_ns,
    )


def _file(read: Callable[[Path], R | None], folder: Path, name: str, problems: list[str]) -> tuple[R | None, bool]:
    """Read one record of a job's folder, and whether it is there but can't be read; that is reported."""
    try:
        record = read(folder)
        if record is not None and record.job != name:
            raise FormatError(f"holds a record of job {printable(record.job)}, not of {name}", path=folder)
    except (FormatError, OSError) as error:
        problems.append(str(error))
        return None, True
    return record, False


# --- writing


def _write(journal: Journal, found: _Found, results: Path | None, old: Journal | None) -> tuple[int, int]:
    reduced = {job.acquisition for job in found.jobs if job.state is JobState.REDUCED}
    replaced = {record.supersedes for record in found.records}
    added: set[str] = set()
    jobs = 0
    for record in found.records:
        state = AcquisitionState.STAGED
        if record.id in reduced and (results is None or (results / f"{record.id}_emflow.h5").exists()):
            state = AcquisitionState.DONE
        if record.id in replaced:
            state = AcquisitionState.SUPERSEDED
        with _left_out(found.problems, f"{record.day}/{record.id}"):
            if journal.add_acquisition(record.acquisition(state), event="rebuilt", attrs={"state": str(state)}):
                added.add(record.id)
            else:  # a copy of a run folder under another day
                found.problems.append(f"{record.day}/{record.id}: there twice")
    for job in found.jobs:
        with _left_out(found.problems, job.name):
            if job.acquisition in added:
                jobs += _add_job(journal, job, found.begun.get(job.name, job.changed_ns), old)
    return len(added), jobs


def _add_job(journal: Journal, job: Job, begun_ns: int, old: Journal | None) -> bool:
    """Add a job with what it cost: as the old journal has it, else of one node from its claim to its last word."""
    spent = by_day(begun_ns, job.changed_ns, 1)
    try:
        if old is not None:
            known = old.job(job.name)
            job = msgspec.structs.replace(
                job, memory_mib=known.memory_mib, nodes=known.nodes, started_ns=known.started_ns
            )
            spent = old.usage.of_job(job.name) or spent
    except (EmflowError, ValueError):
        pass  # not known to it, or damaged
    if not journal.add_job(job, event="rebuilt", attrs={"state": str(job.state)}):
        return False
    journal.usage.book(job.name, spent)
    return True


@contextlib.contextmanager
def _left_out(problems: list[str], name: str) -> Iterator[None]:
    """Report what the tables refuse (a foreign record that only looks right) and go on."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        problems.append(f"{name}: {printable(str(error))}")


@contextlib.contextmanager
def _old_journal(path: Path, problems: list[str]) -> Iterator[Journal | None]:
    with contextlib.ExitStack() as stack:
        old = None
        if path.exists():
            try:
                old = stack.enter_context(_opened(path))
            except EmflowError as error:
                problems.append(f"the old journal's events are not taken over: {error.message}")
        yield old


def _opened(path: Path) -> Journal:
    """Open the old journal to read; one of an older emflow gets today's tables first."""
    try:
        return Journal(path, read_only=True)
    except JournalError:
        with contextlib.suppress(EmflowError):
            Journal(path).close()
        return Journal(path, read_only=True)


def _take_over(journal: Journal, old: Journal | None, problems: list[str]) -> int:
    """Copy the events that the old journal can still tell; most of them are nowhere else."""
    after = taken = 0
    while old is not None:
        try:
            page = old.events(after=after, limit=_PAGE)
        except (EmflowError, ValueError) as error:
            problems.append(f"the old journal's events after number {after} are lost: {error}")
            break
        if not page:
            break
        taken += journal.merge(event for _, event in page)
        after = page[-1][0]
    return taken


def _collect(journal: Journal, runs: RunFolders, found: _Found) -> int:
    collected = 0
    for record in found.records:
        folder = runs.acquisition_folder(record.day, record.id)
        for place in (folder, *runs.job_folders(folder)):
            collected += journal.merge(runs.collect_events(place, found.problems))
    return collected


# --- files


def _set_aside(path: Path) -> Path | None:
    """Rename the old journal with its log; together they stay a database that opens under the new name."""
    if not any(_beside(path, end).exists() for end in _BESIDE):
        return None
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    backup = path.with_name(f"{path.stem}.{now}.bak")
    for end in _BESIDE:
        if _beside(path, end).exists():
            _beside(path, end).rename(_beside(backup, end))
    return backup


def _remove(path: Path) -> None:
    for end in _BESIDE:
        _beside(path, end).unlink(missing_ok=True)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)
