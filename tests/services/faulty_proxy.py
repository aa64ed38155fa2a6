"""An HTTP proxy on loopback whose behaviour is switched while it runs: between harness and a real MLflow server.

    proxy = FaultyProxy("127.0.0.1", port)
    proxy.misbehave(Fault(status=504, is_forwarded=True, share=0.5))

Each request has a connection of its own, so that a switch holds from the next request on.
"""

from __future__ import annotations

import http.client
import random
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

_CHUNK_BYTES = 65536
_UPSTREAM_LIMIT_S = 120.0
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host"})


@dataclass(frozen=True)
class Fault:
    """What happens to the requests that it is for.

    Args:
        name: what it is counted under.
        status: the answer, instead of the server's; None: none (see the others), and the connection is closed.
        is_forwarded: the server has done it before, and the client does not learn it.
        is_late: the server gets it only when the fault is over, however long after the client has given up.
        hangs: no answer until the fault is over.
        cut_after_bytes: the connection ends when so many bytes of the body have gone on to the server.
        headers: of the answer.
        content: the body of the answer; None: JSON that has the fault's name.
        method: only requests of this method; empty: of any.
        path: only requests with this in their path.
        share: of those requests, drawn at random.
        times: so often at most; None: always.
    """

    name: str
    status: int | None = None
    is_forwarded: bool = False
    is_late: bool = False
    hangs: bool = False
    cut_after_bytes: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    method: str = ""
    path: str = ""
    share: float = 1.0
    times: int | None = None


