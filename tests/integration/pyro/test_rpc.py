"""The guard around Pyro5, attacked by stock Pyro5 clients and by bare sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from emflow import rpc, rpc_wire
from emflow.errors import ConfigError, NotAllowed, Unavailable
from emflow.rpc import Connection, Server, caller

HELLO = {"emflow": 1, "role": "viewer", "name": "stock"}


class Thing:
    """What is served."""

    def __init__(self) -> None:
        self.calls = 0

    def who(self, value: Any = None) -> dict[str, Any]:
        self.calls += 1
        return {"role": caller().role, "name": caller().name, "value": value}

    def fails(self) -> None:
        raise RuntimeError("/a/secret/path")

    def is_busy(self) -> None:
        raise Unavailable("the lens is cold", next_step="Wait")

    def odd(self) -> Any:
        return {"set": {1, 2}}

    def infinite(self) -> float:
        return float("inf")

    def huge(self) -> str:
        return "x" * (2 << 20)

    def waits(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def hidden(self) -> int:
        self.calls += 1
        return 1


@pytest.fixture
def thing() -> Thing:
    return Thing()


@pytest.fixture
def server(thing: Thing) -> Iterator[Server]:
    allowed = ("who", "fails", "is_busy", "odd", "infinite", "huge", "waits")
    with Server("127.0.0.1:0", {"thing": (thing, allowed)}) as served:
        served.start()
        yield served


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    with Connection(server.address, "thing", role="agent", name="one") as made:
        yield made


def stock(server: Server, serializer: str = "serpent", hello: object = HELLO) -> Any:
    """A Pyro5 client as it comes out of the box."""
    pyro5 = rpc_wire.pyro()
    proxy = pyro5.api.Proxy(f"PYRO:thing@{server.address}")
    proxy._pyroSerializer = serializer
    proxy._pyroHandshake = hello
    proxy._pyroTimeout = 5.0
    return proxy


def test_call_and_caller(connection: Connection) -> None:
    assert connection.call("who", [1, 2.5, None, True, {"a": (1,)}]) == {
        "role": "agent", "name": "one", "value": [1, 2.5, None, True, {"a": [1]}],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="no call is being served"):
        caller()


def test_every_thread_has_its_connection(connection: Connection) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: connection.call("waits", 0.3), range(8))) == [0.3] * 8
    assert time.monotonic() - began < 1.5


def test_stock_client_with_a_hello_may_call(server: Server) -> None:
    with stock(server) as proxy:
        assert json.loads(proxy.who(1)) == {"role": "viewer", "name": "stock", "value": 1}


@pytest.mark.parametrize("serializer", ["marshal", "json", "msgpack"])
def test_other_serializers_are_refused_at_the_hello(server: Server, serializer: str, thing: Thing) -> None:
    pyro5 = rpc_wire.pyro()
    if serializer not in pyro5.serializers.serializers:  # msgpack is not installed: its number is sent all the same
        answer = raw(server, message(pyro5.protocol.MSG_CONNECT, b"\x80", serializer_id=4))
        assert b"only serpent" in answer
        return
    with stock(server, serializer) as proxy, pytest.raises(pyro5.errors.CommunicationError, match="only serpent"):
        proxy.who()
    assert thing.calls == 0


@pytest.mark.parametrize("serializer", ["marshal", "json"])
def test_other_serializers_are_refused_in_calls(server: Server, serializer: str, thing: Thing) -> None:
    pyro5 = rpc_wire.pyro()
    with stock(server) as proxy:
        proxy.who()
        proxy._pyroSerializer = serializer
        with pytest.raises(pyro5.errors.CommunicationError):
            proxy.who()
    assert thing.calls == 1


@pytest.mark.parametrize(
    "hello",
    [
        "hello",
        None,
        {},
        HELLO | {"emflow": 2},
        HELLO | {"emflow": True},
        HELLO | {"role": "root"},
        HELLO | {"role": ["viewer"]},
        HELLO | {"name": ""},
        HELLO | {"name": "a\nb"},
        HELLO | {"name": "x" * 65},
        HELLO | {"more": 1},
        {"emflow": 1, "role": "viewer"},
        HELLO | {"name": {"__class__": "Pyro5.client.Proxy", "state": ["PYRO:a@127.0.0.1:1", [], [], [], "h", None]}},
    ],
)
def test_any_other_hello_is_denied(server: Server, hello: object, thing: Thing) -> None:
    pyro5 = rpc_wire.pyro()
    with stock(server, hello=hello) as proxy, pytest.raises(pyro5.errors.CommunicationError, match="rejected"):
        proxy.who()
    assert thing.calls == 0


def test_denied_hello_is_not_allowed_for_our_client(server: Server) -> None:
    connection = Connection(server.address, "other", role="agent", name="one")
    with connection, pytest.raises(NotAllowed, match="no object is called 'other'"):
        connection.call("who")


def test_proxies_in_calls_are_refused_and_nobody_is_called(server: Server, thing: Thing) -> None:
    pyro5 = rpc_wire.pyro()
    with socket.create_server(("127.0.0.1", 0)) as bait, stock(server) as proxy:
        bait.settimeout(0.5)
        far = pyro5.api.Proxy(f"PYRO:x@127.0.0.1:{bait.getsockname()[1]}")
        for value in (far, pyro5.api.URI("PYRO:x@127.0.0.1:1"), RuntimeError("x")):
            assert json.loads(proxy.who(value))["code"] == "malformed"
        with pytest.raises(TimeoutError):
            bait.accept()
    assert thing.calls == 0


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("hidden", "unknown-method"),
        ("calls", "unknown-method"),
        ("__init__", "unknown-method"),
        ("who.__globals__", "unknown-method"),
        ("fails", "internal"),
        ("is_busy", "unavailable"),
        ("odd", "internal"),
        ("infinite", "internal"),
        ("huge", "internal"),
    ],
)
def test_refusals_tell_neither_paths_nor_tracebacks(
    server: Server, connection: Connection, method: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(rpc.Refused) as raised:
        connection.call(method)
    assert raised.value.code == code
    assert not any(word in str(raised.value) for word in ("secret", "Traceback", "File", "/"))
    assert ("secret" in caplog.text) == (method == "fails")
    assert connection.call("who")["name"] == "one"  # the connection goes on


def test_wrong_arguments_are_malformed(connection: Connection) -> None:
    with pytest.raises(rpc.Refused, match="does not take 3 arguments") as raised:
        connection.call("who", 1, 2, 3)
    assert raised.value.code == "malformed"
    with pytest.raises(TypeError, match="set can't cross the wire"):
        connection.call("who", {1})


def test_daemons_own_object_is_not_there(server: Server) -> None:
    pyro5 = rpc_wire.pyro()
    proxy = pyro5.api.Proxy(f"PYRO:Pyro.Daemon@{server.address}")
    proxy._pyroHandshake = HELLO
    with proxy, pytest.raises(pyro5.errors.CommunicationError, match="no object"):
        proxy.info()


# --- bare sockets


def message(kind: int, payload: bytes, *, serializer_id: int = 1, flags: int = 0, size: int | None = None) -> bytes:
    import struct

    from Pyro5 import protocol

    size = len(payload) if size is None else size
    return (
        struct.pack(
            protocol._header_format, b"PYRO", protocol.PROTOCOL_VERSION, kind, serializer_id, flags, 0, size, 0,
            b"\0" * 16, 0, protocol._magic_number,
        )
        + payload
    )  # fmt: skip


def raw(server: Server, *messages: bytes, timeout_s: float = 5.0) -> bytes:
    """What comes back until the server closes."""
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as sock:
        answer = b""
        for one in messages:
            sock.sendall(one)
        try:
            while data := sock.recv(65536):
                answer += data
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


GREETING = rpc_wire.dumps({"handshake": HELLO, "object": "thing"})


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(message(4, zlib.compress(b"0" * 10_000), flags=2), id="compressed"),
        pytest.param(message(4, b"[]", flags=4), id="one-way"),
        pytest.param(message(4, b"[]", flags=8), id="batch"),
        pytest.param(message(4, b"[]", flags=32), id="kept serialized"),
        pytest.param(message(4, b"", size=(1 << 20) + 1), id="too large"),
        pytest.param(message(1, GREETING), id="a second hello"),
        pytest.param(message(6, b"ping"), id="ping"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"x" * 40, id="not Pyro"),
    ],
)
def test_what_is_not_spoken_ends_the_connection(server: Server, connection: Connection, call: bytes) -> None:
    answer = raw(server, message(1, GREETING), call)
    assert answer.count(b"PYRO") == 1  # the hello was answered, the rest was not
    assert connection.call("who")["name"] == "one"


@pytest.mark.parametrize("payload", [b"(" * 5000, b"[1,", b"\xff\xfe", b"", b"__import__('os')", b"'" + b"9" * 5000])
def test_payload_that_is_no_call_is_malformed(server: Server, connection: Connection, payload: bytes) -> None:
    answer = raw(server, message(1, GREETING), message(4, payload), timeout_s=0.5)
    assert b"malformed" in answer
    assert connection.call("who")["name"] == "one"


def test_large_hello_is_refused(server: Server) -> None:
    answer = raw(server, message(1, rpc_wire.dumps({"handshake": HELLO | {"name": "x" * 20_000}, "object": "thing"})))
    assert b"are accepted" in answer


def test_call_before_a_hello_is_refused(server: Server, thing: Thing) -> None:
    raw(server, message(4, rpc_wire.dumps(("thing", "who", [], {}))))
    assert thing.calls == 0


def test_silence_does_not_block_others(server: Server, connection: Connection) -> None:
    """More silent connections than there is room for; who is connected is answered, and soon there is room again."""
    connection.call("who")
    host, _, port = server.address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(rpc_wire.CONNECTIONS + 40)]
    try:
        silent[0].sendall(b"PYRO")
        for _ in range(5):
            assert connection.call("who")["name"] == "one"
            time.sleep(0.05)
        until = time.monotonic() + rpc_wire.HELLO_S + 5
        while True:  # after the time for a hello there is room again
            try:
                with Connection(server.address, "thing", role="viewer", name="late") as late:
                    assert late.call("who")["name"] == "late"
                break
            except Unavailable:
                assert time.monotonic() < until
                time.sleep(0.2)
    finally:
        for one in silent:
            one.close()


def test_connection_is_made_anew_after_the_server_was(thing: Thing) -> None:
    with Server("127.0.0.1:0", {"thing": (thing, ("who",))}) as first:
        first.start()
        address = first.address
        connection = Connection(address, "thing", role="agent", name="one")
        connection.call("who")
    with pytest.raises(Unavailable, match="no answer from"):
        connection.call("who")
    with Server(address, {"thing": (thing, ("who",))}) as second:
        second.start()
        assert connection.call("who")["name"] == "one"
        connection.close()
        with pytest.raises(Unavailable):
            connection.call("who")


def test_close_ends_a_call_that_waits(server: Server) -> None:
    connection = Connection(server.address, "thing", role="agent", name="one")
    threading.Timer(0.3, connection.close).start()
    with pytest.raises(Unavailable):
        connection.call("waits", 20.0)


def test_call_that_takes_too_long(server: Server) -> None:
    with Connection(server.address, "thing", role="agent", name="one", timeout_s=0.2) as connection:
        with pytest.raises(Unavailable, match="waits"):
            connection.call("waits", 1.0)
        assert connection.call("who")["name"] == "one"  # and never the late reply


# --- addresses and the environment


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:0", ":0", "[::]:0", "8.8.8.8:80", "10.0.0.1:0", "192.168.1.1:0", "[::ffff:8.8.8.8]:0", "[fe80::1]:0",
     "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1:-1", "", "name.invalid:0"],
)  # fmt: skip
def test_only_this_machine_is_served(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Server(address, {})
    assert raised.value.exit_code == 78
    with pytest.raises(ConfigError):
        Connection(address, "thing", role="viewer", name="one")


def test_refusal_says_that_certificates_come_later() -> None:
    with pytest.raises(ConfigError, match=r"reached from other machines\. Until certificates come"):
        Server("0.0.0.0:0", {})


@pytest.mark.parametrize("address", ["localhost:0", "127.0.0.1:0", "127.3.2.1:0", "[::1]:0"])
def test_loopback_in_all_its_forms(address: str, thing: Thing) -> None:
    if "::1" in address:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    with Server(address, {"thing": (thing, ("who",))}) as server:
        server.start()
        with Connection(server.address, "thing", role="viewer", name="one") as connection:
            assert connection.call("who")["name"] == "one"


def test_address_that_is_taken(server: Server) -> None:
    with pytest.raises(Unavailable, match="can't listen"):
        Server(server.address, {})


def test_environment_changes_nothing() -> None:
    code = (
        "import os, sys; from emflow import rpc_wire; c = rpc_wire.pyro().config;"
        "print(c.SERIALIZER, c.MAX_RETRIES, c.SERVERTYPE, c.MAX_MESSAGE_SIZE, c.DETAILED_TRACEBACK, c.SOCK_NODELAY,"
        " c.COMMTIMEOUT > 0, [n for n in os.environ if n.startswith('PYRO_')])"
    )
    hostile = {
        "PYRO_SERIALIZER": "marshal", "PYRO_MAX_RETRIES": "5", "PYRO_SERVERTYPE": "multiplex", "PYRO_BANANA": "1",
        "PYRO_MAX_MESSAGE_SIZE": "999999999", "PYRO_DETAILED_TRACEBACK": "1", "PYRO_LOGLEVEL": "DEBUG",
        "PYRO_LOGFILE": "/nonexistent/x.log",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ) | hostile, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("serpent 0 thread 1048576 False True True []\n", "")
