"""The gateway's HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rdt_core import __version__
from rdt_core.engine_routes import key_guard
from rdt_core.errors import RdtError
from rdt_core.gateway.answers import error_answer, update_error_fields
from rdt_core.gateway.bodies import (
    ConnectAnswer,
    ConnectBody,
    DeletedAnswer,
    DisconnectAnswer,
    DisconnectBody,
    ErrorAnswer,
    HealthAnswer,
    PairAnswer,
    PairsAnswer,
    SetMember,
    SizeAnswer,
    StatusAnswer,
    StoredValue,
    UpdateAnswer,
    UpdateBody,
)
from rdt_core.gateway.body_limit import BodyLimit
from rdt_core.gateway.errors import GatewayError, UnsupportedRequestError
from rdt_core.gateway.metrics_route import make_metrics, make_metrics_router
from rdt_core.gateway.pair import PairSpec
from rdt_core.gateway.pairs import Pairs
from rdt_core.gateway.status_page import make_status_router
from rdt_core.gateway.store import MetaStore
from rdt_core.sync import WeightSync

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from concurrent.futures import Future

    from rdt_core.gateway.pair import Pair, UpdateResult
    from rdt_core.gateway.settings import GatewaySettings
    from rdt_core.observer import SyncObserver

logger = logging.getLogger(__name__)

PathPart = Annotated[str, Path(max_length=512)]
UPDATE_PATH = "/update_weights"
METHOD_NOT_ALLOWED = 405
_CLOSE_TIMEOUT_S = 30.0
_T = TypeVar("_T")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 409, 413, 422, 500, 502, 503, 504, 507)
}
_UPDATE_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {"model": UpdateAnswer} for status in (400, 404, 409, 422, 500, 502, 503, 504)},
    401: {"model": ErrorAnswer},
    413: {"model": ErrorAnswer},
}


def make_app(
    settings: GatewaySettings,
    *,
    observers: Sequence[SyncObserver] = (),
    connect: Callable[..., WeightSync] = WeightSync.connect,
) -> FastAPI:
    """The gateway as an ASGI app; it disconnects all pairs when it shuts down.

    Args:
        settings: how it is run.
        observers: are told about every sync.
        connect: makes a pair's driver.
    """
    metrics, registry = make_metrics()
    told = (*observers, metrics) if metrics is not None else tuple(observers)

    def watch(group: str, sync: WeightSync) -> None:
        if metrics is not None:
            metrics.watch(group, sync.status)

    pairs = Pairs(settings, told, on_open=watch, connect=connect)
    store = MetaStore(settings.max_store_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await run_in_threadpool(pairs.close, _CLOSE_TIMEOUT_S)

    # FastAPI's own /openapi.json and /docs would stand outside of the key guard.
    app = FastAPI(
        title="rdt gateway",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    _answer_errors_in_one_form(app)

    @app.get("/health")
    async def health() -> HealthAnswer:
        return HealthAnswer()

    guarded = APIRouter(dependencies=[Depends(key_guard([settings.api_key]))])

    @guarded.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    guarded.include_router(_make_pair_router(pairs, store, settings))
    guarded.include_router(_make_store_router(store))
    guarded.include_router(make_metrics_router(registry))
    app.include_router(guarded)
    app.include_router(make_status_router(pairs, [settings.api_key]))
    return app


def _make_pair_router(pairs: Pairs, store: MetaStore, settings: GatewaySettings) -> APIRouter:
    router = APIRouter()

    @router.post("/connect", responses=_ERRORS)
    async def connect(body: ConnectBody) -> ConnectAnswer:
        spec = _parse_spec(body, settings)
        pair = pairs.connect(spec, body.setup_timeout_s)
        sync = await _result(pair.connected)
        ranks = sum(len(rows) for rows in sync.engines.values())
        return ConnectAnswer(
            pair_name=spec.name, group=pair.group, num_engines=len(spec.engines), num_engine_ranks=ranks
        )

    @router.post(UPDATE_PATH, response_model=UpdateAnswer, responses=_UPDATE_ERRORS)
    async def update_weights(body: UpdateBody) -> UpdateAnswer | JSONResponse:
        started = time.perf_counter()
        pair: Pair | None = None
        try:
            pair = pairs.find(body.pair_name)
            update = pair.update(
                body.version,
                mode=None if body.mode == "rdt" else body.mode,
                kv_cache=body.kv_cache,
                timeout_s=body.timeout_s or settings.update_timeout_s,
            )
            return _describe_update(await _result(update))
        except RdtError as error:
            duration_ms = (time.perf_counter() - started) * 1e3
            mutated = pair is not None and pair.failed_phase == "commit"
            fields = update_error_fields(body.version, duration_ms, may_be_mutated=mutated)
            return error_answer(error, more=fields)

    @router.post("/disconnect", responses=_ERRORS)
    async def disconnect(body: DisconnectBody) -> DisconnectAnswer:
        closing = pairs.disconnect(body.pair_name)
        if closing is not None:
            await _result(closing)
        store.clear(body.pair_name)
        return DisconnectAnswer(pair_name=body.pair_name)

    @router.get("/pairs", responses=_ERRORS)
    async def list_pairs() -> PairsAnswer:
        return PairsAnswer(pairs=[PairAnswer(**pair.describe()) for pair in pairs.all()])

    return router


def _make_store_router(store: MetaStore) -> APIRouter:
    router = APIRouter(prefix="/weight_meta")

    @router.get("/{pair}/{key}", response_model=StoredValue, responses=_ERRORS)
    async def get(pair: str, key: str) -> StoredValue | JSONResponse:
        try:
            return StoredValue(value=store.get(pair, key))
        except KeyError:
            return JSONResponse({"error": "Key not found", "error_type": "KeyError"}, status_code=404)

    @router.put("/{pair}/{key}", responses=_ERRORS)
    async def put(pair: PathPart, key: PathPart, body: StoredValue) -> StatusAnswer:
        store.put(pair, key, body.value)
        return StatusAnswer()

    @router.delete("/{pair}/{key}", responses=_ERRORS)
    async def delete(pair: str, key: str) -> DeletedAnswer:
        return DeletedAnswer(deleted=store.delete(pair, key))

    @router.put("/{pair}/set/{key}", responses=_ERRORS)
    async def add(pair: PathPart, key: PathPart, body: SetMember) -> StatusAnswer:
        store.add(pair, key, body.value)
        return StatusAnswer()

    @router.get("/{pair}/set/{key}/size", responses=_ERRORS)
    async def size(pair: str, key: str) -> SizeAnswer:
        return SizeAnswer(size=store.size(pair, key))

    return router


def _parse_spec(body: ConnectBody, settings: GatewaySettings) -> PairSpec:
    """What a client asked for, with what AReaL's other modes can do and this one cannot refused by name."""
    _require_rdt(body.mode)
    if body.use_lora:
        remedy = "Merge adapters on the trainer, or update adapters by the engine's own means."
        raise UnsupportedRequestError("use_lora", "true", remedy)
    if body.colocate:
        remedy = "Leave it out: transports on one host find out by themselves that they can share memory."
        raise UnsupportedRequestError("colocate", "true", remedy)
    workers = tuple(url.rstrip("/") for url in body.train_worker_urls)
    return PairSpec(
        name=body.pair_name,
        group=body.group or ("" if workers else settings.group),
        engines=tuple(url.rstrip("/") for url in body.inference_worker_urls),
        trainer_workers=workers,
    )


