"""Is the writer done?  Judged by how long files stay as they are, on this host's monotonic clock only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emflow.records import Fingerprint


@dataclass(slots=True)
class _Sample:
    fingerprints: tuple[Fingerprint, ...]
    since: float
    last: float


class Settling:
    """Decides when an acquisition is complete, from samples of all its files.

    Times that files carry are compared for equality, never with a clock: the share's server may be hours off, and
    some writers set a file's time to the day of the experiment.

    Parameters
    ----------
    settle_s : float
        Distance of two equal samples that are enough where the format itself says that all bytes are there.  On a
        CIFS mount it has to exceed the attribute cache (``actimeo``, 1 s by default), within which a stat repeats
        itself.
    stable_s : float
        How long nothing may change where the format can't tell (preallocated or endless files).
    """

    def __init__(self, settle_s: float = 1.0, stable_s: float = 5.0) -> None:
        self.settle_s = settle_s
        self.stable_s = stable_s
        self._samples: dict[str, _Sample] = {}

    def observe(
        self,
        key: str,
        fingerprints: tuple[Fingerprint, ...],
        rule: Literal["exact", "stability"],
        closed: bool,
        now: float,
    ) -> Literal["ready", "wait"]:
        """Add a sample of all members and judge.

        Parameters
        ----------
        key : str
            The acquisition.
        fingerprints : tuple of Fingerprint
            Of every member, in a fixed order, each from a stat made for this sample; empty is never ready.
        rule : {"exact", "stability"}
            Whether the format itself says that all bytes are there, see `mpi_kernels.contract.Header`.
        closed : bool
            Every member is known to have been closed by its writer since it last changed.
        now : float
            Monotonic seconds; a step back counts as no time at all.
        """
        sample = self._samples.get(key)
        if sample is None or sample.fingerprints != fingerprints:
            since = now if sample is None else max(now, sample.last)
            sample = self._samples[key] = _Sample(fingerprints, since, since)
        sample.last = max(sample.last, now)
        if not fingerprints:
            return "wait"
        if rule == "exact" and closed:
            return "ready"
        unchanged_s = sample.last - sample.since
        return "ready" if unchanged_s >= (self.settle_s if rule == "exact" else self.stable_s) else "wait"

    def stalled_for(self, key: str, now: float) -> float:
        """Seconds since the first of the equal samples; 0 for an acquisition that was never observed."""
        sample = self._samples.get(key)
        return 0.0 if sample is None else max(0.0, now - sample.since)

    def forget(self, key: str) -> None:
        """Drop what is known of an acquisition."""
        self._samples.pop(key, None)
