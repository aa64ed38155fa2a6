"""Two processes prove to each other, over a socket, that they know a secret; then one hands the other a message.

    client   nonce c ->                        32 random bytes
    server            <- nonce s, MAC server   the client checks it before it sends anything else
    client   rank, MAC client ->               the server checks it before it sends the message
    server            <- length, message, MAC  the client checks it before it looks at the message

Each MAC is HMAC-SHA256 under the secret, over its role, the name of what both belong to, and both nonces; the client's
covers its rank too. So none can be used a second time, for another purpose, or by the side that it came from.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from dataclasses import dataclass

_NONCE_BYTES = 32
_MAC_BYTES = 32
_RANK_BYTES = 4
_LENGTH_BYTES = 4
_MAX_MESSAGE_BYTES = 1 << 16


class AuthenticationError(OSError):
    """The other side does not know the secret, or does not speak this protocol."""


@dataclass(frozen=True)
class Handshake:
    """What both sides know.

    Args:
        secret: known to nobody else.
        name: of what both belong to; the same on both sides.
        timeout_s: limit of one whole handshake, in seconds.
    """

    secret: bytes
    name: str
    timeout_s: float

    def answer(self, connection: socket.socket, message: bytes) -> int:
        """Send the message to a client that knows the secret; returns its rank.

        Effects: any thread; blocks for at most `timeout_s`.

        Raises:
            AuthenticationError: if it does not.
            OSError: if the connection breaks, or the time is over.
        """
        deadline_s = time.monotonic() + self.timeout_s
        theirs, mine = _receive(connection, _NONCE_BYTES, deadline_s), secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(mine + self._mac("server", theirs, mine))
        rank = _receive(connection, _RANK_BYTES, deadline_s)
        self._check(_receive(connection, _MAC_BYTES, deadline_s), "client", theirs, mine, rank)
        connection.sendall(
            len(message).to_bytes(_LENGTH_BYTES, "big") + message + self._mac("message", theirs, mine, message)
        )
        return int.from_bytes(rank, "big")

    def ask(self, connection: socket.socket, rank: int) -> bytes:
        """The message of a server that knows the secret.

        Effects, Raises: as `answer`.

        Args:
            connection: to the server.
            rank: of this process.
        """
        deadline_s = time.monotonic() + self.timeout_s
        mine = secrets.token_bytes(_NONCE_BYTES)
        connection.settimeout(self.timeout_s)
        connection.sendall(mine)
        theirs = _receive(connection, _NONCE_BYTES, deadline_s)
        self._check(_receive(connection, _MAC_BYTES, deadline_s), "server", mine, theirs)
        own = rank.to_bytes(_RANK_BYTES, "big")
        connection.sendall(own + self._mac("client", mine, theirs, own))
        length = int.from_bytes(_receive(connection, _LENGTH_BYTES, deadline_s), "big")
        if length > _MAX_MESSAGE_BYTES:
            raise AuthenticationError(f"a message of {length} bytes is announced")
        message = _receive(connection, length, deadline_s)
        self._check(_receive(connection, _MAC_BYTES, deadline_s), "message", mine, theirs, message)
        return message

    def _mac(self, role: str, *parts: bytes) -> bytes:
        fields = [role.encode(), self.name.encode(), *parts]
        text = b"".join(len(field).to_bytes(_LENGTH_BYTES, "big") + field for field in fields)
        return hmac.digest(self.secret, text, "sha256")

    def _check(self, found: bytes, role: str, *parts: bytes) -> None:
        if not hmac.compare_digest(found, self._mac(role, *parts)):
            raise AuthenticationError("the other side does not know the secret")


def _receive(connection: socket.socket, num_bytes: int, deadline_s: float) -> bytes:
    received = b""
    while len(received) < num_bytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the other side does not answer in time")
        connection.settimeout(left_s)
        if not (part := connection.recv(num_bytes - len(received))):
            raise AuthenticationError("the other side has closed the connection")
        received += part
    return received
