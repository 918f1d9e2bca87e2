"""Run folders: the files that cross hosts, each whole or not there, in folders that are named by ids only.

``<root>/<day>/<acquisition>/`` holds ``acquisition.json``, ``ready-<n>.json``, ``source/`` and one folder ``<nn>/`` for
each job.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from emflow.acquisition_file import AcquisitionFile
from emflow.errors import EmflowError, NoSpace, NotAllowed, SubmitError, printable
from emflow.service_lock import holder, lock
from mpi_kernels import jsonfile
from mpi_kernels.contract import (
    ACQUISITION_ID,
    CLAIM_FILE,
    ERROR_FILE,
    HEARTBEAT_FILE,
    JOB_FILE,
    JOB_NAME,
    PARTIAL,
    RESULT_FILE,
    Claim,
    ErrorRecord,
    Event,
    JobSpec,
    Ready,
    ResultManifest,
)
from mpi_kernels.errors import FormatError

T = TypeVar("T")

ACQUISITION_FILE = "acquisition.json"
SOURCE_FOLDER = "source"
DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
STOPPED = "stopped"
"""Error code of a job that was stopped from outside; such an attempt says nothing of the data."""
NO_SPACE = "no-space"
NO_MEMORY = "memory"
"""Error code of a job that ran out of memory: it has one more attempt, with twice as much."""
LOST = "lost"
"""Begins the reason of a job that its scheduler or its node took away; such an attempt says nothing of the data."""
TIME_LIMIT = "time-limit"
"""Error code of a job that stopped because its time was nearly up."""
_READY = re.compile(r"ready-([0-9]{1,9})\.json")
_PARTIAL = re.compile(r"partial-([0-9]{1,9})\.json")
_INT64 = 1 << 63


class RunFolders:
    """All run folders below one root, which every compute node sees under the same path."""

    def __init__(self, root: str | os.PathLike[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.root = Path(root)
        self._clock = clock
        self._beats: dict[Path, tuple[int, int, float]] = {}

    # --- where things are

    def acquisition_folder(self, day: str, acquisition: str) -> Path:
        """``<root>/<day>/<acquisition>``."""
        if not DAY.fullmatch(day) or not ACQUISITION_ID.fullmatch(acquisition):
            raise ValueError(f"no name of a run folder: {day!r}, {acquisition!r}")
        return self.root / day / acquisition

    def make(self, folder: Path) -> Path:
        """Make a folder and those above it, so that they survive a power cut; a full disk is `NoSpace`."""
        try:
            _make(folder)
        except OSError as error:
            raise _translated(error, folder) from error
        return folder

    def source_folder(self, day: str, acquisition: str) -> Path:
        """Where the verified copy of an acquisition lies."""
        return self.acquisition_folder(day, acquisition) / SOURCE_FOLDER

    def job_folder(self, day: str, job: str) -> Path:
        """``<root>/<day>/<acquisition>/<nn>``."""
        found = JOB_NAME.fullmatch(job)
        if not found:
            raise ValueError(f"no name of a job: {job!r}")
        return self.acquisition_folder(day, found["acquisition"]) / found["attempt"]

    def acquisition_folders(self) -> Iterator[Path]:
        """Every folder that is named like an acquisition's, oldest day first; links are not followed."""
        for day in _folders(self.root, DAY):
            yield from _folders(day, ACQUISITION_ID)

    def job_folders(self, acquisition_folder: Path) -> Iterator[Path]:
        """The folders of an acquisition's jobs, first attempt first."""
        return _folders(acquisition_folder, re.compile("[0-9]{2}"))

    # --- written by the service

    def write_acquisition(self, record: AcquisitionFile) -> Path:
        """Publish ``acquisition.json``.

        One with the same digest stays as it is; one with another digest was never journalled (the service died in
        between and the file on the share has changed since), so it is replaced.
        """
        folder = self.acquisition_folder(record.day, record.id)
        path = folder / ACQUISITION_FILE
        try:
            if self.read_acquisition(record.day, record.id).transfer.digest == record.transfer.digest:
                return path
        except (FileNotFoundError, FormatError):
            pass
        _publish(path, record.encode())
        return path

    def read_acquisition(self, day: str, acquisition: str) -> AcquisitionFile:
        """Read ``acquisition.json``; FileNotFoundError passes through, `FormatError` if it is torn or foreign."""
        path = self.acquisition_folder(day, acquisition) / ACQUISITION_FILE
        record = AcquisitionFile.decode(path.read_bytes(), path=path)
        if (record.day, record.id) != (day, acquisition):
            raise FormatError(f"belongs to {record.day}/{record.id}, not to this folder", path=path)
        return record

    def write_job(self, spec: JobSpec, day: str) -> Path:
        """Make a job's folder and publish ``job.json`` in it; returns the folder.

        Raises
        ------
        SubmitError
            The folder already holds a different ``job.json``, which a job may have read.
        """
        folder = self.job_folder(day, spec.job)
        path, data = folder / JOB_FILE, jsonfile.encode(spec)
        try:
            known = path.read_bytes()
        except FileNotFoundError:
            _publish(path, data)
            return folder
        if known != data:
            raise SubmitError(
                f"{printable(str(path))}: holds a different job under the same name",
                next_step="Look at the file; emflow retry plans a new attempt",
            )
        return folder

    def publish_ready(self, folder: Path, *, frames: int, complete: bool, digest: str | None) -> Path:
        """Publish ``ready-<n>.json`` with the next ``n``; saying the same again changes nothing."""
        ready = Ready(frames=frames, complete=complete, digest=digest)
        newest = self.newest_ready(folder)
        if newest is not None and newest[1] == ready:
            return folder / f"ready-{newest[0]}.json"
        path = folder / f"ready-{newest[0] + 1 if newest else 1}.json"
        _publish(path, jsonfile.encode(ready))
        return path

    # --- read by the service

    def newest_ready(self, folder: Path) -> tuple[int, Ready] | None:
        """The newest ``n`` and its record, if there is one."""
        found = [_READY.fullmatch(path.name) for path in folder.glob("ready-*.json")]
        numbers = [int(name[1]) for name in found if name]
        if not numbers:
            return None
        return max(numbers), jsonfile.read(Ready, folder / f"ready-{max(numbers)}.json")

    def read_job(self, folder: Path) -> JobSpec | None:
        """``job.json``, if it was written."""
        return _read(JobSpec, folder / JOB_FILE)

    def read_claim(self, folder: Path) -> Claim | None:
        """``claim``, once the job's rank 0 has started."""
        return _read(Claim, folder / CLAIM_FILE)

    def read_result(self, folder: Path) -> ResultManifest | None:
        """``result.json``, the commit: without it there is no result."""
        return _read(ResultManifest, folder / RESULT_FILE)

    def newest_partial(self, folder: Path) -> ResultManifest | None:
        """The last ``partial-<n>.json`` of a job, if it left one that is whole."""
        found = [_PARTIAL.fullmatch(path.name) for path in folder.glob("partial-*.json")]
        newest = max((int(name[1]) for name in found if name), default=0)
        try:
            return _read(ResultManifest, folder / f"{PARTIAL.format(newest)}.json") if newest else None
        except (FormatError, OSError):
            return None

    def result_is_whole(self, folder: Path, manifest: ResultManifest) -> bool:
        """Whether the result file is the one that the manifest was written for."""
        try:
            with (folder / manifest.result).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == manifest.result_sha256
        except OSError:
            return False

    def has_acquisitions(self) -> bool:
        """Whether there is anything that a journal must know of."""
        return any((folder / ACQUISITION_FILE).exists() for folder in self.acquisition_folders())

    def read_error(self, folder: Path) -> ErrorRecord | None:
        """``error.json``, if the job could say why it failed."""
        return _read(ErrorRecord, folder / ERROR_FILE)

    def heartbeat_age(self, folder: Path) -> float | None:
        """Seconds since the heartbeat was last seen to change; None if there is none.

        The clocks of two hosts differ, so the file's date is only compared with itself.  Counted from the first look
        of this object.
        """
        try:
            stat = (folder / HEARTBEAT_FILE).stat()
        except OSError:
            return None
        now, seen = self._clock(), self._beats.get(folder)
        if seen is None or seen[:2] != (stat.st_mtime_ns, stat.st_size):
            self._beats.pop(folder, None)
            self._beats[folder] = seen = (stat.st_mtime_ns, stat.st_size, now)
            if len(self._beats) > 4096:  # jobs that ended long ago
                del self._beats[next(iter(self._beats))]
        return now - seen[2]

    def collect_events(self, folder: Path, problems: list[str] | None = None) -> list[Event]:
        """Events that other processes wrote in a folder; what is torn or foreign is left out, and told in ``problems``.

        A last line without a newline is still being written, or was cut by a crash: it is left out silently.
        """
        events: list[Event] = []
        for path in sorted(folder.glob("events-*.jsonl")):
            try:
                lines = path.read_bytes().split(b"\n")[:-1]
            except OSError as error:
                _tell(problems, f"{printable(str(path))}: {error.strerror}")
                continue
            for number, line in enumerate(lines, 1):
                try:
                    event = jsonfile.decode(Event, line)
                except FormatError as error:
                    _tell(problems, f"{printable(str(path))}:{number}: {printable(str(error))}")
                    continue
                if _fits(event):
                    events.append(event)
                else:
                    _tell(problems, f"{printable(str(path))}:{number}: a number that the journal can't hold")
        return events


