"""Guarded Pyro5: objects with an explicit list of callable methods, and connections to them.

Pyro5 listens, keeps a thread for each connection and speaks its wire protocol.  What comes in is read here: only
serpent, only plain builtins, no flag that Pyro knows besides, nothing large, and no call before a hello.  Replies are
plain builtins too; an error inside a method goes to the log, and its caller gets ``{"code", "reason"}``.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

from emflow import rpc_daemon, rpc_wire
from emflow.errors import NotAllowed, Unavailable, printable
from emflow.rpc_daemon import SERPENT, VERSION, Caller, Role, caller, refusal

CONNECTIONS = rpc_wire.CONNECTIONS
STALE_S = 60.0
"""A connection that was not used for so long is made anew before a call, since the other side may have closed it."""

_log = logging.getLogger("emflow.rpc")


class Refused(NotAllowed):
    """The other side said no; ``code`` says why, for programs."""

    def __init__(self, message: str, *, code: str, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.code = code


class Server:
    """Serves objects on one address of this machine.

    Parameters
    ----------
    address : str
        ``host:port``, loopback only; port 0 takes a free one.
    objects : mapping
        Name of each object to the object and the names of its methods that may be called.

    Raises
    ------
    ConfigError
        The address can be reached from other machines.
    Unavailable
        Something else listens there.
    """

    def __init__(self, address: str, objects: Mapping[str, tuple[object, tuple[str, ...]]]) -> None:
        host, port = rpc_wire.loopback(address)
        methods = {name: {m: getattr(thing, m) for m in allowed} for name, (thing, allowed) in objects.items()}
        try:
            _probe(host, port)
            self._daemon = rpc_daemon.daemon_class()(host, port, methods)
        except OSError as error:
            raise Unavailable(
                f"can't listen on {printable(address)}: {error.strerror or error}",
                next_step="End what listens there, or choose another address",
            ) from None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where it really listens, ``host:port``."""
        return str(self._daemon.locationStr)

    def start(self) -> None:
        """Serve in a thread of its own; `close` ends it."""
        self._thread = threading.Thread(target=self._serve, name="emflow-rpc", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and cut every connection."""
        if self._thread is None:
            self._daemon.close()
        else:
            self._daemon.shutdown()
            self._thread.join(5.0)
            self._thread = None
        self._daemon.cut()

    def _serve(self) -> None:
        while not self._daemon.ended:
            try:
                self._daemon.requestLoop()
            except Exception:  # noqa: BLE001 - one connection must never end the service of all others
                _log.exception("trouble while listening; it goes on")
                time.sleep(0.1)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _probe(host: str, port: int) -> None:
    """Raise OSError where nobody can listen; Pyro5 would leave its socket open."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


class Connection:
    """Calls methods of one object of a `Server`; safe from any thread, each has a socket of its own.

    Parameters
    ----------
    address : str
        ``host:port``, loopback only.
    object_name : str
        Of the object, as the server registered it.
    role, name : str
        Who is calling.
    timeout_s : float
        How long a call may take.
    """

    def __init__(self, address: str, object_name: str, *, role: Role, name: str, timeout_s: float = 30.0) -> None:
        host, port = rpc_wire.loopback(address)
        self.address = address
        self._pyro = rpc_wire.pyro()
        self._uri = f"PYRO:{object_name}@{f'[{host}]' if ':' in host else host}:{port}"
        self._hello = {"emflow": VERSION, "role": role, "name": name}
        self._timeout_s = timeout_s
        self._mine = threading.local()
        # by id: to Pyro5 all proxies of one address are equal
        self._proxies: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._closed = False

    def call(self, method: str, *args: Any) -> Any:
        """Call a method and return what it replied: plain builtins, a tuple as a list, all numbers finite.

        Raises
        ------
        Unavailable
            No answer: nobody listens, the connection was cut, or it took too long.  Whether it was executed is not
            known; the next call connects anew.
        Refused
            The other side said no (a `NotAllowed`).
        """
        rpc_wire.plain(args)
        proxy = self._proxy()
        try:
            message = proxy._pyroInvoke(method, args, {})
            if message.flags or message.serializer_id != SERPENT:
                raise self._pyro.errors.ProtocolError("not a reply of emflow")
            reply = rpc_wire.unpack(message.data)
        except (self._pyro.errors.PyroError, ValueError, OSError) as error:
            self._forget(proxy)
            self._explain(method, error)
        except BaseException:  # Ctrl-C in mid-call: the reply to this call must not be taken for that to the next
            self._forget(proxy)
            raise
        self._mine.used = time.monotonic()
        if isinstance(reply, dict) and reply.keys() == {"code", "reason"}:
            raise Refused(printable(str(reply["reason"])), code=str(reply["code"]))
        return reply

    def close(self) -> None:
        """Cut the connections of all threads; a call that is waiting ends with `Unavailable`."""
        with self._lock:
            self._closed = True
            proxies = list(self._proxies.values())
        for proxy in proxies:
            if proxy._pyroConnection is not None:
                proxy._pyroConnection.close()

    def _proxy(self) -> Any:
        proxy = getattr(self._mine, "proxy", None)
        if proxy is not None and time.monotonic() - self._mine.used > STALE_S:
            self._forget(proxy)
            proxy = None
        if proxy is None:
            proxy = self._pyro.api.Proxy(self._uri)
            proxy._pyroHandshake = self._hello
            proxy._pyroTimeout = self._timeout_s
            proxy._pyroMaxRetries = 0
            proxy._pyroSerializer = "serpent"
            proxy._pyroRawWireResponse = True  # read by rpc_wire.unpack, which makes no objects
            self._mine.proxy, self._mine.used = proxy, time.monotonic()
            with self._lock:
                self._proxies[id(proxy)] = proxy
        if self._closed:
            raise Unavailable(f"the connection to {self.address} was closed here")
        return proxy

    def _forget(self, proxy: Any) -> None:
        self._mine.proxy = None
        with self._lock:
            self._proxies.pop(id(proxy), None)
        proxy._pyroRelease()

    def _explain(self, method: str, error: Exception) -> NoReturn:
        _, rejected, reason = str(error).partition(" rejected: ")
        if rejected:
            raise Refused(f"{self.address} refuses the connection: {printable(reason)}", code="hello") from None
        raise Unavailable(
            f"no answer from {self.address} ({method}): {printable(str(error))}",
            next_step="Is the server running there?",
        ) from None

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["CONNECTIONS", "Caller", "Connection", "Refused", "Role", "Server", "caller", "refusal"]
