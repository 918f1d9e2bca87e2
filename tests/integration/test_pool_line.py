"""The line to a pool, attacked: who does not hold the secret gets nothing, and keeps nobody out for long."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from mpi_kernels.pool import wire
from mpi_kernels.pool.errors import WrongSecret
from mpi_kernels.pool.line import Line
from mpi_kernels.pool.listener import CLIENTS, STRANGERS, Listener, addresses
from mpi_kernels.pool.records import read_secret

NAME = "20261128T120000-01"
WAIT_S = 20.0


class Ear:
    """A listener, and all that its clients have said."""

    def __init__(self) -> None:
        self.secret = secrets.token_bytes(32)
        self.heard: list[dict[str, Any]] = []
        self.listener = Listener(self.secret, NAME, "127.0.0.1", self._answer)
        self.address = "127.0.0.1", self.listener.port
        self.listener.start()

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.heard.append(body)
        if body.get("do") == "break":
            raise ZeroDivisionError("a mistake")
        return {"answer": len(self.heard)}

    def line(self, secret: bytes | None = None) -> Line:
        return Line(self.address, secret or self.secret, NAME, WAIT_S)

    def works(self) -> bool:
        with ExitStack() as stack:
            line = self.line()
            stack.callback(line.close)
            line.say({"do": "beat"})
            return line.hear(WAIT_S) is not None


@pytest.fixture
def ear() -> Iterator[Ear]:
    found = Ear()
    yield found
    found.listener.close()
    assert not found.listener.is_alive()


def raw(ear: Ear) -> socket.socket:
    return socket.create_connection(ear.address, timeout=WAIT_S)


def ended(connection: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    got = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            got += data
    return got


def test_both_sides_hold_the_secret(ear: Ear) -> None:
    line = ear.line()
    for number in range(1, 4):
        line.say({"do": "x", "number": number})
        assert line.hear(WAIT_S) == {"answer": number}
    ear.listener.push({"ended": "news"})
    assert line.hear(WAIT_S) == {"ended": "news"}
    assert line.hear(0.0) is None
    line.close()


def test_a_client_with_another_secret_is_told_so(ear: Ear) -> None:
    with pytest.raises(WrongSecret, match="the pool hung up on our secret"):
        ear.line(secrets.token_bytes(32))
    assert ear.heard == []
    assert ear.works()


def test_a_pool_with_another_secret_gets_no_task() -> None:
    """An impostor that greets well, and takes what a client proves."""
    server = socket.create_server(("127.0.0.1", 0))
    got = []

    def impostor() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"emflow-pool 1 " + NAME.encode() + b" " + wire.nonce() + b"\n")
            proof = connection.recv(4096)
            connection.sendall(proof.split()[1] + b"\n")  # reflected: roles are in the MAC
            got.append(connection.recv(4096))

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(WrongSecret, match="is not our pool"):
        Line(("127.0.0.1", server.getsockname()[1]), secrets.token_bytes(32), NAME, WAIT_S)
    thread.join()
    server.close()
    assert got == [b""]


def test_who_never_ends_his_line_is_not_listened_to_for_long() -> None:
    """After a pool's end its port may be anybody's."""
    server = socket.create_server(("127.0.0.1", 0))

    def drips() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            while True:
                connection.sendall(b"e")
                time.sleep(0.02)

    thread = threading.Thread(target=drips, daemon=True)
    thread.start()
    with pytest.raises(TimeoutError):
        Line(("127.0.0.1", server.getsockname()[1]), secrets.token_bytes(32), NAME, 0.3)
    thread.join()
    server.close()


class Tap:
    """A man in the middle, who keeps all that passes and changes what he is told to."""

    def __init__(self, ear: Ear, change: Any = None) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.ear, self.change, self.kept = ear, change, b""
        self.thread = threading.Thread(target=self._pass, daemon=True)
        self.thread.start()

    def _pass(self) -> None:
        client, _ = self.server.accept()
        with client, socket.create_connection(self.ear.address) as pool:
            down = threading.Thread(target=self._copy, args=(pool, client, None), daemon=True)
            down.start()
            self._copy(client, pool, self.change)
            down.join()

    def _copy(self, source: socket.socket, target: socket.socket, change: Any) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source is not target and change is not False and source.getsockname() == self.server.getsockname():
                    self.kept += data
                target.sendall(change(data) if change else data)
            target.shutdown(socket.SHUT_WR)


def test_what_was_overheard_is_of_no_use(ear: Ear) -> None:
    tap = Tap(ear)
    line = Line(("127.0.0.1", tap.server.getsockname()[1]), ear.secret, NAME, WAIT_S)
    line.say({"do": "send"})
    assert line.hear(WAIT_S) == {"answer": 1}
    line.close()
    tap.thread.join(WAIT_S)
    tap.server.close()
    assert tap.kept.count(b"\n") == 2  # the proof, and the task
    with raw(ear) as again:
        again.sendall(tap.kept)
        assert ended(again).count(b"\n") == 1  # its greeting, with another nonce
    assert len(ear.heard) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line + line,
        lambda line: line.replace(b"send", b"Send"),
        lambda line: line[65:],
        lambda line: b"{}\n",
    ],
    ids=["repeated", "changed", "without its mac", "another"],
)
def test_what_is_changed_on_the_way_ends_the_line(ear: Ear, change: Any) -> None:
    tap = Tap(ear, lambda data: change(data) if b"send" in data else data)
    line = Line(("127.0.0.1", tap.server.getsockname()[1]), ear.secret, NAME, WAIT_S)
    line.say({"do": "send"})
    with suppress(ConnectionError):  # a repeated line is answered once
        assert line.hear(WAIT_S) == {"answer": 1}
        line.hear(WAIT_S)
    line.close()
    tap.thread.join(WAIT_S)
    tap.server.close()
    assert ear.heard in ([], [{"do": "send"}])
    assert ear.works()


def test_answers_can_not_be_swapped_or_sent_back(ear: Ear) -> None:
    facts = NAME.encode(), wire.nonce(), wire.nonce()
    pool, client = wire.Session(ear.secret, "pool", *facts), wire.Session(ear.secret, "client", *facts)
    first, second = pool.seal({"n": 1}).rstrip(), pool.seal({"n": 2}).rstrip()
    with pytest.raises(WrongSecret):
        client.open(second)
    with pytest.raises(WrongSecret):
        pool.open(first)
    assert client.open(first) == {"n": 1}
    with pytest.raises(WrongSecret):
        client.open(first)
    assert client.open(second) == {"n": 2}
    with pytest.raises(ValueError, match="at most"):
        client.seal({"x": "y" * wire.LINE})


GARBAGE = [
    b"\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\0" * 5000,
    b"[" * 5000,
    b"{" * 100 + b"\n",
    b"a" * 64 + b" " + b"b" * 64 + b"\n",
]
GARBAGE += [b"\xff\xfe" * 200 + b"\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n"]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_not_answered(ear: Ear, data: bytes) -> None:
    with raw(ear) as connection:
        with suppress(OSError):
            connection.sendall(data)
        got = ended(connection)
    assert got == b"" or wire.GREETING.fullmatch(got.rstrip())
    assert ear.heard == []
    assert ear.works()


def test_random_bytes_after_the_handshake(ear: Ear) -> None:
    for size in (1, 64, 66, 5000, 100_000):
        line = ear.line()
        with suppress(OSError):
            line.socket.sendall(os.urandom(size).replace(b"\n", b"") + b"\n")
        with suppress(ConnectionError):
            assert line.hear(WAIT_S) is None
        line.close()
    assert ear.heard == []
    assert ear.works()


def test_a_question_that_breaks_the_answer_costs_its_line(ear: Ear, capsys: pytest.CaptureFixture[str]) -> None:
    line, other = ear.line(), ear.line()
    line.say({"do": "break"})
    with pytest.raises(ConnectionError):
        line.hear(WAIT_S)
    line.close()
    other.say({"do": "beat"})
    assert other.hear(WAIT_S) == {"answer": 2}
    other.close()
    assert "a mistake" in capsys.readouterr().err


def test_silent_strangers_keep_nobody_out(ear: Ear) -> None:
    """Half-open ones by the hundred; each goes after a second, or when newer ones need its place."""
    with ExitStack() as stack:
        silent = [stack.enter_context(raw(ear)) for _ in range(3 * STRANGERS)]
        silent[-1].sendall(b"a")  # one that drips
        assert ear.works()
        for connection in silent:
            ended(connection)  # all are dropped, without a word from them
        assert ear.works()
    assert not ear.listener._strangers


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_thousand_connections(ear: Ear) -> None:
    held = ear.line()
    before = open_files()
    for number in range(1000):
        with raw(ear) as connection, suppress(OSError):
            connection.sendall(os.urandom(number % 200))
    assert ear.works()
    held.say({"do": "beat"})
    assert held.hear(WAIT_S) is not None
    held.close()
    until = time.monotonic() + WAIT_S
    while ear.listener._strangers and time.monotonic() < until:
        time.sleep(0.01)
    assert open_files() <= before
    assert len(ear.heard) == 2


def test_one_client_too_many_is_told_so(ear: Ear) -> None:
    with ExitStack() as stack:
        lines = [ear.line() for _ in range(CLIENTS)]
        for line in lines:
            stack.callback(line.close)
        with pytest.raises(ConnectionError, match="all the clients"):
            ear.line()
        lines[0].close()
        until = time.monotonic() + WAIT_S
        while len(ear.listener._clients) >= CLIENTS and time.monotonic() < until:
            time.sleep(0.01)
        assert ear.works()


def test_a_client_that_does_not_read_is_let_go(ear: Ear) -> None:
    line = ear.line()
    until = time.monotonic() + WAIT_S
    while ear.listener.connected and time.monotonic() < until:
        ear.listener.push({"ended": "x" * 3000})
    assert not ear.listener.connected
    line.close()
    assert ear.works()


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("ab" * 32, 0o640, "others may"),
        ("ab" * 32, 0o604, "others may"),
        ("ab" * 31, 0o600, "not 32 bytes"),
        ("", 0o600, "not 32"),
    ],
)
def test_a_secret_that_others_may_know_is_refused(tmp_path: Path, text: str, mode: int, said: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(WrongSecret, match=said):
        read_secret(path)
    path.unlink()
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    assert read_secret(path) == b"\xab" * 32
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        read_secret(tmp_path / "link")


def test_addresses_are_not_loopback() -> None:
    found = addresses()
    assert len(set(found)) == len(found)
    assert not [address for address in found if address.startswith("127.")]
