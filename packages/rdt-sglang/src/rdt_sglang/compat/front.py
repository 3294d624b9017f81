"""The front: one tokenizer manager a server process, its routes and its locks."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from rdt_sglang.compat.arguments import ENGINE_MODULE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

HTTP_MODULE = "sglang.srt.entrypoints.http_server"


def world_size() -> int:
    """Number of scheduler ranks of the engine; attention data parallelism lies within the tensor ranks."""
    parallel = _widths()
    num_replicas = 1 if is_attention_parallel(parallel) else parallel.dp_size
    return int(num_replicas * parallel.tp_size * parallel.pp_size)


def num_schedulers() -> int:
    """Number of scheduler groups that answer a message, each for all of its ranks.

    The replicas of data parallelism, and in each the stages of its pipeline.
    """
    parallel = _widths()
    # Until 0.5.17 ``dp_size`` counts attention data parallelism as well, and has no name for their product.
    return int(getattr(parallel, "num_dp_ranks", parallel.dp_size) * parallel.pp_size)


def _widths() -> Any:
    """How wide each kind of parallelism is.

    In 0.5.17 ``get_parallel`` asks the process groups, which a front has none of.
    """
    from sglang.srt import runtime_context  # noqa: PLC0415

    parallel = runtime_context.get_parallel()
    return parallel if hasattr(type(parallel), "attn_dp_enabled") else parallel._config


def is_attention_parallel(parallel: Any) -> bool:
    """Whether data parallelism lies within the tensor ranks (runtime_context.py, 0.5.17 and 0.5.23)."""
    is_enabled = getattr(parallel, "attn_dp_enabled", None)
    return bool(parallel.enable_dp_attention if is_enabled is None else is_enabled)


async def ask_schedulers(manager: Any, method: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Have every scheduler rank handle a message at its next safe point; one answer a rank, in rank order.

    With attention data parallelism several leaders answer for the same ranks.
    """
    from rdt_sglang.messages import WeightSyncReqInput  # noqa: PLC0415

    manager.auto_create_handle_loop()
    outputs = await manager.weight_sync_communicator(WeightSyncReqInput.make(method, payload))
    by_rank = {answer["rank"]: answer for output in outputs for answer in output.answers}
    return [answer for _, answer in sorted(by_rank.items())]


@contextlib.asynccontextmanager
async def hold_pauses(manager: Any) -> AsyncIterator[None]:
    """No pause and no continue of the server takes effect meanwhile; new requests wait for the few ms.

    SGLang's own updates hold the same lock (managers/tokenizer_control_mixin.py, 0.5.23).
    """
    async with manager.is_pause_cond:
        yield


def abort_all(manager: Any) -> None:
    """End every request in flight with what it has generated."""
    manager.abort_request(abort_all=True)


def label_server(manager: Any, version: str) -> None:
    """What ``/model_info`` says from now on."""
    manager._update_weight_version_if_provided(version)


def server_keys() -> tuple[str, ...]:
    """The keys of which one opens the control routes: the admin key, else the API key.

    Source: utils/auth.py, decide_request_auth for AuthLevel.ADMIN_OPTIONAL (0.5.23).
    """
    from sglang.srt.runtime_context import get_serving  # noqa: PLC0415

    serving = get_serving()
    key = serving.admin_api_key or serving.api_key
    return (key,) if key else ()


def server_url() -> str:
    """Where this server listens, as its own name among a group's engines."""
    from sglang.srt.runtime_context import get_serving  # noqa: PLC0415

    serving = get_serving()
    return f"http://{serving.host}:{serving.port}"


def http_app() -> Any | None:
    """SGLang's FastAPI application; None in a process that serves no HTTP."""
    module = sys.modules.get(HTTP_MODULE)
    return getattr(module, "app", None)


def add_middleware(app: Any, middleware: type, **options: Any) -> None:
    """Put a middleware in front of SGLang's application, unless it serves already.

    Further tokenizer workers make their manager when the application has started (entrypoints/http_server.py,
    lifespan, 0.5.23); they go without, and requests wait in the scheduler.
    """
    if getattr(app, "middleware_stack", None) is None:
        app.add_middleware(middleware, **options)


def require_admin(routes: Sequence[Any]) -> None:
    """Mark routes so that SGLang's own guard asks for the admin key, not for the API key as well.

    Source: utils/auth.py, auth_level (0.5.23).
    """
    from sglang.srt.utils.auth import AuthLevel, auth_level  # noqa: PLC0415

    for route in routes:
        auth_level(AuthLevel.ADMIN_OPTIONAL)(route.endpoint)


def offer_engine_methods(methods: dict[str, Callable[..., Any]]) -> None:
    """Give :class:`sglang.Engine` methods, where this process has loaded it. Idempotent."""
    module = sys.modules.get(ENGINE_MODULE)
    for name, method in methods.items() if module is not None else ():
        setattr(module.Engine, name, method)  # type: ignore[union-attr]  # not None, see above
