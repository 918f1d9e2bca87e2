"""A client of the microscope's server that never has a command executed twice, whatever happens to the connection."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from emflow import rpc
from emflow.errors import Unavailable
from emflow.microscope.protocol import OBJECT, Command, Lease, Receipt, Role, Status, from_wire, to_wire
from mpi_kernels import jsonfile
from mpi_kernels.contract import Event
from mpi_kernels.errors import FormatError

POLL_S = 10.0
"""How long one call waits for the end of a command; below the time-out of the connection."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
"""Between tries to connect again, doubled each time."""

_log = logging.getLogger("emflow.microscope")

T = TypeVar("T")


class MicroscopeClient:
    """Commands and questions to a microscope; safe from any thread.

    Parameters
    ----------
    address : str
        ``host:port`` of its server.
    role, name : str
        Who is asking.
    patience_s : float
        How long a cut connection or a server that restarts is waited for; 0: not at all.
    timeout_s : float
        How long one call may take; a server that hangs is a cut connection.
    """

    def __init__(
        self, address: str, *, role: Role, name: str, patience_s: float = 60.0, timeout_s: float = POLL_S + 20.0
    ) -> None:
        self.address, self.role, self.name = address, role, name
        self._patience_s = patience_s
        self._connection = rpc.Connection(address, OBJECT, role=role, name=name, timeout_s=timeout_s)
        self._closed = threading.Event()

    # --- questions, asked again after a cut connection

    def status(self) -> Status:
        """How the microscope is."""
        return self._again(lambda: self._record(Status, "status"))

    def limits(self) -> dict[str, Any]:
        """The envelope: ``max_dose_e``, ..., and under ``controls`` a table for each that may be set."""
        limits: dict[str, Any] = self._again(lambda: self._connection.call("limits"))
        return limits

    def receipt(self, id: str) -> Receipt:  # noqa: A002 - the word of the protocol
        """What is known of a command; it is not sent."""
        return self._again(lambda: self._record(Receipt, "receipt", id, 0.0))

    def events(self, after: int, wait_s: float = 0.0) -> tuple[list[Event], int]:
        """Events from number ``after`` on, and the number to ask with next; waits for one."""
        reply = self._again(lambda: self._connection.call("events", after, min(wait_s, POLL_S)))
        try:
            found = [jsonfile.from_plain(Event, event) for event in reply["events"]]
            return found, int(reply["next"])
        except (FormatError, KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"{self.address} tells no events of this version: {error}") from None

    # --- commands

    def execute(self, command: Command, *, stop: threading.Event | None = None) -> Receipt:
        """Have a command executed once, and wait for its answer.

        After a cut connection the server is asked about the id first; only if it never saw it, it is sent again.

        Parameters
        ----------
        command : Command
            Its id is what makes it one.
        stop : threading.Event, optional
            Set it to stop waiting; then the receipt may say RUNNING.

        Raises
        ------
        Unavailable
            The server was not there for ``patience_s``; whether the command was executed is not known.
        """
        wire, ask = to_wire(command), False

        def once() -> Receipt:
            nonlocal ask
            if ask:
                known = self._record(Receipt, "receipt", command.id, POLL_S)
                if known.code != "never-seen":
                    return known
            ask = True  # from here on it may have arrived, whatever comes back
            return self._record(Receipt, "execute", wire, POLL_S)

        while True:
            receipt = self._again(once, stop)
            if receipt.final or receipt.code or (stop is not None and stop.is_set()):
                return receipt

    def abort(self, reason: str) -> Status:
        """End the command that runs; those that wait follow."""
        return self._record(Status, "abort", reason)

    def stop(self, reason: str) -> Status:
        """End everything and blank the beam, until an operator releases it."""
        return self._again(lambda: self._record(Status, "stop", reason))

    def release(self, reason: str) -> Status:
        """End STOP; only for operators."""
        return self._record(Status, "release", reason)

    # --- the lease

    def take_lease(self) -> Lease:
        """Ask for the right to send commands; ``epoch`` 0 and a reason where it is not given."""
        return self._again(lambda: self._record(Lease, "lease", "take", 0))

    def renew(self, epoch: int) -> Lease:
        """Say that the lease is still needed; once, since the next try may be too late anyway."""
        return self._record(Lease, "lease", "renew", epoch)

    def give_back(self, epoch: int) -> Lease:
        """Say that it is not."""
        return self._record(Lease, "lease", "give_back", epoch)

    def close(self) -> None:
        """Cut the connections; a call that waits ends with `Unavailable`."""
        self._closed.set()
        self._connection.close()

    def _record(self, cls: type[T], method: str, *args: Any) -> T:
        reply = self._connection.call(method, *args)
        try:
            return from_wire(cls, reply)
        except msgspec.ValidationError as error:
            raise Unavailable(f"{self.address} does not speak this version: {error}") from None

    def _again(self, call: Callable[[], T], stop: threading.Event | None = None) -> T:
        """Call until there is an answer, or patience ends."""
        until = time.monotonic() + self._patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return call()
            except Unavailable:
                left_s = until - time.monotonic()
                if left_s <= 0 or self._closed.is_set() or (stop is not None and stop.is_set()):
                    raise
            (stop or self._closed).wait(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def __enter__(self) -> MicroscopeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class LeaseKeeper:
    """Holds the lease while it lives: renews it every third of its time, on a connection of its own.

    Parameters
    ----------
    client : MicroscopeClient
        Its address, role and name are used.
    lease : Lease, optional
        One that was taken already; else it is taken here.

    Attributes
    ----------
    lease : Lease
        As it was given.
    lost : threading.Event
        Set when the lease is gone, or may be since the server did not answer for as long as it lasts.

    Raises
    ------
    Refused
        It is not given; the reason says who holds it.
    """

    def __init__(self, client: MicroscopeClient, lease: Lease | None = None) -> None:
        self.lease = lease or client.take_lease()
        if not self.lease.epoch:
            raise rpc.Refused(f"the lease is not given: {self.lease.reason}", code=self.lease.code)
        self.lost = threading.Event()
        self.reason = ""
        self._ended = threading.Event()
        self._client = MicroscopeClient(
            client.address, role=client.role, name=client.name, patience_s=0.0, timeout_s=self.lease.ttl_s / 3
        )
        self._thread = threading.Thread(target=self._keep, name="emflow-lease-keeper", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        """Of the lease; commands carry it."""
        return self.lease.epoch

    def close(self) -> None:
        """Give the lease back, if it is still held."""
        self._ended.set()
        self._client.close()  # also ends a renewal that waits
        self._thread.join()
        if self.lost.is_set():
            return
        client = MicroscopeClient(self._client.address, role=self._client.role, name=self._client.name, patience_s=0.0)
        try:
            client.give_back(self.epoch)
        except Unavailable:
            return  # it runs out by itself
        finally:
            client.close()

    def _keep(self) -> None:
        """Body of the thread: however it ends, the holder hears of it."""
        try:
            self._renew()
        except Exception as error:  # noqa: BLE001 - a bug must not leave a holder that believes in its lease
            self.reason = f"the lease is not renewed any more: {type(error).__name__}"
            if not self._ended.is_set():
                _log.exception("%s", self.reason)
        finally:
            if not self._ended.is_set():
                self.lost.set()

    def _renew(self) -> None:
        """Renew until the lease is lost or given back."""
        good_s = time.monotonic()
        while not self._ended.wait(self.lease.ttl_s / 3):
            asked_s = time.monotonic()
            try:
                renewed = self._client.renew(self.epoch)
            except (Unavailable, rpc.Refused) as error:
                if time.monotonic() - good_s < self.lease.ttl_s and isinstance(error, Unavailable):
                    continue
                self.reason = error.message
            else:
                good_s = asked_s
                if renewed.epoch:
                    continue
                self.reason = renewed.reason
            return

    def __enter__(self) -> LeaseKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
