"""Examine: decide whether a growing acquisition is complete, stalled, or can never be read."""

from __future__ import annotations

import os
from pathlib import Path

from emflow.microscope.sidecar import command_of, sidecar_path
from emflow.microscope.sidecar import read as read_note
from emflow.records import AcquisitionState, Fingerprint
from emflow.steps.context import Context, Look, log
from emflow.steps.notice import forget, quarantine
from emflow.watch.closed import writer_is_gone
from mpi_kernels.contract import Header
from mpi_kernels.errors import FormatError, Incomplete, KernelError, PartOfAnother, printable

LINK = "is a symbolic link; emflow does not follow links on a share"


def examine(context: Context) -> None:
    """Look at every growing acquisition that is due."""
    now = context.clock()
    for look in [look for look in context.looks.values() if look.due <= now]:
        if context.stopping.is_set():
            return
        with context.going_on(look.acquisition.id):
            _examine(context, look)


def _examine(context: Context, look: Look) -> None:
    acquisition, scan = look.acquisition, context.config.scan
    growing = acquisition.state is AcquisitionState.GROWING
    look.due = context.clock() + (scan.active_s if growing else scan.recent_s)
    path = context.path_of(acquisition)
    main = None if path is None else fingerprint_of(path)
    if path is None or main is None:
        look.waiting = False
        _vanished(context, look)
        return
    if path.is_symlink():  # a person may retry what the scan has set aside
        quarantine(context, acquisition, LINK)
        return
    try:
        name, header = context.prober.probe(os.fspath(path), context.stopping)
    except KernelError as error:
        _not_yet(context, look, main, error)
        return
    link = next((m.path for m in header.members if Path(m.path).is_symlink()), None)
    if link is not None:
        quarantine(context, acquisition, f"{printable(Path(link).name)} {LINK}")
        return
    try:
        noted = _noted(path, header) if command_of(acquisition.relpath) is not None else False
    except KernelError as error:
        _not_yet(context, look, main, error)
        return
    look.waiting = True
    if noted or _settled(context, look, header):
        _ready(context, look, main, name, header)
    else:
        look.due = min(look.due, context.clock() + scan.settle_s)


def _noted(path: Path, header: Header) -> bool:
    """Whether the microscope's server says that a commanded scan is whole: then nothing has to rest.

    Raises
    ------
    Incomplete
        Its note is not there yet; nothing else can say that a commanded scan is whole.
    FormatError
        The note is of something else than lies beside it.
    """
    try:
        note = read_note(path)
    except (ValueError, OSError) as error:
        raise FormatError(f"the note of the scan can't be read: {error}", path=sidecar_path(path)) from error
    if note is None or not note.complete:
        raise Incomplete(f"waits for {sidecar_path(path).name}, with which the microscope's server ends a scan")
    said = (note.command, note.path.rpartition("/")[2], note.kind, note.scan_shape, note.det_shape, note.frames)
    found = (command_of(os.fsencode(path)), path.name, header.kind, header.scan_shape, header.det_shape, header.frames)
    if said != found:
        raise FormatError(f"its note tells of {said}, the file is {found}", path=path)
    return True


def _vanished(context: Context, look: Look) -> None:
    """Set aside what was deleted or renamed before it was whole; it goes on by itself should it come back."""
    acquisition, now = look.acquisition, context.clock()
    if f"share {acquisition.share}" in context.alarms or acquisition.share not in context.watches:
        context.settling.forget(acquisition.id)  # it is the share that is away
        return
    context.settling.observe(acquisition.id, (), "exact", closed=False, now=now)
    gone_s = context.settling.stalled_for(acquisition.id, now)
    if gone_s >= context.config.scan.stall_s and acquisition.state is AcquisitionState.GROWING:
        _stalled(context, look, "the file is gone; it was never seen whole")


def _stalled(context: Context, look: Look, reason: str) -> None:
    acquisition = look.acquisition
    look.acquisition = context.journal.move_acquisition(
        acquisition.id, acquisition.state, AcquisitionState.STALLED, reason=reason
    )
    log.warning("stalled %s: %s", printable(acquisition.name), reason, extra={"acquisition": acquisition.id})


def _settled(context: Context, look: Look, header: Header) -> bool:
    """Whether all members are there, closed by their writer where that can be known, and unchanged for a while."""
    paths = [Path(m.path) for m in header.members]
    prints = [fingerprint_of(p) for p in paths]
    gone = [writer_is_gone(p) for p in paths]
    if None in prints:
        return False
    known, written = None not in gone, False in gone
    said = context.settling.observe(
        look.acquisition.id,
        tuple(p for p in prints if p is not None),
        # a format that cannot tell its own end may be believed sooner where the kernel says that nobody writes
        "exact" if known and not written else header.rule,
        closed=known and not written and header.rule == "exact",
        now=context.clock(),
    )
    if not written:
        return said == "ready"
    unchanged_s = context.settling.stalled_for(look.acquisition.id, context.clock())
    look.waiting = unchanged_s < context.config.scan.stable_s  # a program may keep its files open for hours
    _explain(context, look, "it is whole, but a program still has it open for writing")
    return False


def _ready(context: Context, look: Look, main: Fingerprint, name: str, header: Header) -> None:
    acquisition = look.acquisition
    with context.journal.transaction():
        if acquisition.state is AcquisitionState.STALLED:
            context.journal.move_acquisition(
                acquisition.id, acquisition.state, AcquisitionState.GROWING, attrs={"because": "complete after all"}
            )
        context.journal.move_acquisition(
            acquisition.id,
            AcquisitionState.GROWING,
            AcquisitionState.READY,
            attrs={"format": name, "warnings": list(header.warnings)},
            fingerprint=main,
            format=name,
            kind=header.kind,
            frames=header.frames,
        )
    context.headers[acquisition.id] = header
    log.info("ready %s (%s)", printable(acquisition.name), name, extra={"acquisition": acquisition.id})
    forget(context, acquisition)


def _not_yet(context: Context, look: Look, main: Fingerprint, error: KernelError) -> None:
    """Go on waiting for what is incomplete; set aside what can never be read once it has stopped changing."""
    acquisition, scan, now = look.acquisition, context.config.scan, context.clock()
    # a file that is being written can look like nonsense: only what is unchanged for a while is judged
    settled = context.settling.observe(acquisition.id, (main,), "exact", closed=False, now=now) == "ready"
    unchanged_s = context.settling.stalled_for(acquisition.id, now)
    look.waiting = not settled
    if isinstance(error, PartOfAnother) and settled:
        context.journal.move_acquisition(
            acquisition.id, acquisition.state, AcquisitionState.SUPERSEDED, reason=error.message
        )
        forget(context, acquisition)
    elif isinstance(error, FormatError) and settled:
        quarantine(context, acquisition, str(error))
    elif isinstance(error, Incomplete) and unchanged_s >= scan.quarantine_s:
        quarantine(context, acquisition, f"unchanged for {unchanged_s:.0f} s and incomplete: {error}")
    elif unchanged_s >= scan.stall_s and acquisition.state is AcquisitionState.GROWING:
        _stalled(context, look, str(error))
    else:
        _explain(context, look, str(error))


def _explain(context: Context, look: Look, reason: str) -> None:
    """Let people see what is waited for."""
    if reason != look.acquisition.reason:
        look.acquisition = context.journal.update_acquisition(
            look.acquisition.id, look.acquisition.state, reason=reason
        )


def fingerprint_of(path: Path) -> Fingerprint | None:
    """Stat a file, without following a link; None where it is gone."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return None
    return Fingerprint(size=found.st_size, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns)