class FaultyProxy:
    """Forwards requests, until a fault is set.

    Effects: threads of its own, which end with `close`; an address that stays the same while it refuses.

    Args:
        host: of the server.
        port: of the server.
        seed: of what is drawn.

    Attributes:
        uri: where clients find it.
        num_requests: how many came, by method and path.
        num_hit: how many had a fault, by its name.
    """

    def __init__(self, host: str, port: int, seed: int = 1) -> None:
        self.upstream = (host, port)
        self.num_requests: Counter[str] = Counter()
        self.num_hit: Counter[str] = Counter()
        self._draw = random.Random(seed)
        self._changed = threading.Condition()
        self._faults: tuple[Fault, ...] = ()
        self._era = 0
        self._open: set[socket.socket] = set()
        self._server: _Server | None = None
        self._late: list[threading.Thread] = []
        self.port = 0
        self.accept()
        self.uri = f"http://127.0.0.1:{self.port}"

    def accept(self) -> None:
        """Take connections, again."""
        if self._server is None:
            self._server = _Server(("127.0.0.1", self.port), _Handler)
            self._server.proxy = self
            self.port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse connections and close existing ones, like a machine that is down."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        with self._changed:
            cut = list(self._open)
        for connection in cut:
            _cut(connection)

    def misbehave(self, *faults: Fault) -> None:
        """These faults from now on, the first that a request is of; those of before are over."""
        with self._changed:
            self._faults = faults
            self._era += 1
            self._changed.notify_all()

    def behave(self) -> None:
        """Forward everything; returns after the server has received the delayed requests."""
        self.misbehave()
        while self._late:
            self._late.pop().join()

    def wait_until(self, what: str, count: int, limit_s: float) -> None:
        """Wait until so many requests had a fault of this name, or a path that contains this."""
        deadline_s = time.monotonic() + limit_s

        def is_so() -> bool:
            paths = sum(number for path, number in self.num_requests.items() if what in path)
            return self.num_hit[what] + paths >= count

        with self._changed:
            if not self._changed.wait_for(is_so, max(0.0, deadline_s - time.monotonic())):
                raise AssertionError(f"not {count} times {what} within {limit_s} s: {self.num_hit} {self.num_requests}")

    def wait_until_each_has_hit(self, limit_s: float) -> None:
        """Wait until each of the faults of this moment has met a request: those of a share meet some that are drawn."""
        with self._changed:
            names = {fault.name for fault in self._faults}
            if not self._changed.wait_for(lambda: names <= self.num_hit.keys(), limit_s):
                raise AssertionError(f"not all of {names} within {limit_s} s: {self.num_hit} {self.num_requests}")

    def close(self) -> None:
        """End."""
        self.behave()
        self.refuse()

    # ------------------------------------------------------------------ for the handler

    def fault_of(self, method: str, path: str) -> Fault | None:
        """The fault of this request, which is counted."""
        with self._changed:
            self.num_requests[f"{method} {path.partition('?')[0]}"] += 1
            found = None
            for fault in self._faults:
                is_meant = fault.method in ("", method) and fault.path in path
                is_spent = fault.times is not None and self.num_hit[fault.name] >= fault.times
                if is_meant and not is_spent and self._draw.random() < fault.share:
                    found = fault
                    self.num_hit[fault.name] += 1
                    break
            self._changed.notify_all()
            return found

    def wait_for_change(self) -> None:
        """Return when the faults of this moment are over."""
        with self._changed:
            era = self._era
            self._changed.wait_for(lambda: self._era != era)

    def after_this(self, action: threading.Thread) -> None:
        """Have something done, by a thread that waits for the change itself."""
        self._late.append(action)
        action.start()

    def opened(self, connection: socket.socket) -> None:
        """A connection is in use."""
        with self._changed:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """It is no longer."""
        with self._changed:
            self._open.discard(connection)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address: ClassVar[bool] = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultyProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore closed connections, which are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_one_request(self) -> None:
        self.server.proxy.opened(self.connection)
        try:
            super().handle_one_request()
        finally:
            self.close_connection = True
            self.server.proxy.closed(self.connection)

    def _serve(self) -> None:
        proxy = self.server.proxy
        fault = proxy.fault_of(self.command, self.path)
        if fault is None:
            self._answer(*self._forward(self._body()))
            return
        if fault.cut_after_bytes is not None:
            self._forward_cut(fault.cut_after_bytes)
            return
        body = b"".join(self._body())
        if fault.is_late:
            proxy.after_this(threading.Thread(target=self._forward_late, args=(body,), daemon=True))
        elif fault.is_forwarded:
            self._forward(iter([body]))
        if fault.hangs:
            proxy.wait_for_change()
        if fault.status is None:
            _cut(self.connection)
        else:
            named = f'{{"error_code": "FAULT", "message": "{fault.name}"}}'.encode()
            content = named if fault.content is None else fault.content
            self._answer(fault.status, {"Content-Type": "application/json", **fault.headers}, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _serve

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read1(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ConnectionError("the client has gone in the middle of its request")
            left -= len(chunk)
            yield chunk

    def _connect(self) -> http.client.HTTPConnection:
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=_UPSTREAM_LIMIT_S)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        upstream.putheader("Host", "{}:{}".format(*self.server.proxy.upstream))
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.putheader("Connection", "close")
        return upstream

    def _forward(self, body: Iterator[bytes]) -> tuple[int, Mapping[str, str], bytes]:
        upstream = self._connect()
        try:
            has_length = "Content-Length" in self.headers
            if has_length:
                upstream.putheader("Content-Length", self.headers["Content-Length"])
                upstream.endheaders()
                for chunk in body:
                    upstream.send(chunk)
            else:
                whole = b"".join(body)
                upstream.putheader("Content-Length", str(len(whole)))
                upstream.endheaders(whole)
            answer = upstream.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            return answer.status, headers, content
        except OSError as error:
            # The response of a load balancer whose server is down.
            return 502, {"Content-Type": "text/plain"}, f"no server: {error}".encode()
        finally:
            upstream.close()

    def _forward_late(self, body: bytes) -> None:
        self.server.proxy.wait_for_change()
        self._forward(iter([body]))

    def _forward_cut(self, num_bytes: int) -> None:
        upstream = self._connect()
        if "Content-Length" in self.headers:
            upstream.putheader("Content-Length", self.headers["Content-Length"])
        upstream.endheaders()
        left = num_bytes
        for chunk in self._body():
            upstream.send(chunk[:left])
            left -= len(chunk)
            if left <= 0:
                break
        assert upstream.sock is not None
        _cut(upstream.sock)
        upstream.close()
        _cut(self.connection)

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def _cut(connection: socket.socket) -> None:
    """Close a connection in both directions, also for other readers."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
