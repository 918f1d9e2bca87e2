"""``acquisition.json``: what a run folder must know so that the journal can be made anew from it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec

from emflow.records import Acquisition, AcquisitionState, Fingerprint, Transfer
from mpi_kernels.contract import SCHEMA
from mpi_kernels.errors import FormatError


class AcquisitionFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``acquisition.json``: what the journal knows of an acquisition from the moment that its digest is bound.

    ``relpath`` is base64 in the file, since a name need not be valid text.
    """

    id: str
    share: str
    relpath: bytes
    generation: int
    day: str
    trace: str
    seen_ns: int
    staged_ns: int
    fingerprint: Fingerprint
    format: str
    kind: str
    frames: int
    supersedes: str | None
    transfer: Transfer
    v: int = SCHEMA

    @classmethod
    def of(cls, acquisition: Acquisition, transfer: Transfer) -> AcquisitionFile:
        """The facts of an acquisition and its verified copy."""
        own = {f.name for f in msgspec.structs.fields(cls)}
        facts = {name: value for name, value in msgspec.structs.asdict(acquisition).items() if name in own}
        return cls(**facts, transfer=transfer, staged_ns=time.time_ns())

    def acquisition(self, state: AcquisitionState) -> Acquisition:
        """The acquisition, with its digest, in a state."""
        names = {f.name for f in msgspec.structs.fields(Acquisition)}
        facts = {name: value for name, value in msgspec.structs.asdict(self).items() if name in names}
        return Acquisition(**facts, state=state, changed_ns=self.staged_ns, digest=self.transfer.digest)

    def encode(self) -> bytes:
        """As JSON in ASCII; not by msgspec's own encoder, which refuses paths that are not valid Unicode."""
        return json.dumps(msgspec.to_builtins(self), separators=(",", ":")).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, *, path: Path) -> AcquisitionFile:
        """From JSON, strictly; `FormatError` if it is torn, foreign or of another version."""
        try:
            record = msgspec.convert(json.loads(data), cls, strict=True)
        except (ValueError, RecursionError) as error:  # msgspec's and json's errors are ValueErrors
            raise FormatError(f"no record of an acquisition: {error}", path=path) from error
        if record.v != SCHEMA:
            raise FormatError(f"version {record.v} is not {SCHEMA}, which this emflow reads", path=path)
        return record
