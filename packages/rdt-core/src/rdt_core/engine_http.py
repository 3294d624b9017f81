"""The driver's side of the ``/rdt/*`` routes.

The standard library's client, over connections that are kept: a request takes a third of the time that a
full client library needs for it, and two of them lie on the way of every sync.
"""

from __future__ import annotations

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

    def call(self, method: str, payload: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """POST ``/rdt/<method>`` (GET for ``status``) and return the answer's JSON.

        Raises:
            RdtError: the typed error that the engine answered.
            EngineRefusedError: it answered an error of another kind.
            EngineUnreachableError: it did not answer within ``timeout_s`` seconds.
        """
        body = None if method == "status" else json.dumps(payload).encode()
        try:
            connection = self._take(timeout_s)
            status, answer = self._exchange(connection, f"/rdt/{method}", body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineUnreachableError(self.url, f"{type(error).__name__} {error}".strip()) from error
        return self._parse(status, answer)

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

    def _exchange(
        self, connection: http.client.HTTPConnection, route: str, body: bytes | None
    ) -> tuple[int, bytes]:
        try:
            prefix = urlsplit(self.url).path
            connection.request("GET" if body is None else "POST", prefix + route, body, self._headers)
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
        while self._idle:
            self._idle.pop().close()
