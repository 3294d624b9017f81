"""Bounds on what a client may send."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOO_LARGE = 413


class BodyLimit:
    """ASGI middleware that answers 413 once a request body passes ``max_bytes``, declared or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _declared_bytes(scope) > self._max_bytes:
            body = {"error": self._reason, "error_type": "HTTPException"}
            await JSONResponse(body, status_code=TOO_LARGE)(scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # Whoever reads a body passes this on to the app's handler of HTTP errors.
                raise HTTPException(TOO_LARGE, self._reason)
            return message

        await self._app(scope, count, send)

    @property
    def _reason(self) -> str:
        return f"a request is at most {self._max_bytes} bytes"


def _declared_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
