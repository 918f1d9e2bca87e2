"""Finds results in run folders, and checks all that has to hold before anything may be based on one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from emflow.acquisition_file import AcquisitionFile
from emflow.agent.protocol import Policy
from emflow.agent.records import Seen
from emflow.agent.results import LoadedResult, ResultError, read_once
from emflow.errors import printable
from emflow.microscope.sidecar import command_of
from emflow.runs import ACQUISITION_FILE, DAY
from mpi_kernels import jsonfile
from mpi_kernels.contract import (
    ACQUISITION_ID,
    ERROR_FILE,
    JOB_FILE,
    RESULT_FILE,
    RESULT_H5,
    ErrorRecord,
    JobSpec,
    ReductionSpec,
    ResultManifest,
)
from mpi_kernels.errors import FormatError

ATTEMPTS = tuple(f"{n:02d}" for n in range(1, 100))
WHOLE_S = 1.0
"""How often all days are looked through; in between only the newest two, since a scan that was just made is there."""


class Finder:
    """Looks for results below the folder of runs; a poll costs a few stats however many acquisitions there are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, Path] = {}
        self._whole_at: dict[str, float] = {}

    def folder(self, acquisition: str) -> Path | None:
        """The acquisition's folder, wherever its day is; the newest day first."""
        if acquisition in self._folders:
            return self._folders[acquisition]
        days = self.days()
        now = time.monotonic()
        if now - self._whole_at.get(acquisition, -WHOLE_S) < WHOLE_S:
            days = days[:2]
        else:
            self._whole_at[acquisition] = now
        found = next((day / acquisition for day in days if (day / acquisition).is_dir()), None)
        if found:
            self._folders[acquisition] = found
        return found

    def days(self) -> list[Path]:
        """Folders of days, the newest first."""
        try:
            names = [n for n in os.listdir(self.root) if DAY.fullmatch(n)]  # noqa: PTH208  names only, each poll
        except FileNotFoundError:
            return []
        return [self.root / n for n in sorted(names, reverse=True)]

    def complete(self, acquisition: str) -> Path | None:
        """Run folder of the first attempt that has a result; None while there is none."""
        folder = self.folder(acquisition)
        return None if folder is None else first_complete(folder)

    def said(self, acquisition: str) -> str:
        """What the newest failed attempt told, for people."""
        folder = self._folders.get(acquisition)
        for attempt in reversed(_attempts(folder)) if folder else ():
            try:
                error = jsonfile.read(ErrorRecord, attempt / ERROR_FILE)
            except (OSError, FormatError):
                continue
            return f"{error.job}: {printable(error.message)}"
        return "no attempt has told anything" if folder else "its run folder is not there"

    def recent(self, ignore: Iterable[str]) -> Iterator[Path]:
        """Run folders with a result of the newest two days' acquisitions, but for those to ignore, oldest first."""
        known = set(ignore)
        for day in reversed(self.days()[:2]):
            for name in sorted(os.listdir(day)):  # noqa: PTH208
                if name not in known and ACQUISITION_ID.fullmatch(name):
                    done = first_complete(day / name)
                    if done:
                        yield done


def first_complete(folder: Path) -> Path | None:
    """The first attempt of an acquisition's folder that has a result."""
    return next((attempt for attempt in _attempts(folder) if (attempt / RESULT_FILE).exists()), None)


