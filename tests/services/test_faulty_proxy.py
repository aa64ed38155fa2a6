"""The proxy of the fault tests, in front of a server that counts requests."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from tests.services.faulty_proxy import Fault, FaultyProxy

DONE: Counter[str] = Counter()


class Counts(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        wanted = int(self.headers["Content-Length"])
        if len(self.rfile.read(wanted)) < wanted:
            DONE["torn"] += 1
            return
        DONE[self.path] += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"done")

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    DONE.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counts)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    proxy = FaultyProxy("127.0.0.1", server.server_address[1])
    yield proxy
    proxy.close()
    server.shutdown()
    server.server_close()


def post(proxy: FaultyProxy, path: str = "/a", body: bytes = b"x", timeout_s: float = 10) -> requests.Response:
    return requests.post(proxy.uri + path, data=body, timeout=timeout_s)


def test_requests_pass_when_nothing_is_wrong(proxy: FaultyProxy) -> None:
    assert post(proxy, body=b"x" * 300_000).text == "done"
    assert requests.post(proxy.uri + "/a", data=iter([b"in", b"chunks"]), timeout=10).text == "done"
    assert DONE == {"/a": 2}
    assert proxy.num_requests == {"POST /a": 2}


def test_server_has_done_it_or_not_as_the_fault_says(proxy: FaultyProxy) -> None:
    proxy.misbehave(Fault("before", status=504, path="/b"), Fault("after", status=504, is_forwarded=True, path="/a"))
    assert [post(proxy, path).status_code for path in ("/a", "/b", "/c")] == [504, 504, 200]
    assert DONE == {"/a": 1, "/c": 1}
    assert proxy.num_hit == {"before": 1, "after": 1}


def test_only_a_share_or_a_number_is_hit_when_asked(proxy: FaultyProxy) -> None:
    proxy.misbehave(Fault("some", status=500, share=0.5))
    found = Counter(post(proxy).status_code for _ in range(40))
    assert found.keys() == {200, 500}
    proxy.misbehave(Fault("two", status=429, times=2, headers={"Retry-After": "3"}))
    answers = [post(proxy) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == "3"


def test_connections_are_refused_until_they_are_accepted_again(proxy: FaultyProxy) -> None:
    proxy.refuse()
    with pytest.raises(requests.ConnectionError):
        post(proxy)
    proxy.accept()
    assert post(proxy).status_code == 200
    assert DONE == {"/a": 1}


def test_client_has_no_answer_when_it_hangs(proxy: FaultyProxy) -> None:
    proxy.misbehave(Fault("hang", hangs=True))
    with pytest.raises(requests.Timeout):
        post(proxy, timeout_s=0.3)
    proxy.behave()
    assert not DONE


def test_server_does_it_after_the_client_has_given_up_when_late(proxy: FaultyProxy) -> None:
    proxy.misbehave(Fault("late", hangs=True, is_late=True))
    with pytest.raises(requests.Timeout):
        post(proxy, timeout_s=0.3)
    assert not DONE
    proxy.behave()
    assert DONE == {"/a": 1}


def test_upload_is_torn_when_cut(proxy: FaultyProxy) -> None:
    proxy.misbehave(Fault("cut", cut_after_bytes=100_000))
    with pytest.raises(requests.ConnectionError):
        post(proxy, body=b"x" * 5_000_000)
    proxy.behave()
    assert post(proxy).status_code == 200
    assert DONE["/a"] == 1
