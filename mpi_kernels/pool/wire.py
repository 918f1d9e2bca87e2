"""What goes over the line between a pool and its clients: one short handshake, then sealed lines; no sockets here.

Both sides prove that they hold the secret by an HMAC over both sides' nonces and their own role.  Every later line is
``<mac> <json>``: the MAC is over the session's key, the direction and the number of the line, so that nothing can be
added, changed, left out in the middle, repeated or sent back.  Nothing is hidden: only run-folder names travel.

Source: RFC 2104 (HMAC), ISO/IEC 9798-4 (three passes, a nonce from each side).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from typing import Any, Literal

from mpi_kernels.pool.errors import WrongSecret

LINE = 4096
"""Bytes of the longest line."""
GREETING = re.compile(rb"emflow-pool 1 ([0-9]{8}T[0-9]{6}-[0-9]{2}) ([0-9a-f]{64})")
PROOF = re.compile(rb"([0-9a-f]{64}) ([0-9a-f]{64})")
FULL = b"full"
ANSWER = re.compile(rb"[0-9a-f]{64}|full")
_SEALED = re.compile(rb"([0-9a-f]{64}) (\{.*\})", re.DOTALL)

Role = Literal["pool", "client"]


def nonce() -> bytes:
    """32 fresh bytes, in hex."""
    return secrets.token_hex(32).encode("ascii")


def proof(secret: bytes, role: Role, name: bytes, pools: bytes, clients: bytes) -> bytes:
    """MAC by which a side proves that it holds the secret, in hex."""
    return _mac(secret, role.encode(), name, pools, clients)


def same(one: bytes, other: bytes) -> bool:
    """Whether two MACs are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)


class Session:
    """One side's end of a line after the handshake.

    Parameters
    ----------
    secret, name, pools, clients : bytes
        As of `proof`.
    role : {"pool", "client"}
        Of this side.
    """

    def __init__(self, secret: bytes, role: Role, name: bytes, pools: bytes, clients: bytes) -> None:
        self._key = bytes.fromhex(_mac(secret, b"session", name, pools, clients).decode("ascii"))
        self._mine, self._theirs = role.encode(), b"client" if role == "pool" else b"pool"
        self._sent = self._got = 0

    def seal(self, body: dict[str, Any]) -> bytes:
        """The next line to send, with its newline."""
        text = json.dumps(body, separators=(",", ":")).encode("ascii")
        mac = _mac(self._key, self._mine, str(self._sent).encode(), text)
        self._sent += 1
        line = mac + b" " + text + b"\n"
        if len(line) > LINE:
            raise ValueError(f"a line of {len(line)} bytes; at most {LINE}")
        return line

    def open(self, line: bytes) -> dict[str, Any]:
        """What the next line says, given without its newline.

        Raises
        ------
        WrongSecret
            It is not the line that the other side sent next.
        """
        match = _SEALED.fullmatch(line)
        if match is None or not same(match[1], _mac(self._key, self._theirs, str(self._got).encode(), match[2])):
            raise WrongSecret(
                "a line did not come from the other side, or not in this order", next_step="who else is on this line?"
            )
        self._got += 1
        body: dict[str, Any] = json.loads(match[2])
        return body


def _mac(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 in hex over parts with their lengths, so that none runs into the next."""
    made = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        made.update(len(part).to_bytes(8, "big") + part)
    return made.hexdigest().encode("ascii")
