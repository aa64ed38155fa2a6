"""Share a job's secret among its ranks, and authenticate them with it. Importing this never imports torch.

slurm/train.sbatch puts the secret into the environment of the step, which other users cannot read. For a step started
in another way, rank 0 writes it to a file with mode 0600 in the directory of the runs.

The handshake authenticates both sides before either uses anything that the other sends:

    client   nonce c ->                        32 random bytes
    server            <- nonce s, MAC server   the client verifies the MAC before it sends anything else
    client   rank, MAC client ->               the server verifies the MAC before it sends the message
    server            <- length, message, MAC  the client verifies the MAC before it parses the message

Each MAC is HMAC-SHA256 under the secret over its role, the job's name and both nonces; the client's also covers its
rank. A MAC therefore cannot be replayed, used for another purpose, or reflected to its sender.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.errors import LaunchError

# Set by `harness rank`: the job's name, from which its ranks derive their ports (`harness.distributed.job_rendezvous`).
JOB_VARIABLE = "HARNESS_JOB"
# The secret, at least 32 characters; set by slurm/train.sbatch, or by the user who starts the step.
SECRET_VARIABLE = "HARNESS_JOB_SECRET"
# Path of the secret's file; set by `harness rank` if the variable above is not set.
FILE_VARIABLE = "HARNESS_JOB_SECRET_FILE"
# Name of that file, for the job's name. The directory may contain other files of the user.
FILE_NAME = "rendezvous-{}.secret"
_MIN_CHARS = 32
# Ranks wait for half an hour at most; the rest allows for clocks of nodes and file servers that differ.
_OLD_S = 24 * 3600.0

_NONCE_BYTES = 32
_MAC_BYTES = 32
_RANK_BYTES = 4
_LENGTH_BYTES = 4
_MAX_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True)
class JobSecret:
    """A job's secret: either a value, or the path of a file that rank 0 writes and the other ranks read."""

    value: bytes | None
    path: Path | None = None

    @classmethod
    def from_environment(cls) -> JobSecret:
        """Return the secret that the environment names.

        Raises:
            LaunchError: if it names neither a secret nor a file, or the secret is too short.
        """
        value = os.environ.get(SECRET_VARIABLE)
        if value is not None:
            if len(value) < _MIN_CHARS:
                raise LaunchError(f"{SECRET_VARIABLE}: must have at least {_MIN_CHARS} characters, has {len(value)}")
            return cls(value.encode())
        if FILE_VARIABLE not in os.environ:
            raise LaunchError(
                "the ranks have no secret to authenticate one another; start them with `harness rank`, or set "
                f"{SECRET_VARIABLE}"
            )
        return cls(None, Path(os.environ[FILE_VARIABLE]))

    def create(self) -> bytes:
        """Return the secret on rank 0; without a value, create one and write it to the file.

        Effects: leaves the file, mode 0600, until `discard`, and replaces a link in its place; removes files of other
        jobs that are older than a day, whose rank 0 was killed before its ranks had joined.

        Raises:
            LaunchError: if the file cannot be written.
        """
        if self.path is None:
            assert self.value is not None
            return self.value
        value = secrets.token_hex(_MIN_CHARS)
        _remove_old(self.path.parent)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w") as file:
                file.write(value)
        except OSError as error:
            raise LaunchError(
                f"{self.path}: the job's secret cannot be written: {error.strerror}; give another --run_dir, or set "
                f"{SECRET_VARIABLE}"
            ) from error
        return value.encode()

    def read(self) -> bytes | None:
        """Return the secret on a rank other than 0; None until rank 0 has written it.

        Raises:
            LaunchError: if the file cannot be read, or another user may know its content.
        """
        if self.path is None:
            return self.value
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LaunchError(f"{self.path}: the job's secret cannot be read: {error.strerror}") from error
        with open(descriptor) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise LaunchError(
                    f"{self.path}: another user can know the job's secret: the file belongs to user {status.st_uid} "
                    f"and has mode {stat.S_IMODE(status.st_mode):04o}; remove it, or set {SECRET_VARIABLE} for the step"
                )
            value = file.read()
        # A shorter file is being written.
        return value.encode() if len(value) >= _MIN_CHARS else None

    def discard(self) -> None:
        """Remove the file, if it exists. Rank 0 calls this once every rank has joined, and when it ends."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()


def _remove_old(directory: Path) -> None:
    for path in directory.glob(FILE_NAME.format("*")):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _OLD_S:
                path.unlink()


class AuthenticationError(OSError):
    """The peer does not know the secret, or does not speak this protocol."""


@dataclass(frozen=True)
class Handshake:
    """Runs either side of the handshake, within `timeout_s`, and transfers the server's message after it."""

    secret: bytes
    job: str
    timeout_s: float

    def send(self, connection: socket.socket, message: bytes) -> int:
        """Authenticate a client, send it the message and return its rank.

        Effects: any thread; blocks at most `timeout_s`.

        Raises:
            AuthenticationError: if the client does not know the secret.
            OSError: if the connection breaks, or the time limit is exceeded.
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

    def receive(self, connection: socket.socket, rank: int) -> bytes:
        """Authenticate a server and return its message. Effects and errors are those of `send`."""
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
            raise AuthenticationError(f"the peer announces a message of {length} bytes")
        message = _receive(connection, length, deadline_s)
        self._check(_receive(connection, _MAC_BYTES, deadline_s), "message", mine, theirs, message)
        return message

    def _mac(self, role: str, *parts: bytes) -> bytes:
        fields = [role.encode(), self.job.encode(), *parts]
        text = b"".join(len(field).to_bytes(_LENGTH_BYTES, "big") + field for field in fields)
        return hmac.digest(self.secret, text, "sha256")

    def _check(self, found: bytes, role: str, *parts: bytes) -> None:
        if not hmac.compare_digest(found, self._mac(role, *parts)):
            raise AuthenticationError("the peer does not know the secret")


def _receive(connection: socket.socket, num_bytes: int, deadline_s: float) -> bytes:
    received = b""
    while len(received) < num_bytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the peer does not answer in time")
        connection.settimeout(left_s)
        if not (part := connection.recv(num_bytes - len(received))):
            raise AuthenticationError("the peer has closed the connection")
        received += part
    return received
