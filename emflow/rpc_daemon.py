"""The serving side of `emflow.rpc`: a Pyro5 daemon that reads and answers every message itself."""

from __future__ import annotations

import contextlib
import inspect
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from emflow import rpc_wire
from emflow.errors import EmflowError, printable

Role = Literal["operator", "agent", "viewer"]

VERSION = 1
SERPENT = 1
"""Number of the only serializer that is spoken, in Pyro5's header."""

_log = logging.getLogger("emflow.rpc")
_serving = threading.local()


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who is calling, as the connection's hello said."""

    role: Role
    name: str


def caller() -> Caller:
    """Who made the call that this thread is serving; RuntimeError outside of one."""
    found = getattr(_serving, "caller", None)
    if found is None:
        raise RuntimeError("no call is being served")
    return found  # type: ignore[no-any-return]


def refusal(code: str, reason: str) -> dict[str, Any]:
    """What a method replies that may not or can't; `Connection.call` makes `Refused` of it."""
    return {"code": code, "reason": reason}


class _Guest:
    """A connection: who is there and what they may call (None before the hello), and since when it is silent."""

    def __init__(self) -> None:
        self.may: tuple[Caller, Mapping[str, Callable[..., Any]]] | None = None
        self.idle = True
        self.since_s = time.monotonic()


class _Door:
    """Who is connected, and who has to leave where it gets crowded; safe from any thread."""

    def __init__(self) -> None:
        self._guests: dict[Any, _Guest] = {}
        self._lock = threading.Lock()

    def enter(self, conn: Any) -> _Guest:
        """Take somebody in who has said nothing yet."""
        with self._lock:
            guest = self._guests[conn] = _Guest()
            crowded = len(self._guests) > rpc_wire.CONNECTIONS - rpc_wire.SPARE
        if crowded:
            self.make_room(conn)
        return guest

    def guest(self, conn: Any) -> _Guest:
        """Who a connection is."""
        return self._guests[conn]

    def leave(self, conn: Any) -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._guests.pop(conn, None)

    def make_room(self, newcomer: Any = None) -> None:
        """End the connection that was silent for longest, those without a hello first; none that is served."""
        with self._lock:
            silent = [(conn, guest) for conn, guest in self._guests.items() if guest.idle and conn is not newcomer]
            if not silent:
                return
            conn, guest = min(silent, key=lambda one: (one[1].may is not None, one[1].since_s))
            guest.idle = False  # it is on its way out: the next newcomer ends another one
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_RDWR)  # its own thread closes it

    def empty(self) -> None:
        """Close every connection; their threads end."""
        with self._lock:
            found = list(self._guests)
        for conn in found:
            conn.close()


def daemon_class() -> Any:
    """The daemon, defined where Pyro5 is loaded: its base class can't be named before."""
    pyro5 = rpc_wire.pyro()
    stock: Any = pyro5.api.Daemon

    class Daemon(stock):  # type: ignore[misc]
        """Pyro5's threads and sockets; every message is read and answered by the functions below."""

        def __init__(self, host: str, port: int, methods: Mapping[str, Mapping[str, Callable[..., Any]]]) -> None:
            self._methods = methods
            self._door = _Door()
            self.ended = False
            super().__init__(host, port)

        def _handshake(self, conn: Any, denied_reason: str | None = None) -> bool:
            if denied_reason:  # too many connections; this runs in the thread that accepts, so it must not wait
                _log.warning("a connection was closed at once: %s", denied_reason)
                self._door.make_room()
                return False
            conn.settimeout(rpc_wire.HELLO_S)
            guest = self._door.enter(conn)
            try:
                guest.may = _greeted(pyro5, conn, self._methods)
            finally:
                if guest.may is None:
                    self._door.leave(conn)
            if guest.may is None:
                return False
            conn.settimeout(rpc_wire.IDLE_S)
            if self.ended:
                conn.close()
            return True

        def clientDisconnect(self, conn: Any) -> None:  # noqa: N802 - Pyro5's name
            self._door.leave(conn)

        def handleRequest(self, conn: Any) -> None:  # noqa: N802 - Pyro5's name
            _serve(pyro5, conn, self._door.guest(conn))

        def shutdown(self) -> None:
            self.ended = True
            self.cut()
            super().shutdown()

        def close(self) -> None:
            self.ended = True
            super().close()

        def cut(self) -> None:
            """Close every connection; their threads end."""
            self._door.empty()

    return Daemon


def _serve(pyro5: Any, conn: Any, guest: _Guest) -> None:
    """Read one call and answer it; a message that is not spoken here ends the connection."""
    protocol = pyro5.protocol
    try:
        seq, data = _receive(pyro5, conn, protocol.MSG_INVOKE, rpc_wire.MAX_MESSAGE)
    except ValueError as error:
        _log.warning("a connection was cut: %s", printable(str(error)))
        raise pyro5.errors.SecurityError("refused") from None  # Pyro5 closes the connection
    assert guest.may is not None
    guest.idle = False
    reply = _packed(_served(*guest.may, data))
    guest.idle, guest.since_s = True, time.monotonic()
    conn.send(protocol.SendingMessage(protocol.MSG_RESULT, 0, seq, SERPENT, reply).data)


