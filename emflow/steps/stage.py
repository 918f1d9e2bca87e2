"""Stage: a verified copy of every complete acquisition, made by a few worker threads."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future
from pathlib import Path

from emflow.errors import EmflowError, NoSpace, NotAllowed, SourceChanged, Unavailable
from emflow.growing_copy import GrowingCopy
from emflow.records import Acquisition, AcquisitionState, Transfer
from emflow.runs import AcquisitionFile
from emflow.steps.context import RETRY_S, Context, log
from emflow.steps.live import give_up
from emflow.steps.notice import grow_again, quarantine, rewritten
from emflow.transfer import digest_of
from emflow.transfer import stage as copy_members
from mpi_kernels.contract import Header
from mpi_kernels.errors import KernelError, printable

MemberPaths = tuple[tuple[str, bytes, str], ...]


def stage(context: Context) -> None:
    """Collect finished copies, then start as many as there are workers, room and complete acquisitions."""
    for key, future in list(context.transfers.items()):
        if future.done():
            del context.transfers[key]
            with context.going_on(key):
                _collect(context, context.journal.acquisition(key), future)
    free = context.config.transfer.workers - len(context.transfers)
    if free <= 0 or context.stopping.is_set():
        return
    for acquisition in context.journal.walk(AcquisitionState.READY):
        if free <= 0:
            return
        if acquisition.id not in context.transfers and not context.waits(acquisition.id):
            with context.going_on(acquisition.id):
                free -= _start(context, acquisition)


def _start(context: Context, acquisition: Acquisition) -> int:
    path = context.path_of(acquisition)
    if path is None:
        context.not_watched(acquisition)
        return 0
    try:
        header = context.headers.pop(acquisition.id, None) or context.prober.probe(os.fspath(path), context.stopping)[1]
    except KernelError as error:  # it was complete a moment ago: look again from the start
        _grow_again(context, acquisition, str(error))
        return 0
    needed = sum(m.size for m in header.members) if context.config.transfer.stage == "copy" else 0
    if not context.room(needed, "staging"):
        context.headers[acquisition.id] = header
        context.back_off(acquisition.id, RETRY_S)
        return 0
    stands = context.journal.acquisition(acquisition.supersedes).digest if acquisition.supersedes else None
    growing = context.live[acquisition.id].copy if acquisition.id in context.live else None
    work = functools.partial(_work, context, acquisition, header, stands, growing)
    future = context.pool.submit(work)
    future.add_done_callback(lambda _: context.wake())
    context.transfers[acquisition.id] = future
    return 1


def _work(
    context: Context, acquisition: Acquisition, header: Header, stands: str | None, growing: GrowingCopy | None
) -> Transfer:
    """Copy, or with ``stage = "none"`` only read; runs in a worker thread and touches no journal.

    A file that was copied before, with the digest ``stands``, is read first: touched, but the same bytes, it needs
    no second copy.
    """
    folder = os.fsencode(Path(header.members[0].path).parent)
    inside = acquisition.relpath.rpartition(b"/")[0]
    members = tuple(
        (m.path, os.path.normpath(os.path.join(inside, os.path.relpath(os.fsencode(m.path), folder))), m.suffix)  # noqa: PTH118
        for m in header.members
    )
    if growing is not None and (transfer := growing.finished(members)) is not None:
        return transfer
    if stands is not None or context.config.transfer.stage == "none":
        read = digest_of(members, stop=context.stopping)
        if read.digest == stands or context.config.transfer.stage == "none":
            return read
    target = context.runs.make(context.runs.source_folder(acquisition.day, acquisition.id))
    return copy_members(members, target, acquisition.id, stop=context.stopping)


def _collect(context: Context, acquisition: Acquisition, future: Future[Transfer]) -> None:
    if acquisition.state is not AcquisitionState.READY:  # it changed meanwhile: this copy is of older bytes, or of both
        return
    try:
        transfer = future.result()
    except SourceChanged as error:
        _grow_again(context, acquisition, str(error))
    except (NoSpace, NotAllowed):  # of the run folders; whether the file may be read, its probe has told
        raise
    except Unavailable as error:
        context.raise_alarm(f"copy from {acquisition.share}", str(error))
        context.back_off(acquisition.id, RETRY_S)
    except EmflowError as error:
        if not context.stopping.is_set():
            quarantine(context, acquisition, str(error))
    else:
        entry = context.live.get(acquisition.id)
        if entry is not None and entry.copy.failed:  # a job may follow it: nothing of that may count any more
            give_up(context, entry, entry.copy.failed)
        if rewritten(acquisition.fingerprint, transfer.members[0].fingerprint):  # not the bytes that were judged
            _grow_again(context, acquisition, "it changed before it was copied")
        else:
            _staged(context, acquisition, transfer)


def _grow_again(context: Context, acquisition: Acquisition, reason: str) -> None:
    if acquisition.id in context.live:
        give_up(context, context.live[acquisition.id], reason)
    grow_again(context, acquisition, reason, after_s=context.config.scan.active_s)


def _staged(context: Context, acquisition: Acquisition, transfer: Transfer) -> None:
    """Bind the digest: files first, then the journal, so that a crash in between only repeats this."""
    journal = context.journal
    stands = journal.acquisition(acquisition.supersedes) if acquisition.supersedes else None
    attrs = {"digest": transfer.digest, "bytes": transfer.bytes, "seconds": round(transfer.seconds, 6)}
    if stands is not None and stands.digest == transfer.digest:
        journal.move_acquisition(
            acquisition.id,
            AcquisitionState.READY,
            AcquisitionState.SUPERSEDED,
            reason=f"same bytes as {stands.id}",
            attrs=attrs,
            digest=transfer.digest,
        )
        return
    context.runs.write_acquisition(AcquisitionFile.of(acquisition, transfer))
    folder = context.runs.acquisition_folder(acquisition.day, acquisition.id)
    context.runs.publish_ready(folder, frames=acquisition.frames, complete=True, digest=transfer.digest)
    with journal.transaction():
        journal.move_acquisition(
            acquisition.id, AcquisitionState.READY, AcquisitionState.STAGED, attrs=attrs, digest=transfer.digest
        )
        if stands is not None and stands.state is not AcquisitionState.SUPERSEDED:
            journal.move_acquisition(
                stands.id, stands.state, AcquisitionState.SUPERSEDED, reason=f"rewritten: {acquisition.id}"
            )
    context.live.pop(acquisition.id, None)  # its job ends with the digest that it has now been told
    context.clear_alarm(f"copy from {acquisition.share}")
    context.not_before.pop(acquisition.id, None)
    log.info("staged %s", printable(acquisition.name), extra={"acquisition": acquisition.id})
