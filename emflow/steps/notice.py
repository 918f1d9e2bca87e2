"""Notice: what a scan finds new or changed becomes an acquisition, or news about one."""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import UTC, datetime

from emflow.errors import Unavailable
from emflow.microscope.sidecar import command_of, command_of_note
from emflow.records import Acquisition, AcquisitionState, Fingerprint, acquisition_id
from emflow.steps.context import Context, Look, Watched, log
from emflow.watch.walk import Sighting
from mpi_kernels.errors import printable

UNDIGESTED = frozenset(
    {AcquisitionState.GROWING, AcquisitionState.READY, AcquisitionState.STALLED, AcquisitionState.QUARANTINED}
)


def notice(context: Context) -> None:
    """Collect hints, scan what is due, and journal what was found in one transaction per share."""
    for watched in context.watches.values():
        dirty, closed = watched.hints.wait(0), watched.hints.closed()
        watched.scanner.mark(dirty, closed)
        _hasten(context, watched, closed)
        watched.scanner.live_hints = watched.hints.live
        if watched.hints.degraded != watched.degraded:
            watched.degraded = watched.hints.degraded
            log.warning("share %s: %s", watched.share, watched.degraded or "live hints again")
        if watched.scanner.next_due() > context.clock():
            continue
        alarm = f"share {watched.share}"
        try:
            sightings = watched.scanner.scan()
        except Unavailable as error:
            context.raise_alarm(alarm, str(error))
            continue
        context.clear_alarm(alarm)
        try:
            with context.journal.transaction():
                for sighting in sightings:
                    _sight(context, watched, sighting)
        except BaseException:
            for sighting in sightings:  # not journalled: the next scan has to tell again
                watched.scanner.forget(sighting.relpath)
            raise


def _hasten(context: Context, watched: Watched, closed: Collection[bytes]) -> None:
    """Examine at once what its writer has closed; the scan alone sees no difference where the last bytes are older."""
    for relpath in closed if context.looks else ():
        known = context.journal.latest(watched.share, relpath)
        if known is not None and known.id in context.looks:
            context.looks[known.id].due = 0.0
        elif (command := command_of_note(relpath)) is not None:
            for look in context.looks.values():
                if look.acquisition.trace == command:
                    look.due = 0.0


def _sight(context: Context, watched: Watched, sighting: Sighting) -> None:
    known = context.journal.latest(watched.share, sighting.relpath)
    if known is None:
        _add(context, watched, sighting, generation=0, supersedes=None)
    elif known.state in UNDIGESTED and known.digest is None:
        _news(context, known, sighting)
    elif rewritten(known.fingerprint, sighting.fingerprint):
        # rewritten after its digest was bound: another acquisition, whose digest decides which one stands
        stands = known.supersedes if known.state is AcquisitionState.SUPERSEDED else known.id
        _add(context, watched, sighting, generation=known.generation + 1, supersedes=stands)


def _add(context: Context, watched: Watched, sighting: Sighting, *, generation: int, supersedes: str | None) -> None:
    now = time.time_ns()
    key = acquisition_id(watched.share, sighting.relpath, generation)
    acquisition = Acquisition(
        id=key,
        share=watched.share,
        relpath=sighting.relpath,
        generation=generation,
        state=AcquisitionState.GROWING,
        day=datetime.fromtimestamp(now / 1e9, UTC).date().isoformat(),
        trace=command_of(sighting.relpath) or key,  # from the command that made it to the one that it leads to
        seen_ns=now,
        changed_ns=now,
        fingerprint=sighting.fingerprint,
        supersedes=supersedes,
    )
    context.journal.add_acquisition(acquisition, attrs={"path": acquisition.name, "bytes": sighting.fingerprint.size})
    log.info("noticed %s", printable(acquisition.name), extra={"acquisition": key})
    if sighting.problem:
        quarantine(context, acquisition, sighting.problem)
    else:
        context.looks[key] = Look(acquisition)
        watched.scanner.activate(sighting.relpath)


def _news(context: Context, known: Acquisition, sighting: Sighting) -> None:
    if sighting.problem:
        if known.state is not AcquisitionState.QUARANTINED:
            quarantine(context, known, sighting.problem)
        return
    if known.state in (AcquisitionState.STALLED, AcquisitionState.QUARANTINED):
        known = grow_again(context, known, "")
    elif known.state is AcquisitionState.READY and rewritten(known.fingerprint, sighting.fingerprint):
        known = grow_again(context, known, "it changed before it was copied")
    known = context.journal.update_acquisition(known.id, known.state, fingerprint=sighting.fingerprint)
    if known.state is AcquisitionState.GROWING:
        context.looks[known.id] = Look(known)
        context.watches[known.share].scanner.activate(known.relpath)


def rewritten(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether two stats speak of different bytes; a change of owner, mode or links alone does not."""
    return (before.size, before.mtime_ns) != (now.size, now.mtime_ns)


def grow_again(context: Context, acquisition: Acquisition, reason: str, *, after_s: float = 0.0) -> Acquisition:
    """Judge an acquisition anew, ``after_s`` from now: its file changed since it was judged."""
    grown = context.journal.move_acquisition(
        acquisition.id,
        acquisition.state,
        AcquisitionState.GROWING,
        reason=reason,
        attrs={"because": "the file changed"},
    )
    context.headers.pop(grown.id, None)
    context.looks[grown.id] = Look(grown, due=context.clock() + after_s)
    if grown.share in context.watches:
        context.watches[grown.share].scanner.activate(grown.relpath)
    return grown


def quarantine(context: Context, acquisition: Acquisition, reason: str) -> None:
    """Set an acquisition aside with the reason; nothing is lost and the loop goes on."""
    context.journal.move_acquisition(acquisition.id, acquisition.state, AcquisitionState.QUARANTINED, reason=reason)
    log.error(
        "quarantined %s: %s. Mend the cause, then: emflow retry %s",
        printable(acquisition.name),
        reason,
        acquisition.id,
        extra={"acquisition": acquisition.id},
    )
    context.headers.pop(acquisition.id, None)
    forget(context, acquisition)


def forget(context: Context, acquisition: Acquisition) -> None:
    """Stop looking at an acquisition that is no longer growing."""
    context.looks.pop(acquisition.id, None)
    context.clear_alarm(f"trouble {acquisition.id}")
    context.settling.forget(acquisition.id)
    watched = context.watches.get(acquisition.share)
    if watched is not None:
        watched.scanner.rest(acquisition.relpath)