def _greeted(
    pyro5: Any, conn: Any, objects: Mapping[str, Mapping[str, Callable[..., Any]]]
) -> tuple[Caller, Mapping[str, Callable[..., Any]]] | None:
    """Who is there and what they may call, after a hello was read and answered; None: it was denied."""
    protocol = pyro5.protocol
    seq, accepted = 0, None
    try:
        seq, data = _receive(pyro5, conn, protocol.MSG_CONNECT, rpc_wire.MAX_HELLO)
        accepted = _hello(data, objects)
        meta = {"methods": sorted(accepted[1]), "oneway": [], "attrs": []}
        reply: object = {"handshake": {"emflow": VERSION}, "meta": meta}
    except ValueError as error:
        reply = printable(str(error))
        _log.warning("a connection was refused: %s", reply)
    kind = protocol.MSG_CONNECTFAIL if accepted is None else protocol.MSG_CONNECTOK
    conn.send(protocol.SendingMessage(kind, 0, seq, SERPENT, rpc_wire.dumps(reply)).data)
    return accepted


def _receive(pyro5: Any, conn: Any, kind: int, limit: int) -> tuple[int, bytes]:
    """Sequence number and payload of one message; ValueError where its header has what is not spoken here."""
    try:
        message = pyro5.protocol.ReceivingMessage(conn.recv(40))
    except pyro5.errors.ConnectionClosedError:
        raise
    except pyro5.errors.ProtocolError as error:
        raise ValueError(str(error)) from None
    if message.type != kind:
        raise ValueError(f"a message of type {message.type}, not {kind}")
    if message.serializer_id != SERPENT:
        raise ValueError("only serpent is spoken here")
    if message.flags & ~pyro5.protocol.FLAGS_CORR_ID or message.annotations_size:
        raise ValueError("neither flags nor annotations are accepted (compressed, one-way, batch)")
    if message.data_size > limit:
        raise ValueError(f"a message of {message.data_size} bytes; {limit} are accepted")
    return message.seq, conn.recv(message.data_size)


def _hello(
    data: bytes, objects: Mapping[str, Mapping[str, Callable[..., Any]]]
) -> tuple[Caller, Mapping[str, Callable[..., Any]]]:
    said = rpc_wire.loads(data)
    if not isinstance(said, dict) or not isinstance(said.get("object"), str):
        raise ValueError("not a hello")
    hello = said.get("handshake")
    if not isinstance(hello, dict) or hello.keys() != {"emflow", "role", "name"}:
        raise ValueError('not a hello of emflow: {"emflow": 1, "role": ..., "name": ...}')
    if type(hello["emflow"]) is not int or hello["emflow"] != VERSION:
        raise ValueError(f"version {str(hello['emflow'])[:20]} of emflow's calls is not {VERSION}")
    role, name = hello["role"], hello["name"]
    if role not in get_args(Role):
        raise ValueError(f"role {str(role)[:40]!r}: expected one of {', '.join(get_args(Role))}")
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise ValueError("the name must be 1 to 64 printable characters")
    if said["object"] not in objects:
        raise ValueError(f"no object is called {said['object'][:80]!r}")
    return Caller(role=role, name=name), objects[said["object"]]


def _served(who: Caller, methods: Mapping[str, Callable[..., Any]], data: bytes) -> object:
    """The reply to one call, or a refusal; never an exception."""
    try:
        _, method, arguments, named = rpc_wire.loads(data)
        if not isinstance(method, str) or not isinstance(arguments, (list, tuple)) or named:
            raise ValueError("expected a method and a list of arguments")
    except (ValueError, TypeError) as error:
        return refusal("malformed", printable(str(error)))
    if method not in methods:
        return refusal("unknown-method", f"no method is called {printable(method[:80])!r}")
    _serving.caller = who
    try:
        return methods[method](*arguments)
    except EmflowError as error:
        _log.warning("%s: %s", method, printable(str(error)))
        return refusal("unavailable" if error.retryable else "failed", printable(str(error)))
    except Exception as error:  # noqa: BLE001 - a bug; its text may hold paths, so it stays here
        if isinstance(error, TypeError) and not _fits(methods[method], arguments):
            return refusal("malformed", f"{method} does not take {len(arguments)} arguments")
        _log.exception("%s failed for %s %s", method, who.role, printable(who.name))
        return refusal("internal", f"{method} failed; the server's log says why")
    finally:
        _serving.caller = None


def _fits(method: Callable[..., Any], arguments: Sequence[object]) -> bool:
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    return True


def _packed(reply: object) -> bytes:
    try:
        data = rpc_wire.pack(reply)
    except (TypeError, ValueError):
        _log.exception("a reply can't cross the wire")
        data = rpc_wire.pack(refusal("internal", "the reply can't cross the wire; the server's log says why"))
    if len(data) > rpc_wire.MAX_MESSAGE:
        _log.error("a reply of %d bytes is too large", len(data))
        data = rpc_wire.pack(refusal("internal", f"a reply of {len(data)} bytes is too large"))
    return data
