"""What became of commands that a server had begun when it ended: asked of the files and of the instrument."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from emflow.microscope import sidecar
from emflow.microscope.answers import Answer, Intent, digest_of
from emflow.microscope.desk import Desk
from emflow.microscope.limits import actions_of
from emflow.microscope.protocol import Acquired, Outcome, Receipt, Set
from emflow.microscope.sidecar import Sidecar
from emflow.microscope.worker import finite, misplaced, name_of

_log = logging.getLogger("emflow.microscope")


def recover(desk: Desk, share: Path) -> None:
    """Answer every command that was begun and not answered; nothing is executed."""
    for intent in list(desk.answers.open_intents.values()):
        receipt = judge(desk, share, intent)
        _log.warning("%s was begun before a restart: %s", receipt.command, receipt.outcome.value)
        desk.answers.append(Answer(receipt=receipt, action=digest_of(intent.command.action)))
        facts = {"outcome": receipt.outcome.value, "code": receipt.code}
        desk.events.write("ended", receipt.command, intent.command.trace, **facts)


def judge(desk: Desk, share: Path, intent: Intent) -> Receipt:
    """The answer to one command: done if its files and its values say so, else unknown.

    A scan counts if its note is there, since that is written last, or if the instrument itself says that it is whole;
    it also proves everything before it in a batch.  What is set after the last scan counts if the controls have those
    values now.
    """
    after = finite(desk.backend.read())
    actions = actions_of(intent.command.action)
    acquired: list[Acquired] = []
    missing = False
    targets: dict[str, float] = {}
    for number, action in enumerate(actions):
        if isinstance(action, Set):
            targets |= action.values
            continue
        targets = {}
        name = name_of(intent.command.id, intent.command.action, number)
        made = _noted(share, name, intent.command.id, intent.doses_e[number]) or _whole(desk, share, name, intent)
        missing = missing or made is None
        acquired += [made] if made else []
    done = not missing and desk.envelope.holds(targets, after)
    return Receipt(
        command=intent.command.id,
        outcome=Outcome.DONE if done else Outcome.UNKNOWN,
        code="" if done else "restart",
        reason="confirmed after a restart" if done else "the server ended meanwhile; after is what is there now",
        before=intent.before,
        after=after,
        acquired=tuple(acquired),
        # of what has no note it isn't known how far it came, so all of it counts
        dose_e=sum(intent.doses_e) if not done else sum(one.dose_e for one in acquired),
        admitted_ns=intent.admitted_ns,
        began_ns=intent.began_ns,
        ended_ns=time.time_ns(),
    )


def _whole(desk: Desk, share: Path, name: str, intent: Intent) -> Acquired | None:
    """A scan that the instrument says is whole, and that got no note before the crash: it gets it now."""
    made = desk.backend.made(name)
    if made is None or misplaced(share, made, name) is not None:
        return None
    sidecar.write(share, Sidecar.of(intent.command, made))
    desk.events.write("noted", intent.command.id, intent.command.trace, path=made.path)
    return made


def _noted(share: Path, name: str, command: str, dose_e: float) -> Acquired | None:
    """The scan of a name, from its note."""
    for path in share.rglob(f"{name}{sidecar.SUFFIX}"):
        try:
            note = sidecar.read(path.with_name(f"{name}.any"))
        except ValueError as error:
            _log.warning("the note %s can't be read: %s", path.name, error)
            continue
        if note is not None and note.command == command and note.complete:
            made = _acquired(note, name, dose_e)
            if misplaced(share, made, name) is None:
                return made
    return None


def _acquired(note: Sidecar, name: str, dose_e: float) -> Acquired:
    return Acquired(
        name=name,
        path=note.path,
        kind=note.kind,  # type: ignore[arg-type]
        scan_shape=note.scan_shape,
        det_shape=note.det_shape,
        frames=note.frames,
        dose_e=dose_e,
    )
