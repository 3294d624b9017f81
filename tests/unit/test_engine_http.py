from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from rdt_core.engine_http import EngineHttp
from rdt_core.error_wire import to_wire
from rdt_core.errors import EngineRefusedError, EngineUnreachableError, SupersededError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Server(ThreadingHTTPServer):
    """Answers from a table by route; remembers what it was asked and over how many connections."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {
        "/rdt/status": (200, b'{"version": 3}'),
        "/rdt/commit": (409, json.dumps({"error": to_wire(SupersededError(1, 2))}).encode()),
        "/rdt/prepare": (401, b'{"detail": "send the server\'s API key"}'),
        "/rdt/connect": (404, b"<html>not here</html>"),
        "/rdt/abort": (200, b"[1]"),
        "/proxy/rdt/status": (200, b'{"behind": "a proxy"}'),
    }

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.num_connections = 0
        self.hang_up = False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.num_connections += 1
        super().process_request(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        """Say nothing."""

    def do_GET(self) -> None:
        nbytes = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(nbytes)
        if len(body) < nbytes:  # the client left
            self.close_connection = True
            return
        sent = json.loads(body) if body else None
        self.server.asked.append((self.command, self.path, sent, self.headers.get("Authorization")))
        status, answer = self.server.answers[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        if self.server.hang_up:
            # Without saying so in the answer, as a server does whose idle time ran out.
            self.close_connection = True

    do_POST = do_GET  # noqa: N815  the name that the base class calls


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join(30)


@pytest.fixture
def engine(server: Server) -> Iterator[EngineHttp]:
    made = EngineHttp(server.url + "/", api_key="secret-key")
    yield made
    made.close()
    made.close()


def test_calls_share_a_connection_and_carry_the_key(server: Server, engine: EngineHttp) -> None:
    assert engine.call("status", {}, timeout_s=30) == {"version": 3}
    assert engine.call("status", {}, timeout_s=30) == {"version": 3}
    assert server.num_connections == 1
    assert server.asked[0] == ("GET", "/rdt/status", None, "Bearer secret-key")


def test_a_typed_error_of_the_engine_is_raised_as_itself(server: Server, engine: EngineHttp) -> None:
    with pytest.raises(SupersededError) as caught:
        engine.call("commit", {"version": 1}, timeout_s=30)
    assert caught.value.current == 2
    assert server.asked[0][:3] == ("POST", "/rdt/commit", {"version": 1})


@pytest.mark.parametrize(
    ("method", "status", "detail"),
    [("prepare", 401, "API key"), ("connect", 404, "not here"), ("abort", 200, r"\[1\]")],
)
def test_any_other_answer_is_a_refusal_with_its_status(
    engine: EngineHttp, method: str, status: int, detail: str
) -> None:
    with pytest.raises(EngineRefusedError, match=detail) as caught:
        engine.call(method, {}, timeout_s=30)
    assert caught.value.status == status
    assert "secret-key" not in str(caught.value)


def test_a_connection_that_the_server_closed_is_replaced(server: Server, engine: EngineHttp) -> None:
    server.hang_up = True
    for expected in (1, 2, 3):
        engine.call("status", {}, timeout_s=30)
        (connection,) = engine._idle
        # Until the server's end has arrived here.
        connection.sock.settimeout(30)
        assert connection.sock.recv(1, socket.MSG_PEEK) == b""
        assert server.num_connections == expected


def test_a_path_in_the_url_stays_in_front(server: Server) -> None:
    engine = EngineHttp(f"{server.url}/proxy")
    assert engine.call("status", {}, timeout_s=30) == {"behind": "a proxy"}
    engine.close()


def test_an_engine_that_does_not_answer_in_time_is_unreachable() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        engine = EngineHttp(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(EngineUnreachableError, match="timed out"):
            engine.call("status", {}, timeout_s=0.05)
        engine.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://127.0.0.1:1", "nonsense", "http://host:port"])
def test_an_address_that_cannot_be_reached_is_unreachable(url: str) -> None:
    engine = EngineHttp(url)
    with pytest.raises(EngineUnreachableError):
        engine.call("status", {}, timeout_s=5)


def test_a_call_that_was_announced_needs_only_its_body(server: Server, engine: EngineHttp) -> None:
    engine.announce("connect", {"number": 1})
    engine.call("status", {}, timeout_s=5)
    assert [asked[1] for asked in server.asked] == ["/rdt/status"]
    with pytest.raises(EngineRefusedError):
        engine.call("connect", {"number": 2}, timeout_s=5)
    assert server.asked[-1] == ("POST", "/rdt/connect", {"number": 2}, "Bearer secret-key")
    assert server.num_connections == 2


@pytest.mark.parametrize("payload", [{"number": 10}, {}])
def test_a_payload_of_another_length_is_sent_whole(
    server: Server, engine: EngineHttp, payload: dict[str, int]
) -> None:
    engine.announce("connect", {"number": 1})
    with pytest.raises(EngineRefusedError):
        engine.call("connect", payload, timeout_s=5)
    assert [asked[2] for asked in server.asked] == [payload]


def test_an_announcement_that_is_taken_back_or_replaced_is_no_call(
    server: Server, engine: EngineHttp
) -> None:
    engine.announce("connect", {"number": 1})
    engine.announce("connect", {"number": 1})
    engine.retract("connect")
    engine.retract("connect")
    assert engine.call("status", {}, timeout_s=5) == {"version": 3}
    assert [asked[1] for asked in server.asked] == ["/rdt/status"]


def test_an_engine_that_dropped_an_announcement_is_called_anew(server: Server, engine: EngineHttp) -> None:
    engine.announce("connect", {"number": 1})
    (announced, _) = engine._announced["connect"]
    # What a server, or a proxy before it, does that has waited for long enough.
    announced.sock.shutdown(socket.SHUT_RD)
    with pytest.raises(EngineRefusedError):
        engine.call("connect", {"number": 1}, timeout_s=5)
    assert len(server.asked) == 1


def test_a_call_whose_head_could_not_be_sent_ahead_is_sent_whole(
    server: Server, engine: EngineHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_send_head", fail)
        engine.announce("connect", {"number": 1})
    assert not engine._announced
    with pytest.raises(EngineRefusedError):
        engine.call("connect", {"number": 1}, timeout_s=5)
    assert [asked[2] for asked in server.asked] == [{"number": 1}]


def test_an_engine_that_cannot_be_reached_is_announced_to_in_vain() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        engine = EngineHttp(f"http://127.0.0.1:{probe.getsockname()[1]}")
    engine.announce("commit", {})
    with pytest.raises(EngineUnreachableError):
        engine.call("commit", {}, timeout_s=5)
