"""The HTTP side of an engine started with ``--weight-sync rdt``: ``/rdt/*`` and vLLM's weight-update routes.

The flag adds :class:`WeightSyncMiddleware` to the server's ``--middleware``, so that every API process of a
server has it and a server without the flag has nothing of it.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

from rdt_core import engine_rpc, wholeness
from rdt_core.engine_routes import key_guard, make_router
from rdt_core.error_wire import from_wire, to_wire
from rdt_core.errors import (
    EngineTornError,
    EngineUnreachableError,
    RdtError,
    UpdateFailedError,
    WireFormatError,
)
from rdt_vllm import compat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

_LOOK_AGAIN_S = 1.0


class VllmBackend:
    """Reaches every worker of one vLLM server. Implements :class:`rdt_core.engine_routes.EngineBackend`.

    One object a server process; lives on its event loop.

    Args:
        client: vLLM's engine client (``app.state.engine_client``).
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lock = asyncio.Lock()
        self._torn: EngineTornError | None = None
        self._is_alone = compat.num_api_processes(client) == 1
        self._looked_at = -math.inf
        self.engine = f"vllm {compat.vllm_version()}"
        self.world_size: int = client.vllm_config.parallel_config.world_size_across_dp

    async def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a control method on every worker, between steps. Holds the step after it until it returns.

        Raises:
            EngineUnreachableError: a worker has died.
        """
        try:
            return await compat.call_workers(self._client, "rdt_call", method, payload)
        except Exception as error:
            # Workers answer their own errors, so it is the call that failed; vLLM has several kinds for that.
            raise _dead(self.engine, error) from error

    async def commit(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Flip every worker to ``payload["version"]`` while generation is held, and label what follows.

        Requests in flight stay queued and go on with the new weights. If some workers flipped and others
        did not, or one holds parts of two versions, the server would answer with a mixture: generation then
        stays held, requests in flight are aborted and new ones refused (:meth:`find_torn`) until a commit has
        succeeded on all workers. Commits that one process takes have turns.

        Returns:
            ``{"ranks": one answer a rank, "stall_s": seconds that generation stood}``. With one core they
            are counted from the end of the step that ran, which is generation still.
        """
        try:
            engine_rpc.parse_version(payload)
        except WireFormatError as error:
            return {"ranks": [{"ok": False, "error": to_wire(error)}], "stall_s": 0.0}
        async with self._lock:
            if not self._is_alone:
                await self._look_at_workers()
            if compat.flips_in_core(self._client):
                return await self._commit_in_core(payload)
            return await self._commit_by_messages(payload)

    async def _commit_in_core(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Of an engine with one core, which does all of it at one point of its schedule."""
        answer: dict[str, Any] = {"ranks": [], "was_paused": False}
        try:
            answer = await compat.flip_in_core(self._client, payload, was_torn=self._torn is not None)
        finally:
            if _is_done(answer["ranks"]):
                self._torn = None
            else:
                await self._settle(answer["ranks"], was_paused=answer["was_paused"])
        ranks = answer["ranks"] if answer["is_cache_dropped"] else [self._cache_in_use(payload)]
        return {"ranks": ranks, "stall_s": answer["stall_s"]}

    async def _commit_by_messages(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Of an engine whose cores step together: none of them may go on before all have committed."""
        was_paused = await self._client.is_paused() and self._torn is None
        started = time.perf_counter()
        await compat.hold(self._client)
        ranks: list[dict[str, Any]] = []
        try:
            ranks = await self._flip(payload)
        finally:
            await self._settle(ranks, was_paused=was_paused)
        return {"ranks": ranks, "stall_s": time.perf_counter() - started}

    async def _settle(self, ranks: Sequence[dict[str, Any]], *, was_paused: bool) -> None:
        """Let held generation go on, unless the workers hold a mixture."""
        self._torn = None if _is_done(ranks) else await self._find_torn()
        if self._torn is not None:
            await compat.abort_requests(self._client)
        elif not was_paused:
            await compat.let_go(self._client)

    async def _flip(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        # Nothing is computed while generation is held, so dropping the caches first is as good as last, and
        # a cache that cannot be dropped fails the commit before any parameter has changed.
        if payload.get("kv_cache") != "keep" and not await compat.drop_caches(self._client):
            return [self._cache_in_use(payload)]
        ranks = await self.call("commit", payload)
        if _is_done(ranks):
            await compat.label_outputs(self._client, payload["version"])
        return ranks

    def _cache_in_use(self, payload: dict[str, Any]) -> dict[str, Any]:
        reason = "a KV transfer in flight keeps the old cache in use; commit again when it has ended"
        error = UpdateFailedError(payload["version"], "commit", self.engine, -1, reason)
        return {"ok": False, "error": to_wire(error)}

    async def find_torn(self) -> EngineTornError | None:
        """Why this server must not generate; None while its workers hold one and the same version.

        Of several API processes (``--api-server-count``) only the one that took the commit has seen it fail.
        The others look for themselves, once a second at most; a request that comes before they do is held.
        """
        is_old = time.monotonic() - self._looked_at > _LOOK_AGAIN_S
        if is_old and not self._is_alone and not self._lock.locked():
            await self._look_at_workers()
        return self._torn

    async def _look_at_workers(self) -> None:
        self._looked_at = time.monotonic()
        # Generation is held while an engine is torn, so one that is not held needs no second look.
        self._torn = await self._find_torn() if await self._client.is_paused() else None

    async def _find_torn(self) -> EngineTornError | None:
        return wholeness.find_torn(self.engine, await self.call("status", {}))


class WeightSyncMiddleware:
    """Answers the weight-sync routes in front of a vLLM server's application; the rest passes through.

    vLLM makes it when it builds its application, from the name in ``--middleware``. All of its routes ask
    for the server's API key where the server has one, which vLLM's own guard does not do for them, in
    development mode either.

    Args:
        app: the next ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._control: FastAPI | None = None
        self._backend: VllmBackend | None = None
        self._paths: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route one request."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        if self._control is None:
            self._backend = VllmBackend(scope["app"].state.engine_client)
            self._control = make_control_app(scope["app"].state, self._backend)
            self._paths = frozenset(str(getattr(route, "path", "")) for route in self._control.routes)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in self._paths:
            await self._control(dict(scope), receive, send)
            return
        # Everything that generates is a POST. It would wait in the held scheduler for a repair.
        torn = await self._backend.find_torn() if self._backend and scope["method"] == "POST" else None
        if torn is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse({"error": to_wire(torn)}, status_code=503)(scope, receive, send)


def make_control_app(server_state: Any, backend: VllmBackend) -> FastAPI:
    """The application behind :class:`WeightSyncMiddleware`.

    Args:
        server_state: the server's ``app.state``, with its ``engine_client`` and ``args``.
        backend: of that engine client.
    """
    control = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    control.state.engine_client = _CheckedClient(server_state.engine_client)
    keys = compat.api_keys(getattr(server_state, "args", None))

    def backend_of(request: Request) -> VllmBackend:
        del request
        return backend

    control.include_router(make_router(backend_of, keys))
    control.include_router(compat.update_router(), dependencies=[Depends(key_guard(keys))])
    control.add_exception_handler(RdtError, _answer_error)
    control.add_exception_handler(compat.dead_engine_error(), functools.partial(_answer_dead, backend.engine))
    return control


class _CheckedClient:
    """vLLM's engine client, with weight-update calls that leave its executor sound when a worker fails."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._on_all("init_weight_transfer_engine", init_info=request.init_info)

    async def shutdown_weight_transfer_engine(self) -> None:
        await self._on_all("shutdown_weight_transfer_engine")

    async def start_weight_update(self) -> None:
        await self._on_all("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        await self._on_all("update_weights", update_info=request.update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self._on_all("finish_weight_update")
        if weight_version is not None:
            await self._client.update_weight_version(weight_version)

    async def _on_all(self, method: str, **kwargs: Any) -> None:
        for answer in await compat.call_workers(self._client, "rdt_lifecycle", method, kwargs):
            if not answer["ok"]:
                raise from_wire(answer["error"])


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    del request
    wire = to_wire(error if isinstance(error, RdtError) else RdtError(str(error)))
    return JSONResponse({"error": wire}, status_code=500)


async def _answer_dead(engine: str, request: Request, error: Exception) -> JSONResponse:
    """The server itself ends soon; until then this says why."""
    del request
    return JSONResponse({"error": to_wire(_dead(engine, error))}, status_code=503)


def _dead(engine: str, error: Exception) -> EngineUnreachableError:
    return EngineUnreachableError(engine, f"a worker or its engine core has died ({error})")


def _is_done(ranks: Sequence[dict[str, Any]]) -> bool:
    return bool(ranks) and all(answer["ok"] for answer in ranks)