def _attempts(folder: Path) -> list[Path]:
    try:
        names = set(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []
    return [folder / n for n in ATTEMPTS if n in names]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a result must be of.

    Attributes
    ----------
    acquisition : str
        Its acquisition.
    command : str or None
        The command that made it, whose id is also its trace; None where no command is waited for.
    settings : mapping
        All controls when the scan was made.
    changed : tuple of str
        Controls of the policy that somebody turned while it was made.
    used : set of str
        Jobs and acquisitions that were decided on before.
    made_by : tuple of ReductionSpec
        What the policy reads must have been made so, whatever recipe the service has by now.
    """

    acquisition: str
    command: str | None
    settings: Mapping[str, float]
    changed: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()
    made_by: tuple[ReductionSpec, ...] = ()


def examine(
    root: Path, folder: Path, wanted: Wanted, policy: Policy, reductions: tuple[str, ...]
) -> tuple[Seen, LoadedResult | None]:
    """Read a result and check it; without a result, ``Seen.distrusted`` says why nothing may be based on it."""
    job = f"{folder.parent.name}-{folder.name}"
    path = (folder / RESULT_H5).relative_to(root).as_posix()
    seen = Seen(
        job=job,
        acquisition=wanted.acquisition,
        command=wanted.command or "",
        path=path,
        settings=dict(wanted.settings),
    )
    try:
        manifest = jsonfile.read(ResultManifest, folder / RESULT_FILE)
    except (OSError, FormatError) as error:
        return _distrusted(seen, f"its {RESULT_FILE} can't be read: {printable(str(error))}"), None
    try:
        seen = _as_logged(seen, manifest)
    except (ValueError, OverflowError) as error:
        return _distrusted(seen, f"its {RESULT_FILE} holds what no log can: {printable(str(error))}"), None
    reason = _foreign(manifest, job, wanted) or _unfit(manifest, policy, reductions, wanted)
    reason = reason or _other_bytes(folder, manifest) or _made_otherwise(folder, wanted.made_by)
    if reason:
        return _distrusted(seen, reason), None
    try:
        data, digest = read_once(folder / RESULT_H5)
        seen = msgspec.structs.replace(seen, result_sha256=digest)
        if digest != manifest.result_sha256:
            return _distrusted(seen, f"{RESULT_H5} is not the file that {RESULT_FILE} was written for"), None
        return seen, LoadedResult(seen, data)
    except ResultError as error:
        return _distrusted(seen, error.message), None


def _as_logged(seen: Seen, manifest: ResultManifest) -> Seen:
    """The facts of a manifest as they come back from the log, so that a replay decides on the very same."""
    whole = msgspec.structs.replace(
        seen,
        command=seen.command or _command(manifest),
        quality=manifest.quality,
        quality_reasons=manifest.quality_reasons,
        coverage=manifest.coverage,
        scalars=manifest.scalars,
        outputs=manifest.outputs,
    )
    return msgspec.json.decode(msgspec.json.encode(whole), type=Seen)


def stale(root: Path, folder: Path, command: str) -> Seen:
    """The record of a result that nothing waits for."""
    return Seen(
        job=f"{folder.parent.name}-{folder.name}",
        acquisition=folder.parent.name,
        command=command,
        path=(folder / RESULT_H5).relative_to(root).as_posix(),
        distrusted="stale: no decision waits for it",
    )


def _distrusted(seen: Seen, reason: str) -> Seen:
    return msgspec.structs.replace(seen, distrusted=reason)


def _command(manifest: ResultManifest) -> str:
    """The command that an acquisition's trace names, if one made it."""
    return command_of(os.fsencode(manifest.trace)) or ""


def _foreign(manifest: ResultManifest, job: str, wanted: Wanted) -> str:
    """Why it is not the result that is waited for."""
    if manifest.result != RESULT_H5:
        return f"its manifest names {printable(manifest.result)}, not {RESULT_H5}"
    if manifest.acquisition != wanted.acquisition or manifest.job != job:
        return f"it says that it is job {printable(manifest.job)}, but lies where {job} does"
    if wanted.command is not None and manifest.trace != wanted.command:
        return f"it is of command {printable(manifest.trace)}, not of {wanted.command}"
    if job in wanted.used or wanted.acquisition in wanted.used:
        return f"{job} was decided on before"
    return ""


def _unfit(manifest: ResultManifest, policy: Policy, reductions: tuple[str, ...], wanted: Wanted) -> str:
    """Why it may not be believed though it is the right one."""
    if manifest.quality != "OK":
        return f"quality {manifest.quality}: {'; '.join(map(printable, manifest.quality_reasons)) or 'no reason given'}"
    whole = not manifest.partial and manifest.coverage >= 1.0
    if not whole and not policy.accepts_partial(manifest.coverage):
        return f"only {manifest.coverage:.0%} of the scan is in it"
    there = {output.strip("/").partition("/")[0] for output in manifest.outputs} | set(manifest.scalars)
    absent = [name for name in reductions if name not in there]
    # what does not apply to this kind of data is no lack, unless nothing is left
    lacking = absent if len(absent) == len(reductions) else [n for n in absent if n not in manifest.skipped]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    if wanted.changed:
        return f"{', '.join(wanted.changed)} changed while the scan was made"
    return ""


def _made_otherwise(folder: Path, made_by: tuple[ReductionSpec, ...]) -> str:
    """Why a job did not compute what the policy reads; empty where it did."""
    if not made_by:
        return ""
    try:
        recipe = jsonfile.read(JobSpec, folder / JOB_FILE).recipe
    except (OSError, FormatError) as error:
        return f"its {JOB_FILE} can't be read: {printable(str(error))}"
    other = [one.name for one in made_by if one not in recipe.reductions]
    return f"its recipe {printable(recipe.name)} makes {', '.join(other)} otherwise than the policy's" if other else ""


def _other_bytes(folder: Path, manifest: ResultManifest) -> str:
    """Why a result is not of the bytes that were copied from the share; empty where it is, or nothing says."""
    path = folder.parent / ACQUISITION_FILE
    try:
        record = AcquisitionFile.decode(path.read_bytes(), path=path)
    except FileNotFoundError:
        return ""
    except (OSError, FormatError) as error:
        return f"{ACQUISITION_FILE} can't be read: {printable(str(error))}"
    if manifest.source_digest != record.transfer.digest:
        return "it was made from other bytes than those that were copied from the share"
    return ""
