"""Pyro5 made safe before its first use: its settings, what may cross the wire, and where one may listen."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
import threading
from typing import Any

import msgspec

from emflow.errors import ConfigError, printable

MAX_MESSAGE = 1 << 20
"""Bytes of one message; frames never cross RPC."""
MAX_HELLO = 16 << 10
"""Bytes of a message from somebody who has not said who they are."""
HELLO_S = 5.0
"""A connection that has not said its hello by then is closed."""
IDLE_S = 300.0
"""A connection that has not asked for anything for so long is closed; clients connect anew long before."""
CONNECTIONS = 128
"""Connections at the same time; more are closed at once, and the others go on."""
SPARE = 8
"""So many are kept free: for a newcomer, who may want to press STOP, the one that was silent for longest is closed."""
DEPTH = 20
"""Nesting of lists and dicts; a command in a batch needs 6."""

_CERTIFICATES = "Until certificates come, only this machine may be served: use 127.0.0.1:PORT or [::1]:PORT"
_lock = threading.Lock()
_ready: list[Any] = []


def pyro() -> Any:
    """The Pyro5 package with our settings and none from the environment.

    An unknown ``PYRO_X`` breaks its import and the known ones change what the server accepts, so all are dropped first.
    """
    with _lock:
        if not _ready:
            for name in [n for n in os.environ if n.startswith("PYRO_")]:
                del os.environ[name]
            import Pyro5.api
            import Pyro5.errors
            import Pyro5.protocol
            import Pyro5.serializers

            _configure(Pyro5.config)
            for name in ("Pyro5.core.URI", "Pyro5.client.Proxy", "Pyro5.server.Daemon"):
                # a Proxy in a message would make its receiver connect to wherever the sender likes
                Pyro5.serializers.SerializerBase.register_dict_to_class(name, _refuse_class)
            _ready.append(Pyro5)
    return _ready[0]


def _configure(config: Any) -> None:
    config.reset(use_environment=False)
    config.SERVERTYPE = "thread"
    config.THREADPOOL_SIZE = CONNECTIONS
    config.SERIALIZER = "serpent"
    config.COMPRESSION = False
    config.MAX_MESSAGE_SIZE = MAX_MESSAGE
    config.MAX_RETRIES = 0  # with 2 and a time-out, one command was executed three times
    config.COMMTIMEOUT = 30.0
    config.SOCK_NODELAY = True  # off, a call of several packets waits 40 ms for the peer's acknowledgement
    config.SOCK_REUSE = os.name != "nt"  # there it would let two servers listen on one port
    config.DETAILED_TRACEBACK = False
    config.ITER_STREAMING = False


def _refuse_class(name: str, _value: dict[str, Any]) -> Any:
    raise pyro().errors.SecurityError(f"{name} is not accepted")


def dumps(value: object) -> bytes:
    """Plain builtins as serpent; TypeError names what is not plain."""
    import serpent  # type: ignore[import-untyped]

    data: bytes = serpent.dumps(plain(value))
    return data


def loads(data: bytes | bytearray) -> Any:
    """Plain builtins from serpent; no class is ever made of a message.  ValueError says what is wrong with it."""
    import serpent

    try:
        return _received(serpent.loads(bytes(data)), 0)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - hostile input: whatever the parser says
        raise ValueError(f"not serpent: {type(error).__name__}") from None


def pack(reply: object) -> bytes:
    """A reply as serpent: one text, which is JSON.

    A dict in serpent is a Python literal that its reader has to compile: 70 us for a `Status`, where a whole call takes
    about 100.  TypeError names what is not plain, or not finite.
    """
    return dumps(msgspec.json.encode(plain(reply, finite=True)).decode())


def unpack(data: bytes | bytearray) -> Any:
    """A reply from `pack`; ValueError says what is wrong with it."""
    text = loads(data)
    if not isinstance(text, str):
        raise ValueError("not a reply of emflow")
    return msgspec.json.decode(text)


def plain(value: object, depth: int = 0, *, finite: bool = False) -> object:
    """The value itself if it is made of None, bool, int, float, str, list, tuple and dict only, subclasses excluded."""
    if depth > DEPTH:
        raise TypeError("nested too deeply for the wire")
    if finite and type(value) is float and not math.isfinite(value):
        raise TypeError(f"{value!r} can't cross the wire")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        for inner in value:  # type: ignore[attr-defined]
            plain(inner, depth + 1, finite=finite)
        return value
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"a key of type {type(key).__name__} can't cross the wire")
            plain(inner, depth + 1, finite=finite)
        return value
    raise TypeError(f"{type(value).__name__} can't cross the wire")


def _received(value: Any, depth: int) -> Any:
    if depth > DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        if value.get("__class__") == "float" and value.get("value") == "nan":
            return float("nan")  # serpent's way to write it
        if "__class__" in value:
            raise ValueError(f"an object of class {str(value['__class__'])[:80]!r} is not accepted")
        if not all(isinstance(key, str) for key in value):
            raise ValueError("keys must be text")
        return {key: _received(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_received(inner, depth + 1) for inner in value]
    if isinstance(value, tuple):
        return tuple(_received(inner, depth + 1) for inner in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{type(value).__name__} is not accepted")


def loopback(address: str) -> tuple[str, int]:
    """Numeric host and port of ``host:port`` on this machine.

    Raises
    ------
    ConfigError
        It is no address, or one that other machines can reach.
    """
    shown = printable(str(address))
    host, colon, port_text = address.rpartition(":")
    if not colon or not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
        raise ConfigError(f"{shown!r} is no address", next_step="Write it as 127.0.0.1:7763 or [::1]:7763")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    for found in _numeric(host, shown):
        v4 = found.version == 4 and found in ipaddress.ip_network("127.0.0.0/8")
        if not v4 and found != ipaddress.ip_address("::1"):
            raise ConfigError(f"{shown!r} can be reached from other machines", next_step=_CERTIFICATES)
    return str(_numeric(host, shown)[0]), int(port_text)


def _numeric(host: str, shown: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    if not host:
        raise ConfigError(f"{shown!r} names no host, which means all of them", next_step=_CERTIFICATES)
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{shown!r}: no such host ({error})", next_step=_CERTIFICATES) from None
    return [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in found]
