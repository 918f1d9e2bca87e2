"""Rank 0's ear: one thread that talks with authenticated clients, and spends next to nothing on anybody else.

Until a client has proved itself it is a stranger: it has a second, one short line, and one of few places, which the
newest stranger takes from the oldest, so that silent ones keep nobody out.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mpi_kernels.failure import one_line
from mpi_kernels.pool import wire
from mpi_kernels.pool.errors import WrongSecret

STRANGERS = 64
"""Connections that have not proved themselves yet."""

PATIENCE_S = 1.0
"""So long a stranger may take."""

CLIENTS = 64
FULL_S = 0.05
"""Pause when there can't be one more open file."""

UNSENT = 256 << 10
"""Bytes that may wait for a client that does not read; then it is let go."""

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Listener(threading.Thread):
    """Listens until `close`; ``answer`` is called in this thread, for one client after the other.

    Parameters
    ----------
    secret : bytes
    name : str
        Of the pool.
    address : str
        To listen on; the port is a free one.
    answer : callable
        Given what an authenticated client says.
    """

    def __init__(self, secret: bytes, name: str, address: str, answer: Answer) -> None:
        super().__init__(name="pool-listener", daemon=True)
        self._secret, self._pool, self._answer = secret, name.encode("ascii"), answer
        self._server = socket.create_server((address, 0), backlog=1024)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._woken, self._wake = socket.socketpair()
        for one in (self._woken, self._wake):  # who pushes may hold what this thread waits for
            one.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._pushed: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._strangers: dict[_Line, None] = {}
        self._clients: dict[_Line, None] = {}
        self.port = int(self._server.getsockname()[1])

    @property
    def connected(self) -> bool:
        """Whether there is an authenticated client."""
        return bool(self._clients)

    def push(self, body: dict[str, Any]) -> None:
        """Tell all clients something, from any thread."""
        self._pushed.put(body)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def close(self) -> None:
        """Say what is still to be said, and end the thread."""
        self._pushed.put(None)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self.join(5.0)

    def run(self) -> None:
        """Serve."""
        try:
            while self._once():
                pass
        finally:
            for line in [*self._strangers, *self._clients]:
                line.socket.close()
            for one in (self._server, self._woken, self._wake):
                one.close()
            self._selector.close()

    def _once(self) -> bool:
        oldest = next(iter(self._strangers), None)
        timeout = None if oldest is None else max(0.0, oldest.until - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._server:
                self._accept()
            elif key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            elif key.data.open:
                try:
                    self._serve(key.data)
                except Exception as error:  # noqa: BLE001  one client's question must not cost the others their answers
                    print(f"pool {self._pool.decode()}: {one_line(error)}", file=sys.stderr, flush=True)
                    self._drop(key.data)
        now = time.monotonic()
        for line in [line for line in self._strangers if line.until <= now]:
            self._drop(line)
        while True:
            try:
                body = self._pushed.get_nowait()
            except queue.Empty:
                return True
            if body is None:
                return False
            for line in list(self._clients):
                self._say(line, body)

    def _accept(self) -> None:
        for _ in range(STRANGERS):
            try:
                connection, _ = self._server.accept()
            except OSError as error:  # nobody is left, or they went away again
                if error.errno in (errno.EMFILE, errno.ENFILE):  # they stay where they are: no busy loop about it
                    time.sleep(FULL_S)
                return
            if len(self._strangers) >= STRANGERS:
                self._drop(next(iter(self._strangers)))
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            line = _Line(connection)
            self._strangers[line] = None
            self._selector.register(connection, selectors.EVENT_READ, line)
            self._send(line, b"emflow-pool 1 " + self._pool + b" " + line.nonce + b"\n")

    def _serve(self, line: _Line) -> None:
        """Read what is there, and answer every whole line."""
        try:
            data = line.socket.recv(wire.LINE)
        except BlockingIOError:
            data = None
        except OSError:
            data = b""
        if data == b"":
            self._drop(line)
            return
        line.got += data or b""
        while line.open and b"\n" in line.got:
            text, _, line.got = line.got.partition(b"\n")
            if line.session is None:
                self._meet(line, text)
            else:
                self._told(line, text)
        if line.open and len(line.got) > wire.LINE:
            self._drop(line)
        elif line.open:
            self._send(line, b"")

    def _meet(self, line: _Line, text: bytes) -> None:
        """Let a stranger in who proves that he holds the secret."""
        match = wire.PROOF.fullmatch(text)
        if match is None:
            self._drop(line)
            return
        facts = self._pool, line.nonce, match[1]
        if not wire.same(match[2], wire.proof(self._secret, "client", *facts)):
            self._drop(line)
            return
        if len(self._clients) >= CLIENTS:
            self._send(line, wire.FULL + b"\n")
            self._drop(line)
            return
        line.session = wire.Session(self._secret, "pool", *facts)
        self._strangers.pop(line)
        self._clients[line] = None
        self._send(line, wire.proof(self._secret, "pool", *facts) + b"\n")

    def _told(self, line: _Line, text: bytes) -> None:
        assert line.session is not None
        try:
            body = line.session.open(text)
        except (WrongSecret, ValueError, RecursionError):
            self._drop(line)
            return
        self._say(line, self._answer(body))

    def _say(self, line: _Line, body: dict[str, Any]) -> None:
        assert line.session is not None
        self._send(line, line.session.seal(body))

    def _send(self, line: _Line, data: bytes) -> None:
        line.unsent += data
        try:
            while line.unsent and line.open:
                line.unsent = line.unsent[line.socket.send(line.unsent) :]
        except BlockingIOError:
            if len(line.unsent) > UNSENT:
                self._drop(line)
        except OSError:
            self._drop(line)
        if line.open:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.unsent else 0)
            if line.wanted != wanted:
                line.wanted = wanted
                self._selector.modify(line.socket, wanted, line)

    def _drop(self, line: _Line) -> None:
        if line.open:
            line.open = False
            self._strangers.pop(line, None)
            self._clients.pop(line, None)
            self._selector.unregister(line.socket)
            line.socket.close()


class _Line:
    """A connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.open = connection, True
        self.until = time.monotonic() + PATIENCE_S
        self.nonce = wire.nonce()
        self.session: wire.Session | None = None
        self.got = self.unsent = b""
        self.wanted = selectors.EVENT_READ


def addresses() -> tuple[str, ...]:
    """IPv4 addresses of this machine, without loopback; the one of the default route first."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; the address is one for documentation (RFC 5737)
        found[probe.getsockname()[0]] = None
    with contextlib.suppress(OSError):
        for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM):
            found[str(entry[4][0])] = None
    found |= dict.fromkeys(_of_interfaces())
    return tuple(address for address in found if not address.startswith("127."))


def _of_interfaces() -> list[str]:
    """Source: netdevice(7), SIOCGIFADDR."""
    import fcntl
    import struct

    siocgifaddr, found = 0x8915, []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                asked = struct.pack("256s", name.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), siocgifaddr, asked)[20:24]))
    return found
