"""``decision.json`` and ``receipt.json`` in a job's run folder: what followed from its result."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from emflow.agent.progress import Taken
from emflow.errors import printable
from mpi_kernels import jsonfile

DECISION_FILE = "decision.json"
RECEIPT_FILE = "receipt.json"

_log = logging.getLogger(__name__)


def write_notes(folder: Path, taken: Taken) -> None:
    """Publish a decision and the answers to its commands, once; the experiment's log is what counts.

    A run folder that can't be written is told, and nothing depends on it.
    """
    receipts = tuple(taken.receipts.values())
    try:
        for name, record in ((DECISION_FILE, taken.decided), (RECEIPT_FILE, receipts)):
            if not (folder / name).exists():
                jsonfile.publish(folder / name, msgspec.json.encode(record))
    except OSError as error:
        _log.warning("%s: no note of the decision: %s", printable(str(folder)), error.strerror)