def failure_reason(error: ErrorRecord) -> str:
    """What the journal keeps of an ``error.json``; starts with ``final`` where another attempt can't help."""
    text = error.message + (f" (frame {error.frame})" if error.frame is not None else "")
    text += f". {error.next_step}" if error.next_step else ""
    if error.code in (STOPPED, NO_SPACE, NO_MEMORY):
        return f"{error.code}: {text}"
    return text if error.retryable else f"final: {text}"


def _fits(event: Event) -> bool:
    """Whether the journal can hold it: 64-bit numbers, and facts that are JSON (1e999 is read as infinity)."""
    if not all(-_INT64 <= n < _INT64 for n in (event.pid, event.seq, event.wall_ns, event.mono_ns)):
        return False
    try:
        jsonfile.encode(event)
    except (ValueError, RecursionError):
        return False
    return True


def _tell(problems: list[str] | None, text: str) -> None:
    if problems is not None:
        problems.append(text)


def _read(cls: type[T], path: Path) -> T | None:
    try:
        return jsonfile.read(cls, path)
    except FileNotFoundError:
        return None


def _publish(path: Path, data: bytes) -> None:
    """Publish a file, and make its folder first, so that both survive a power cut; a full disk is `NoSpace`."""
    try:
        _make(path.parent)
        jsonfile.publish(path, data)
    except OSError as error:
        raise _translated(error, path) from error


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        jsonfile.sync_folder(folder.parent)


def _translated(error: OSError, path: Path) -> EmflowError | OSError:
    where = printable(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{where}: {error.strerror}", next_step="Make room on the disk of the run folders")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotAllowed(f"{where}: {error.strerror}", next_step="The service must be able to write its run folders")
    return error


def _folders(parent: Path, name: re.Pattern[str]) -> Iterator[Path]:
    try:
        with os.scandir(parent) as entries:
            found = sorted(e.name for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (parent / n for n in found)


__all__ = ["LOST", "NO_MEMORY", "NO_SPACE", "STOPPED", "TIME_LIMIT"]
__all__ += ["AcquisitionFile", "RunFolders", "failure_reason", "holder", "lock"]
