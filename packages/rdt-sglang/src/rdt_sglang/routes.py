"""The front of an engine started with ``--weight-sync rdt``: routes, and methods of ``sglang.Engine``."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from rdt_core import wholeness
from rdt_core.engine_routes import answer_error, key_guard, make_router, read_body
from rdt_core.error_wire import from_wire, to_wire
from rdt_core.errors import ConfigError, DeadlineError, EngineTornError, NotPreparedError, RdtError
from rdt_sglang import compat
from rdt_sglang.update_request import UpdateRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

UPDATE_PATH = "/update_weights_from_rdt"

# Methods that wait for others, or take long: they run in a thread of each rank.
_BESIDE = frozenset({"connect", "digest", "disconnect", "prepare"})

_ANSWER_TIMEOUT_S = 300.0  # as long as SGLang's watchdog lets a scheduler hang
_FIRST_POLL_S = 0.002
_LAST_POLL_S = 0.05


class SglangBackend:
    """Reaches every scheduler rank of one SGLang server.

    Implements :class:`rdt_core.engine_routes.EngineBackend`.

    One object a tokenizer manager; lives on its event loop.

    Args:
        manager: SGLang's tokenizer manager.

    Attributes:
        torn: why this server must not generate; None while its ranks hold one and the same version.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._call_lock, self._commit_lock = asyncio.Lock(), asyncio.Lock()
        self.torn: EngineTornError | None = None
        self.engine = f"sglang {compat.sglang_version()}"
        self.world_size = compat.world_size()

    async def call(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a control method on every rank. What waits, or takes long, runs beside the schedulers."""
        if method == "connect":
            payload = {"engine": compat.server_url(), **payload}
        if method in _BESIDE and not (method == "prepare" and "attempt" in payload):
            async with self._call_lock:
                return await self._call_beside(method, payload)
        return await self._ask(method, payload)

    async def commit(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Flip every rank to ``payload["version"]`` between two batches, and label what follows.

        Requests in flight go on with the new weights: each scheduler takes them back, drops its cache, flips
        and lets go within one message. If some ranks flipped and others did not, generation is held and
        requests are refused until a commit succeeds on all of them. Commits of one server take turns.

        Returns:
            ``{"ranks": one answer a rank, "stall_s": the longest time a scheduler was held}``.
        """
        async with self._commit_lock, compat.hold_pauses(self._manager):
            if compat.num_schedulers() > 1:
                refusals = await self._find_refusals(payload.get("version"))
                if refusals:
                    return {"ranks": refusals, "stall_s": 0.0}
            ranks = await self._ask("commit", payload)
            if _is_done(ranks):
                self.torn = None
                compat.label_server(self._manager, str(payload.get("label") or payload["version"]))
            else:
                self.torn = await self._find_torn()
                if self.torn is not None:
                    await self._ask("hold", {})
                    compat.abort_all(self._manager)
        return {"ranks": ranks, "stall_s": max((rank.get("stall_s", 0.0) for rank in ranks), default=0.0)}

    def abort_all(self) -> None:
        """End every request in flight with what it has generated."""
        compat.abort_all(self._manager)

    async def _find_refusals(self, version: object) -> list[dict[str, Any]]:
        """What ranks without the version say; schedulers of different replicas have no consensus."""
        states = await self._ask("status", {})
        late = [state for state in states if state["ok"] and state["result"]["prepared"] != version]
        if not isinstance(version, int):
            return []  # each rank answers what is wrong with it
        return [
            {"ok": False, "error": to_wire(NotPreparedError(version, state["result"]["prepared"]))}
            for state in late
        ]

    async def _find_torn(self) -> EngineTornError | None:
        """What is wrong when the ranks do not all hold one and the same version."""
        return wholeness.find_torn(self.engine, await self._ask("status", {}))

    async def _call_beside(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """Start a method in a thread of every rank, and ask until all have answered."""
        call = uuid.uuid4().hex
        ranks = await self._ask("start", {"method": method, "payload": payload, "call": call})
        pause_s = _FIRST_POLL_S
        # Every method has deadlines of its own, which end it.
        while any(_is_running(rank) for rank in ranks):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)
            ranks = await self._ask("poll", {"call": call})
        return ranks

    async def _ask(self, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
        # A waiter that goes away must not leave its answer to the next one, so the task is never cancelled.
        task = asyncio.ensure_future(compat.ask_schedulers(self._manager, method, payload))
        try:
            return await asyncio.wait_for(asyncio.shield(task), _ANSWER_TIMEOUT_S)
        except TimeoutError:
            error = DeadlineError(f"the schedulers to answer {method}", _ANSWER_TIMEOUT_S, "See the log.")
            return [{"ok": False, "error": to_wire(error)}]


def attach(manager: Any) -> None:
    """Give a server its routes, and an in-process engine its methods. Called with every tokenizer manager."""
    manager.weight_sync = SglangBackend(manager)
    compat.offer_engine_methods(
        {
            "update_weights_from_rdt": update_weights_from_rdt,
            "rdt_connect": rdt_connect,
            "rdt_disconnect": rdt_disconnect,
            "rdt_status": rdt_status,
        }
    )
    app = compat.http_app()
    if app is not None and all(getattr(route, "path", "") != UPDATE_PATH for route in app.routes):
        router = make_control_router(manager.weight_sync)
        compat.require_admin(router.routes)
        app.include_router(router)
        compat.add_middleware(app, TornGuard, backend=manager.weight_sync)


class TornGuard:
    """Refuses what would wait in a held scheduler for a repair: every POST but those of the control routes.

    Args:
        app: the next ASGI application.
        backend: knows whether the engine is torn.
    """

    def __init__(self, app: ASGIApp, backend: SglangBackend) -> None:
        self._app, self._backend = app, backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route one request."""
        torn = self._backend.torn
        if torn is None or scope["type"] != "http" or scope["method"] != "POST" or _is_control(scope):
            await self._app(scope, receive, send)
        else:
            await answer_error(torn)(scope, receive, send)


def _is_control(scope: Scope) -> bool:
    return str(scope["path"]).startswith(("/rdt/", UPDATE_PATH, "/pause_generation", "/continue_generation"))


def make_control_router(backend: SglangBackend) -> APIRouter:
    """``/rdt/*`` as every engine has them, and SGLang's own form of one whole update."""
    keys = compat.server_keys()

    def backend_of(request: Request) -> SglangBackend:
        del request
        return backend

    router = APIRouter()
    router.include_router(make_router(backend_of, keys))

    @router.post(UPDATE_PATH, dependencies=[Depends(key_guard(keys))])
    async def update_weights_from_rdt(request: Request) -> JSONResponse:
        """Connect where needed, read a published version, flip to it."""
        try:
            done = await run_update(backend, UpdateRequest.parse(await read_body(request)))
        except RdtError as error:
            return answer_error(error, success=False, message=str(error))
        return JSONResponse(done)

    return router


async def run_update(backend: SglangBackend, request: UpdateRequest) -> dict[str, Any]:
    """One whole update: connect if this engine is not in the group, read, flip.

    After an error the old version serves.

    Returns:
        ``success``, ``message``, ``version``, ``weight_version``, ``stall_s`` and ``ranks``, one row a rank.

    Raises:
        RdtError: what the first failing rank answered.
    """
    states = _results(await backend.call("status", {}))
    if not all(request.is_met_by(state) for state in states):
        _results(await backend.call("connect", request.connect_payload()))
    timing = {"version": request.version, "timeout_s": request.timeout_s}
    _results(await backend.call("prepare", timing))
    if request.abort_all_requests:
        backend.abort_all()
    done = await backend.commit(request.commit_payload())
    ranks = _results(done["ranks"])
    return {
        "success": True,
        "message": f"Updated to version {request.version}.",
        "version": request.version,
        "weight_version": request.label,
        "stall_s": done["stall_s"],
        "ranks": ranks,
    }


def update_weights_from_rdt(engine: Any, group: str, version: int, **options: Any) -> dict[str, Any]:
    """A method of ``sglang.Engine``: see :func:`run_update` and :class:`UpdateRequest` for the options."""
    request = UpdateRequest.parse({"group": group, "version": version, **options})
    done: dict[str, Any] = engine.loop.run_until_complete(run_update(_backend_of(engine), request))
    return done


def rdt_connect(engine: Any, group: str, **options: Any) -> list[dict[str, Any]]:
    """A method of ``sglang.Engine``: join a sync group. Options are the fields of a connect request."""
    asked = _backend_of(engine).call("connect", {"group": group, **options})
    return _results(engine.loop.run_until_complete(asked))


def rdt_disconnect(engine: Any) -> list[dict[str, Any]]:
    """A method of ``sglang.Engine``: leave the group; the engine keeps its version."""
    return _results(engine.loop.run_until_complete(_backend_of(engine).call("disconnect", {})))


def rdt_status(engine: Any) -> list[dict[str, Any]]:
    """A method of ``sglang.Engine``: one row a rank."""
    return _results(engine.loop.run_until_complete(_backend_of(engine).call("status", {})))


def _backend_of(engine: Any) -> SglangBackend:
    backend: SglangBackend | None = getattr(engine.tokenizer_manager, "weight_sync", None)
    if backend is None:
        raise ConfigError("this engine was made without weight sync. Make it with Engine(weight_sync='rdt').")
    return backend


def _results(ranks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    for answer in ranks:
        if not answer["ok"]:
            raise from_wire(answer["error"])
    return [answer["result"] for answer in ranks]


def _is_running(answer: dict[str, Any]) -> bool:
    result = answer.get("result")
    return isinstance(result, dict) and bool(result.get("is_running"))


def _is_done(ranks: Sequence[dict[str, Any]]) -> bool:
    return bool(ranks) and all(answer["ok"] for answer in ranks)