def _require_rdt(mode: str) -> None:
    if mode != "rdt":
        remedy = (
            "This gateway knows mode 'rdt' only; the checkpoint and NCCL modes are AReaL's own gateway's."
        )
        raise UnsupportedRequestError("mode", repr(mode), remedy)


def _describe_update(done: UpdateResult) -> UpdateAnswer:
    report = done.report
    seconds = {
        "publish_ms": done.publish_s,
        "publish_wait_ms": report.publish_wait_s,
        "prepare_ms": report.prepare_s,
        "commit_ms": report.commit_s,
        "stall_ms": report.stall_s,
    }
    return UpdateAnswer(
        version=report.version,
        duration_ms=done.seconds * 1e3,
        phases={name: value * 1e3 for name, value in seconds.items()},
        failed_engines={failure.engine: failure.message for failure in report.failures},
    )


async def _result(future: Future[_T]) -> _T:
    """Wait for a pair's thread. A client that goes away does not end what it has begun.

    Raises:
        RdtError: what the pair raised; what is not ours is logged and becomes a :class:`GatewayError`.
    """
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except RdtError:
        raise
    except Exception as error:
        logger.exception("a pair's thread failed")
        raise GatewayError(f"{type(error).__name__} in the gateway. Look into its log.") from error


def _answer_errors_in_one_form(app: FastAPI) -> None:
    @app.exception_handler(RdtError)
    async def ours(request: Request, error: RdtError) -> JSONResponse:
        del request
        return error_answer(error)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        body: dict[str, object] = {"error": str(error.detail), "error_type": "HTTPException"}
        headers = dict(error.headers or {})
        if error.status_code == METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods_of(app, request.url.path))
        return JSONResponse(body | _update_fields_of(request), status_code=error.status_code, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        body: dict[str, object] = {"error": f"{where}: {first['msg']}", "error_type": "ValidationError"}
        return JSONResponse(body | _update_fields_of(request), status_code=422)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # The server logs the error with its trace after this answer.
        del request
        return error_answer(error)


def _update_fields_of(request: Request) -> dict[str, object]:
    """What a refused ``/update_weights`` adds to its answer; nothing for other routes."""
    is_update = request.url.path == UPDATE_PATH and request.method == "POST"
    return update_error_fields(0, 0.0, may_be_mutated=False) if is_update else {}


def _methods_of(app: FastAPI, path: str) -> list[str]:
    """Every method of a path; Starlette tells those of the first route that has it."""
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods})
