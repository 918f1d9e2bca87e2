"""Sends a job to the pool that has the least to do, or another way if no pool takes it; and takes it back."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from emflow.config_tables import PoolSettings
from emflow.errors import SubmitError, Unavailable, printable
from emflow.records import EndCause, Resources
from emflow.schedulers import pool_plan
from emflow.schedulers.pool_fallback import INSTEAD, Fallback
from emflow.schedulers.pool_folder import PoolFolder, Sent
from emflow.schedulers.pool_jobs import pool_id, pool_of
from emflow.schedulers.pool_look import holds
from emflow.schedulers.pool_relay import Relay
from emflow.schedulers.pool_signs import ANSWER_S
from mpi_kernels.errors import KernelError
from mpi_kernels.pool.client import PoolClient
from mpi_kernels.pool.records import TaskEnd

log = logging.getLogger("emflow")

CANCEL_S = 15.0
"""How long a pool may take to stop a job before the pool itself is ended; it ends its own ranks after 10 s."""

_NOBODY = "no pool takes tasks"
_STEP_S = 0.05


class Sender:
    """Brings jobs to the pools, and knows what each has to do.

    Parameters
    ----------
    settings : PoolSettings
        ``[pool]``: how the pools are reached.
    folder : PoolFolder
        Where it is recorded.
    relay : Relay
        Knows which pools there are.
    fallback : Fallback
        The other ways.
    """

    def __init__(self, settings: PoolSettings, folder: PoolFolder, relay: Relay, fallback: Fallback) -> None:
        self._settings, self._folder, self._relay, self._fallback = settings, folder, relay, fallback
        self._clients: dict[str, PoolClient] = {}
        self._at: dict[str, str] = {}
        self._told = ""

    def send(self, sent: Sent, tried: tuple[str, ...] = ()) -> Sent:
        """Send a job; its record comes before each try.

        Raises
        ------
        SubmitError, Unavailable
            Nobody takes it.
        """
        why = _NOBODY
        loads = list(self._at.values())
        load = {name: loads.count(name) for name in set(loads)}
        pools = self._relay.glance()
        if any(pool.takes for pool in pools) and not any(pool.ranks >= sent.ranks for pool in pools if pool.takes):
            why = f"no pool has {sent.ranks} ranks"
        for pool in pool_plan.choose(pools, sent.ranks, load):
            if pool.name in tried:
                continue
            aimed = msgspec.structs.replace(sent, to=pool_id(pool.name, sent.job), why="")
            self._folder.write_sent(aimed)
            try:
                self._client(pool.name).send(sent.job, Path(sent.folder), time_limit_s=sent.time_limit_s)
            except (KernelError, OSError) as error:
                why = printable(str(error))
                log.info("pool %s did not take %s: %s", pool.name, sent.job, why)
                self._hang_up(pool.name)
                continue
            self.is_at(sent.job, pool.name)
            self._tell("")
            return aimed
        trouble = self._relay.signs.trouble if why == _NOBODY else ""
        return self._send_elsewhere(sent, f"{why} ({trouble})" if trouble else why)

    def ended(self) -> list[TaskEnd]:
        """Jobs that the pools have let go of since the last call, as far as they could tell us; does not wait."""
        return [end for client in self._clients.values() for end in client.ended()]

    def is_at(self, job: str, pool: str | None) -> None:
        """Count a job as work of a pool, or of none any more."""
        if pool is None:
            self._at.pop(job, None)
        else:
            self._at[job] = pool

    def stop(self, sent: Sent) -> None:
        """Tell a pool to stop a job; does not wait."""
        pool = pool_of(sent.to)
        if pool is None or self._folder.closed(pool) is not None:
            return
        try:
            self._client(pool).cancel(sent.job)
        except (KernelError, OSError) as error:
            log.info("pool %s was not told to stop %s: %s", pool, sent.job, printable(str(error)))
            self._hang_up(pool)

    def make_sure(self, sent: Sent) -> None:
        """Wait until a pool has let go of a job; if that takes long, end the pool."""
        pool = pool_of(sent.to)
        until = time.monotonic() + CANCEL_S
        while pool is not None and self._folder.closed(pool) is None and holds(self._folder.of(pool), sent.job):
            if time.monotonic() > until:
                log.warning("pool %s does not let go of %s, and is ended", pool, sent.job)
                with self._relay.locked():
                    self._relay.end(pool, f"it did not let go of {sent.job}", EndCause.FAILED)
                return
            time.sleep(_STEP_S)

    def close(self) -> None:
        """Hang up."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _send_elsewhere(self, sent: Sent, why: str) -> Sent:
        allocations = self._relay.allocations()
        resources = Resources(ranks=sent.ranks, time_limit_s=sent.time_limit_s, memory_mib=sent.memory_mib)
        ways = self._fallback.ways(allocations)
        for way in ways:
            aimed = msgspec.structs.replace(sent, to=f"{way}:", why=f"{why}: {INSTEAD[way]}")
            self._folder.write_sent(aimed)
            try:
                scheduler_id = self._fallback.submit(way, sent.job, Path(sent.folder), resources, allocations)
            except (SubmitError, Unavailable) as error:
                if way == ways[-1]:
                    raise
                log.info("%s was not sent to an allocation: %s", sent.job, error)
                continue
            self._tell(aimed.why)
            aimed = msgspec.structs.replace(aimed, to=scheduler_id)
            self._folder.write_sent(aimed)
            return aimed
        raise Unavailable(why)

    def _client(self, pool: str) -> PoolClient:
        if pool not in self._clients:
            folder = self._folder.of(pool)
            self._clients[pool] = PoolClient(folder, reach=self._settings.reach, timeout_s=ANSWER_S)
        return self._clients[pool]

    def _hang_up(self, pool: str) -> None:
        if pool in self._clients:
            self._clients.pop(pool).close()

    def _tell(self, text: str) -> None:
        """Say once that jobs go another way, and once that they do not any more."""
        if text and text != self._told:
            log.warning("%s", text)
        elif self._told and not text:
            log.info("pools take jobs again")
        self._told = text
