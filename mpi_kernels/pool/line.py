"""A client's end of the connection to a pool: proved on both sides before anything is said.  Standard library only."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any

from mpi_kernels.pool import wire
from mpi_kernels.pool.errors import WrongSecret


class _HungUp(ConnectionError):
    pass


class Line:
    """An authenticated connection.

    Parameters
    ----------
    address : (str, int)
    secret : bytes
    name : str
        Of the pool that should be there.
    timeout_s : float
        Of each step.

    Raises
    ------
    WrongSecret
        One side does not hold the other's secret.
    OSError
        Nobody is there, or somebody else.
    """

    def __init__(self, address: tuple[str, int], secret: bytes, name: str, timeout_s: float) -> None:
        self.socket = socket.create_connection(address, timeout=timeout_s)
        self._got, self._timeout_s = b"", timeout_s
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._session = self._meet(secret, name.encode("ascii"))
        except BaseException:
            self.socket.close()
            raise

    def _meet(self, secret: bytes, name: bytes) -> wire.Session:
        match = self._expect(wire.GREETING)
        if match[1] != name:
            raise ConnectionError("another pool listens there")
        facts = name, match[2], wire.nonce()
        self.socket.sendall(facts[2] + b" " + wire.proof(secret, "client", *facts) + b"\n")
        try:
            answer = self._expect(wire.ANSWER)
        except (_HungUp, ConnectionResetError) as error:
            raise WrongSecret(
                "the pool hung up on our secret", next_step="it was started with another one: drain it, start a new one"
            ) from error
        if answer[0] == wire.FULL:
            raise ConnectionError("it has all the clients that it can have")
        if not wire.same(answer[0], wire.proof(secret, "pool", *facts)):
            raise WrongSecret("who listens there is not our pool", next_step="who else is on that machine?")
        return wire.Session(secret, "client", *facts)

    def _expect(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        match = pattern.fullmatch(self._read(self._timeout_s))
        if match is None:
            raise ConnectionError("something else listens there")
        return match

    def _read(self, timeout_s: float) -> bytes:
        until = time.monotonic() + timeout_s  # of the whole line: each byte may come just in time
        while b"\n" not in self._got:
            self.socket.settimeout(max(until - time.monotonic(), 0.0))
            try:
                data = self.socket.recv(65536)
            except BlockingIOError as error:
                raise TimeoutError("it takes too long") from error
            if not data:
                raise _HungUp("it hung up")
            self._got += data
            if len(self._got) > (1 << 20):
                raise ConnectionError("it never ends its line")
        line, _, self._got = self._got.partition(b"\n")
        return line

    def say(self, body: dict[str, Any]) -> None:
        """Send a message."""
        self.socket.settimeout(self._timeout_s)
        self.socket.sendall(self._session.seal(body))

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, None if none comes in time."""
        try:
            return self._session.open(self._read(timeout_s))
        except TimeoutError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConnectionError(f"no message of ours: {error}") from error

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
