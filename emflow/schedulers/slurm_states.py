"""What Slurm's words for a job's state mean to emflow: a total table, in one place.

A word that is not in the table is UNKNOWN and never ends anything.  Source: ``job_state_string`` and
``job_state_string_complete`` in Slurm's ``slurm_protocol_defs.c`` and ``slurm.h``, releases 20.11 to 26.05.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from emflow.records import EndCause, SchedulerPhase


class Meaning(NamedTuple):
    """What a word says: phase, why the job ended if it did, what to add in plain words, and if a person must act."""

    phase: SchedulerPhase
    cause: EndCause = EndCause.UNSAID
    text: str = ""
    stuck: bool = False

    @property
    def ended(self) -> bool:
        """Whether the job has ended, with all its processes."""
        return self.phase is SchedulerPhase.ENDED


_WAITS, _RUNS, _ENDED = SchedulerPhase.PENDING, SchedulerPhase.RUNNING, SchedulerPhase.ENDED
_HELD = "held: it waits for ever unless somebody releases it (scontrol release); emflow retry plans a new attempt"

STATES: Mapping[str, Meaning] = {
    "PENDING": Meaning(_WAITS),
    "RUNNING": Meaning(_RUNS),
    # it is alive, but nobody may expect a sign of life from it
    "SUSPENDED": Meaning(_WAITS, text="suspended: it keeps its memory, and goes on when Slurm lets it"),
    "COMPLETED": Meaning(_ENDED, EndCause.COMPLETED),
    "CANCELLED": Meaning(_ENDED, EndCause.CANCELLED),
    "FAILED": Meaning(_ENDED, EndCause.FAILED),
    "TIMEOUT": Meaning(_ENDED, EndCause.TIMEOUT),
    "NODE_FAIL": Meaning(_ENDED, EndCause.NODE_FAIL),
    "PREEMPTED": Meaning(_ENDED, EndCause.PREEMPTED),
    "BOOT_FAIL": Meaning(_ENDED, EndCause.BOOT_FAIL),
    "DEADLINE": Meaning(_ENDED, EndCause.DEADLINE),
    "OUT_OF_MEMORY": Meaning(_ENDED, EndCause.OUT_OF_MEMORY),
    # flags, which Slurm's commands show in the place of the state
    "COMPLETING": Meaning(_RUNS, text="ending: its processes may still be there"),
    "STAGE_OUT": Meaning(_RUNS, text="ended, and its files are brought back from the burst buffer"),
    "SIGNALING": Meaning(_RUNS, text="a signal is on its way to it"),
    "RESIZING": Meaning(_RUNS, text="its number of nodes changes"),
    "CONFIGURING": Meaning(_WAITS, text="it has its nodes, and they are made ready"),
    "POWER_UP_NODE": Meaning(_WAITS, text="it has its nodes, and they are switched on"),
    "STOPPED": Meaning(_WAITS, text="stopped by a signal: it keeps its nodes, and somebody must send SIGCONT"),
    # emflow asks for --no-requeue, but an administrator may do it
    "REQUEUED": Meaning(_WAITS, text="put back into the queue"),
    "REQUEUED_CRON": Meaning(_WAITS, text="put back into the queue"),
    "EXPEDITING": Meaning(_WAITS, text="put back into the queue, at its head"),
    "REQUEUE_FED": Meaning(_WAITS, text="put back into the queue of the federation"),
    "REQUEUE_HOLD": Meaning(_WAITS, text=f"put back into the queue and {_HELD}", stuck=True),
    "SPECIAL_EXIT": Meaning(_WAITS, text=f"put back into the queue with a special exit code and {_HELD}", stuck=True),
    "RESV_DEL_HOLD": Meaning(_WAITS, text=f"its reservation was deleted, and it is {_HELD}", stuck=True),
    "REVOKED": Meaning(_WAITS, text="another cluster of the federation has it"),
}
"""By the word that ``squeue -o %T`` and ``sacct -o State`` show."""

FLAGS: Mapping[str, Meaning | None] = {
    # said only beside a state, which stands (None)
    "LAUNCH_FAILED": None,
    "RECONFIG_FAIL": None,
    "GETENV_FAILED": None,
    "UPDATE_DB": None,
}
"""Words that can only stand behind a state, as in ``FAILED,LAUNCH_FAILED`` of ``scontrol show job``."""

_BY = re.compile(r"CANCELLED by (\S+)")


def judge(said: str) -> Meaning:
    """What a state means, as any of Slurm's commands or pyslurm says it.

    Parameters
    ----------
    said : str
        ``RUNNING``, ``CANCELLED by 1000``, ``CANCELLED+`` (cut by a narrow column), or a state with flags such as
        ``COMPLETED,COMPLETING``, of which the first flag that says more counts.

    Returns
    -------
    Meaning
        UNKNOWN for anything that is not in the table, with Slurm's own words in ``text``.
    """
    text = said.strip()
    if by := _BY.fullmatch(text):
        return STATES["CANCELLED"]._replace(text=f"cancelled by user {by[1]}")
    words = text.removesuffix("+").replace(",", " ").split()
    known = [STATES.get(word, FLAGS.get(word)) for word in words]
    unknown = [w for w in words if w not in STATES and w not in FLAGS]
    if not words or unknown or known[0] is None:
        return Meaning(SchedulerPhase.UNKNOWN, text=text or "nothing")
    flags = [meaning for meaning in known[1:] if meaning is not None]
    return flags[0] if flags else known[0]
