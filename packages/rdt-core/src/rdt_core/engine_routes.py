"""The HTTP control routes that every engine adapter adds to its server, ``/rdt/*``.

Bodies are JSON of plain values, bounded in size; answers carry our typed errors in their wire form. No
weight byte, no address of memory and no token passes here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from rdt_core.error_wire import from_wire, to_wire
from rdt_core.errors import (
    ConfigError,
    CoordinatorLostError,
    EngineAsleepError,
    EngineTornError,
    NotConnectedError,
    RdtError,
    UnknownGroupError,
    VersionError,
    WireFormatError,
)
from rdt_core.progress import report_of_engine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

MAX_BODY_BYTES = 64 * 1024
BODY_TIMEOUT_S = 300.0
"""A commit is announced before its version is there. A driver that waits longer than this sends it whole."""

_STATUS_OF_ERROR = (
    (WireFormatError, 400),
    (UnknownGroupError, 404),
    (NotConnectedError, 409),
    (VersionError, 409),
    (CoordinatorLostError, 503),
    (EngineTornError, 503),
    (EngineAsleepError, 409),
    (ConfigError, 400),
)


class EngineBackend(Protocol):
    """How the routes reach the workers of one engine server. Each adapter implements it.

    Attributes:
        engine: make and version, ``"vllm 0.32.0"``.
        world_size: number of worker ranks.
    """

    engine: str
    world_size: int

    async def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """Run :func:`rdt_core.engine_rpc.call` on every worker rank, between steps of the model.

        Returns:
            One answer a rank, each with ``ok`` and ``result`` or ``error``.
        """

    async def commit(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Commit on every rank at one point of the schedule, and label what is generated after it.

        Args:
            payload: ``version``, and ``kv_cache``: ``"recompute"`` or ``"keep"``.

        Returns:
            ``{"ranks": [one answer a rank], "stall_s": seconds that generation was held}``.
        """


def make_router(backend_of: Callable[[Request], EngineBackend], api_keys: Sequence[str]) -> APIRouter:
    """Routes ``/rdt/status`` (GET) and ``/rdt/connect|prepare|commit|abort|lend|reclaim|disconnect|digest``.

    Args:
        backend_of: finds the backend of the server that got a request.
        api_keys: any of them must be sent as a bearer token; none leaves the routes open.
    """
    router = APIRouter(prefix="/rdt", dependencies=[Depends(key_guard(api_keys))])

    for method in ("connect", "prepare", "abort", "lend", "reclaim", "disconnect", "digest"):
        router.add_api_route(f"/{method}", _forward(backend_of, method), methods=["POST"])

    @router.post("/commit")
    async def commit(request: Request) -> JSONResponse:
        payload = await read_body(request)
        if payload.get("kv_cache", "recompute") not in ("recompute", "keep"):
            raise HTTPException(400, "kv_cache must be 'recompute' or 'keep'")
        done = await backend_of(request).commit(payload)
        return _answer(done["ranks"], stall_s=done["stall_s"])

    @router.get("/status")
    async def status(request: Request) -> JSONResponse:
        backend = backend_of(request)
        ranks = await backend.call("status", {})
        states = [answer["result"] for answer in ranks if answer["ok"]]
        return _answer(ranks, engine=backend.engine, world_size=backend.world_size, **_summarize(states))

    return router


def key_guard(api_keys: Sequence[str]) -> Callable[[Request], Awaitable[None]]:
    """A FastAPI dependency that answers 401 unless one of the keys is sent as a bearer token."""
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys if key]

    # Not a plain function, which FastAPI would run in another thread: every sync waits for it twice.
    async def check(request: Request) -> None:
        if not digests:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        sent = hashlib.sha256(token.encode()).digest()
        # Compare with all, so that time tells nothing about which one matched.
        matches = [secrets.compare_digest(sent, digest) for digest in digests]
        if scheme.lower() != "bearer" or not any(matches):
            how = "send the server's API key as 'Authorization: Bearer KEY'"
            raise HTTPException(401, how, {"WWW-Authenticate": "Bearer"})

    return check


def _forward(backend_of: Callable[[Request], EngineBackend], method: str) -> Callable[[Request], Any]:
    async def forward(request: Request) -> JSONResponse:
        return _answer(await backend_of(request).call(method, await read_body(request)))

    # FastAPI resolves the annotation in this module's globals, where Request is imported.
    forward.__name__ = method
    return forward


async def read_body(request: Request) -> dict[str, Any]:
    """A control request's JSON object, bounded in size. Also for the trainer's routes.

    Raises:
        HTTPException: 413 for more than ``MAX_BODY_BYTES``, 408 for what takes longer than
            ``BODY_TIMEOUT_S``, 400 for anything that is no JSON object.
    """
    raw = b""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"a control request is at most {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body of this request did not come in {BODY_TIMEOUT_S:.0f} s") from None
    except ClientDisconnect:
        # A driver that announced a commit and takes it back; nobody reads this answer.
        raise HTTPException(400, "the client left before its body came") from None
    try:
        return parse_body(raw)
    except WireFormatError as error:
        raise HTTPException(400, "the body must be a JSON object") from error


def parse_body(raw: bytes) -> dict[str, Any]:
    """A control request's JSON object; an empty one for no bytes.

    Raises:
        WireFormatError: the bytes are no JSON object.
    """
    try:
        body = json.loads(raw) if raw else {}
    except (ValueError, RecursionError) as error:
        raise WireFormatError("control request", f"no JSON ({type(error).__name__})") from None
    if not isinstance(body, dict):
        raise WireFormatError("control request", f"JSON of type {type(body).__name__}, expected an object")
    return body


def _answer(ranks: list[dict[str, Any]], **more: Any) -> JSONResponse:
    errors = [answer["error"] for answer in ranks if not answer.get("ok")]
    if not errors:
        return JSONResponse({"ranks": [answer["result"] for answer in ranks], **more})
    first = next(rank for rank, answer in enumerate(ranks) if not answer.get("ok"))
    return answer_error(from_wire(errors[0]), num_failed_ranks=len(errors), failed_rank=first)


def _summarize(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The group, the version and the last sync's report, each None where not all ranks say the same."""
    groups = {state.get("group") for state in states}
    held = {(state.get("version"), state.get("session")) for state in states}
    version = held.pop()[0] if len(held) == 1 else None
    commits = [state["last_commit"] for state in states if state.get("last_commit")]
    is_told = bool(commits) and all(commit["version"] == version for commit in commits)
    return {
        "group": groups.pop() if len(groups) == 1 else None,
        "version": version,
        "last_sync": report_of_engine(commits).as_dict() if is_told and len(commits) == len(states) else None,
    }


def answer_error(error: RdtError, **more: Any) -> JSONResponse:
    """An error in its wire form, with the HTTP status of its kind. Also for the trainer's routes."""
    status = next((status for kind, status in _STATUS_OF_ERROR if isinstance(error, kind)), 500)
    return JSONResponse({"error": to_wire(error), **more}, status_code=status)
