"""The driver's side of the ``/rdt/*`` routes."""

from __future__ import annotations

from typing import Any

import httpx

from rdt_core.error_wire import from_wire
from rdt_core.errors import EngineRefusedError, EngineUnreachableError

_CONNECT_TIMEOUT_S = 5.0
_MAX_DETAIL = 300


class EngineHttp:
    """One engine server, by its URL. Close it when done.

    Args:
        url: ``http://host:port``, without a path.
        api_key: sent as a bearer token; never logged, never in an error.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, trust_env=False)

    def call(self, method: str, payload: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """POST ``/rdt/<method>`` (GET for ``status``) and return the answer's JSON.

        Raises:
            RdtError: the typed error that the engine answered.
            EngineRefusedError: it answered an error of another kind.
            EngineUnreachableError: it did not answer within ``timeout_s`` seconds.
        """
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        try:
            if method == "status":
                response = self._client.get("/rdt/status", timeout=timeout)
            else:
                response = self._client.post(f"/rdt/{method}", json=payload, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineUnreachableError(self.url, f"{type(error).__name__} {error}".strip()) from error
        return self._parse(response)

    def _parse(self, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        if isinstance(body, dict) and isinstance(body.get("error"), dict) and "type" in body["error"]:
            raise from_wire(body["error"])
        detail = body.get("detail") if isinstance(body, dict) and "detail" in body else response.text
        raise EngineRefusedError(self.url, response.status_code, str(detail)[:_MAX_DETAIL])

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._client.close()
