"""vLLM's server: its configuration, its command line and its own weight-update routes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rdt_core.errors import UnsupportedEngineError

if TYPE_CHECKING:
    import argparse

    from fastapi import APIRouter

BACKEND = "rdt"

# entrypoints/rl/online/api_router.py since 0.30; entrypoints/serve/rlhf/api_router.py before;
# entrypoints/serve/dev/rlhf/api_router.py in 0.26.
_UPDATE_ROUTERS = (
    "vllm.entrypoints.rl.online.api_router",
    "vllm.entrypoints.serve.rlhf.api_router",
    "vllm.entrypoints.serve.dev.rlhf.api_router",
)


def is_chosen(vllm_config: Any) -> bool:
    """Whether an engine with this configuration reads its weights through us."""
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == BACKEND


def vllm_version() -> str:
    """The running vLLM's version."""
    import vllm  # noqa: PLC0415  only in a process of the engine

    return str(vllm.__version__)


def update_router() -> APIRouter:
    """vLLM's own pause, resume and weight-update routes.

    vLLM attaches them only in its development mode, together with others that nobody should open.

    Source: entrypoints/launchers/api_server/routers.py, 0.32.

    Raises:
        UnsupportedEngineError: this vLLM has none.
    """
    for name in _UPDATE_ROUTERS:
        try:
            router: APIRouter = importlib.import_module(name).router
        except ModuleNotFoundError:
            continue
        return router
    raise UnsupportedEngineError("vllm", vllm_version(), "weight-update routes")


def api_keys(args: Any) -> tuple[str, ...]:
    """The server's API keys; the flag wins over the environment.

    Source: entrypoints/serve/middleware/register.py, 0.32. vLLM's own guard covers /v1 and kin only
    (authenticate.py, GUARDED_PREFIX).
    """
    from vllm import envs  # noqa: PLC0415

    return tuple(key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key)


def offer_backend(module: str, name: str) -> None:
    """Register our engine class with vLLM, which imports it when the backend is chosen. Idempotent.

    The factory's public method refuses a second time (distributed/weight_transfer/factory.py, 0.26 to 0.32).
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, module, name)


def find_option(parser: argparse.ArgumentParser, option: str) -> argparse.Action | None:
    """The action behind an option that vLLM or we have added."""
    return parser._option_string_actions.get(option)


def exclude(group: argparse._MutuallyExclusiveGroup, action: argparse.Action | None) -> None:
    """Have argparse refuse an existing option together with the group's own, in either order.

    argparse has no public way to put an option that vLLM added into a group of ours.
    """
    if action is not None:
        group._group_actions.append(action)
