"""The driver's side of the ``/rdt/*`` routes.

The standard library's client, over connections that are kept: a request takes a third of the time that a
full client library needs for it, and two of them lie on the way of every sync.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rdt_core.error_wire import from_wire
from rdt_core.errors import EngineRefusedError, EngineUnreachableError

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONNECT_TIMEOUT_S = 5.0
_LOOK_TIMEOUT_S = 2.0
_MAX_DETAIL = 300
_KINDS: dict[str, type[http.client.HTTPConnection]] = {
    "http": http.client.HTTPConnection,
    "https": http.client.HTTPSConnection,
}


class EngineHttp:
    """One engine server, by its URL. Any thread may call. Close it when done.

    Args:
        url: ``http://host:port`` or ``https://...``.
        api_key: sent as a bearer token; never logged, never in an error.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._idle: list[http.client.HTTPConnection] = []
        self._announced: dict[str, tuple[http.client.HTTPConnection, int]] = {}

    def call(self, method: str, payload: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """POST ``/rdt/<method>`` (GET for ``status``) and return the answer's JSON.

        Raises:
            RdtError: the typed error that the engine answered.
            EngineRefusedError: it answered an error of another kind.
            EngineUnreachableError: it did not answer within ``timeout_s`` seconds.
        """
        body = None if method == "status" else json.dumps(payload).encode()
        try:
            announced = self._take_announced(method, body)
            connection = announced or self._take(timeout_s)
            connection.sock.settimeout(timeout_s)
            status, answer = self._exchange(connection, method, body, has_head=announced is not None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineUnreachableError(self.url, f"{type(error).__name__} {error}".strip()) from error
        return self._parse(status, answer)

    def announce(self, method: str, payload: Mapping[str, Any]) -> None:
        """Send the head of a :meth:`call` that comes soon, of a payload as long as this one.

        The engine has routed it then when its body comes, and waits for that alone. Replaces an earlier
        announcement. Never raises: a call whose announcement failed, or has been dropped by the engine since,
        is sent whole. Blocks for a write, and for a connect where no connection is open.
        """
        self.retract(method)
        nbytes = len(json.dumps(payload).encode())
        refused = (OSError, http.client.HTTPException, ValueError)
        with contextlib.suppress(*refused), contextlib.ExitStack() as undo:
            connection = self._take(_CONNECT_TIMEOUT_S)
            undo.callback(connection.close)
            self._send_head(connection, method, nbytes)
            undo.pop_all()
            self._announced[method] = connection, nbytes

    def retract(self, method: str) -> None:
        """Take an announcement back; the engine forgets it. Idempotent."""
        announced = self._announced.pop(method, None)
        if announced is not None:
            announced[0].close()

    def is_listening(self) -> bool:
        """Whether something accepts connections at the engine's address. Blocks for 2 seconds at most."""
        where = urlsplit(self.url)
        port = where.port or (http.client.HTTPS_PORT if where.scheme == "https" else http.client.HTTP_PORT)
        try:
            with socket.create_connection((where.hostname or "", port), timeout=_LOOK_TIMEOUT_S):
                return True
        except OSError:
            return False

    def _take(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is open, as far as one can tell; servers close those that they find idle."""
        while self._idle:
            connection = self._idle.pop()
            if not select.select([connection.sock], [], [], 0)[0]:
                connection.sock.settimeout(timeout_s)
                return connection
            connection.close()
        where = urlsplit(self.url)
        if where.scheme not in _KINDS:
            raise ValueError("its URL begins with neither http:// nor https://")
        connection = _KINDS[where.scheme](
            where.hostname or "", where.port, timeout=min(timeout_s, _CONNECT_TIMEOUT_S)
        )
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock.settimeout(timeout_s)
        return connection

    def _take_announced(self, method: str, body: bytes | None) -> http.client.HTTPConnection | None:
        """The connection on which just this call was announced, if the engine still waits for its body."""
        connection, nbytes = self._announced.pop(method, (None, 0))
        if connection is None or body is None:
            return None
        has_said_something = bool(select.select([connection.sock], [], [], 0)[0])
        if nbytes == len(body) and not has_said_something:
            return connection
        connection.close()
        return None

    def _send_head(self, connection: http.client.HTTPConnection, method: str, nbytes: int) -> None:
        connection.putrequest("POST", self._route(method))
        for name, value in {**self._headers, "Content-Length": str(nbytes)}.items():
            connection.putheader(name, value)
        connection.endheaders()

    def _route(self, method: str) -> str:
        return f"{urlsplit(self.url).path}/rdt/{method}"

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, body: bytes | None, *, has_head: bool
    ) -> tuple[int, bytes]:
        try:
            if body is None:
                connection.request("GET", self._route(method), headers=self._headers)
            else:
                if not has_head:
                    self._send_head(connection, method, len(body))
                connection.send(body)
            response = connection.getresponse()
            answer = response.read()
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return response.status, answer

    def _parse(self, status: int, answer: bytes) -> dict[str, Any]:
        try:
            body = json.loads(answer)
        except ValueError:
            body = None
        if status == http.client.OK and isinstance(body, dict):
            return body
        if isinstance(body, dict) and isinstance(body.get("error"), dict) and "type" in body["error"]:
            error = from_wire(body["error"])
            rank = body.get("failed_rank")
            error.failed_rank = rank if isinstance(rank, int) else -1
            raise error
        has_detail = isinstance(body, dict) and "detail" in body
        detail = body["detail"] if has_detail else answer.decode(errors="replace")
        raise EngineRefusedError(self.url, status, str(detail)[:_MAX_DETAIL])

    def close(self) -> None:
        """Close the connections. Idempotent."""
        for method in list(self._announced):
            self.retract(method)
        while self._idle:
            self._idle.pop().close()
