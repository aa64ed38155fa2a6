"""A proxy before a test's HTTP server: it records requests, and fails on demand."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

# "503": the answer, after all of the body; "reset": the connection ends in the middle of it.
Fault = Literal["503", "reset"]


@dataclass(frozen=True)
class Request:
    """A recorded request.

    Args:
        method: of HTTP.
        path: with the query.
        body_bytes: how much there was of it.
        status: of the answer; 0: there was none.
    """

    method: str
    path: str
    body_bytes: int
    status: int


class Proxy:
    """Forwards to one address.

    Args:
        port: where to, on this machine.

    Attributes:
        requests: that have been answered, in order.
        fault: asked about each request, by method and path: how it is to fail, if at all.
        delay_s: asked likewise: how long it waits before it goes on to the server.
    """

    def __init__(self, port: int) -> None:
        self.requests: list[Request] = []
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.delay_s: Callable[[str, str], float] = lambda method, path: 0.0
        self._target = port
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def paths(self, method: str, part: str = "") -> list[str]:
        """Those that went by with a method, and a part of the path."""
        return [request.path for request in self.requests if request.method == method and part in request.path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _forward(self) -> None:
                fault = proxy.fault(self.command, self.path)
                if fault == "reset":
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self._end(0, 0)
                    return
                body = self._body()
                if fault == "503":
                    self._answer(503, [], b"try again")
                    self._end(len(body), 503)
                    return
                time.sleep(proxy.delay_s(self.command, self.path))
                connection = http.client.HTTPConnection("127.0.0.1", proxy._target, timeout=120)
                try:
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_A_HOP}
                    connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
                    answer = connection.getresponse()
                    content = answer.read()
                except OSError:
                    self._end(len(body), 0)  # the server is away: so is this
                    return
                finally:
                    connection.close()
                proxy.requests.append(Request(self.command, self.path, len(body), answer.status))
                self._answer(answer.status, answer.getheaders(), content)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return body

            def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                self.send_response_only(status)
                length = next((value for name, value in headers if name.lower() == "content-length"), None)
                for name, value in headers:
                    if name.lower() not in _OF_A_HOP:
                        self.send_header(name, value)
                # A response to HEAD has the length of a body that is not sent.
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _end(self, body_bytes: int, status: int) -> None:
                proxy.requests.append(Request(self.command, self.path, body_bytes, status))
                self.close_connection = True

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _forward

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


_OF_A_HOP = frozenset({"content-length", "transfer-encoding", "connection"})
