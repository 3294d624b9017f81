"""The route ``/metrics``, where prometheus_client is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

if TYPE_CHECKING:
    from rdt_core.metrics import SyncMetrics

_NOT_INSTALLED = "prometheus_client is not installed: pip install 'rdt-core[metrics]'\n"
_NOT_IMPLEMENTED = 501


def make_metrics() -> tuple[SyncMetrics | None, Any]:
    """Metrics in a registry of this gateway's own; None and None where prometheus_client is missing."""
    if find_spec("prometheus_client") is None:
        return None, None
    from prometheus_client import CollectorRegistry  # noqa: PLC0415  optional

    from rdt_core.metrics import SyncMetrics  # noqa: PLC0415

    registry = CollectorRegistry()
    return SyncMetrics(registry), registry


def make_metrics_router(registry: Any) -> APIRouter:
    """The route; it says what to install when there is no registry."""
    router = APIRouter()

    @router.get(
        "/metrics", response_class=PlainTextResponse, responses={501: {"description": "not installed"}}
    )
    async def metrics() -> Response:
        if registry is None:
            return PlainTextResponse(_NOT_INSTALLED, status_code=_NOT_IMPLEMENTED)
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415  optional

        # Coordinators are asked meanwhile, each with its own deadline.
        text = await run_in_threadpool(generate_latest, registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router
