"""The server's arguments: where the flag is added, and where the choice is kept."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

from rdt_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

BACKEND = "rdt"

_ARGS = "sglang.srt.server_args.ServerArgs"
ENGINE_MODULE = "sglang.srt.entrypoints.engine"
_MARK = "_rdt_weight_sync"


def sglang_version() -> str:
    """The running SGLang's version."""
    return importlib.metadata.version("sglang")


def hook_server_args(add_flag: Callable[..., None], from_flag: Callable[..., None]) -> None:
    """Have SGLang call us after it has added its flags to a parser, and after it has read them.

    Called while SGLang loads its plugins; right after, it puts the hooks in place (plugins/__init__.py,
    0.5.23).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    HookRegistry.register(f"{_ARGS}.add_cli_args", add_flag, HookType.AFTER)
    HookRegistry.register(f"{_ARGS}.from_cli_args", from_flag, HookType.AFTER)


def hook_engine_arguments(from_keyword: Callable[[Any, object], None]) -> None:
    """Let :class:`sglang.Engine` take ``weight_sync``, which is none of its arguments' fields.

    ``Engine.__init__`` loads plugins and then calls ``self.server_args_class(**kwargs)``
    (entrypoints/engine.py, 0.5.23).
    """
    module = sys.modules.get(ENGINE_MODULE)
    if module is None:
        return
    engine: Any = module.Engine
    original = engine.server_args_class
    if getattr(original, "takes_weight_sync", False):
        return

    def make_server_args(*, weight_sync: object = None, **kwargs: Any) -> Any:
        server_args = original(**kwargs)
        from_keyword(server_args, weight_sync)
        return server_args

    make_server_args.takes_weight_sync = True  # type: ignore[attr-defined]  # marks our wrapper
    engine.server_args_class = staticmethod(make_server_args)


def mark(server_args: Any, choice: object) -> None:
    """Keep the choice in the arguments, which are pickled to every process.

    Names with an underscore may be set at any time and survive pickling (server_args.py, __setattr__ and
    __reduce__, 0.5.23).
    """
    setattr(server_args, _MARK, choice)


def is_chosen(server_args: Any) -> bool:
    """Whether a server with these arguments reads its weights through us."""
    return getattr(server_args, _MARK, None) is not None


def check_supported(server_args: Any) -> None:
    """Refuse what this adapter has no part for, before anything is started.

    Raises:
        ConfigError: a setting that cannot be served together with weight sync.
    """
    if getattr(server_args, "pp_size", 1) > 1:
        _check_pipeline(server_args)
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        raise ConfigError("the Rust server has no routes for it. Unset SGLANG_RUST_SERVER.")
    if getattr(server_args, "encoder_only", False):
        raise ConfigError("an encoder-only server has no scheduler. Start without --encoder-only.")


def _check_pipeline(server_args: Any) -> None:
    # Later stages answer over the first node's own sockets, and only SGLang's plain pipeline loop has a gate.
    if getattr(server_args, "nnodes", 1) > 1:
        raise ConfigError("a pipeline over several nodes is not supported yet. Use --pp-size 1.")
    if getattr(server_args, "disaggregation_mode", "null") != "null":
        raise ConfigError("a pipeline with disaggregated prefill is not supported yet. Use --pp-size 1.")
