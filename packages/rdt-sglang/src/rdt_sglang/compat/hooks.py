"""What is put into each process of a server: messages, and hooks that SGLang must have taken."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from rdt_core.errors import UnsupportedEngineError
from rdt_sglang.compat.arguments import sglang_version
from rdt_sglang.compat.front import HTTP_MODULE, num_schedulers
from rdt_sglang.compat.pipeline import open_sender

if TYPE_CHECKING:
    from collections.abc import Callable

_CONTROL = "sglang.srt.managers.tokenizer_control_mixin"
_SCHEDULER = "sglang.srt.managers.scheduler"


def is_frontend() -> bool:
    """Whether this process parses arguments, serves HTTP or holds an Engine."""
    import multiprocessing  # noqa: PLC0415  asked once a process

    return multiprocessing.parent_process() is None or HTTP_MODULE in sys.modules


def is_scheduler() -> bool:
    """Whether this process runs a scheduler, or will: a Ray actor imports it after its arguments arrive.

    Source: managers/scheduler.py, run_scheduler_process; ray/scheduler_actor.py (0.5.23).
    """
    ray = sys.modules.get("ray")
    if _SCHEDULER in sys.modules or ray is None or not ray.is_initialized():
        return _SCHEDULER in sys.modules
    # No Ray actor but a scheduler is given these arguments.
    return ray.get_runtime_context().get_actor_id() is not None


def offer_messages() -> None:
    """Let SGLang's queues carry our messages (managers/io_struct.py, hook_custom_types, 0.5.23). Idempotent.

    Raises:
        UnsupportedEngineError: they carry no one else's.
    """
    from sglang.srt.managers import io_struct  # noqa: PLC0415

    from rdt_sglang.messages import WeightSyncReqInput, WeightSyncReqOutput  # noqa: PLC0415

    if not hasattr(io_struct, "hook_custom_types"):
        raise UnsupportedEngineError("sglang", sglang_version(), "messages of plugins (hook_custom_types)")
    io_struct.hook_custom_types(WeightSyncReqInput, WeightSyncReqOutput)


def offer_routes(attach: Callable[[Any], None]) -> None:
    """Have ``attach`` called with every tokenizer manager, once it can reach its schedulers. Idempotent.

    Source: managers/tokenizer_control_mixin.py, _COMMUNICATOR_SPECS and init_communicators (0.5.23).

    Raises:
        UnsupportedEngineError: there is no such place.
    """
    from rdt_sglang.messages import WeightSyncReqOutput  # noqa: PLC0415

    control = importlib.import_module(_CONTROL)
    specs = getattr(control, "_COMMUNICATOR_SPECS", None)
    if not isinstance(specs, list):
        raise UnsupportedEngineError("sglang", sglang_version(), "a list of communicators to extend")
    if all(spec[0] != "weight_sync" for spec in specs):
        specs.append(("weight_sync", WeightSyncReqOutput))

    def after(result: object, manager: Any, *args: Any, **kwargs: Any) -> None:
        del result, args, kwargs
        manager.weight_sync_communicator.set_fan_out(num_schedulers())
        attach(manager)

    _hook(f"{_CONTROL}.TokenizerControlMixin.init_communicators", after)


def offer_receiver(attach: Callable[[Any], None]) -> None:
    """Have ``attach`` called with this process's scheduler, once its model is loaded. Idempotent.

    Source: managers/scheduler.py, Scheduler.init_ipc_channels and init_request_dispatcher (0.5.23).

    Raises:
        UnsupportedEngineError: there is no such place.
    """

    def after(result: object, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        del result, args, kwargs
        attach(scheduler)

    def after_channels(result: object, scheduler: Any, port_args: Any) -> None:
        del result
        open_sender(scheduler, port_args)

    _hook(f"{_SCHEDULER}.Scheduler.init_ipc_channels", after_channels)
    _hook(f"{_SCHEDULER}.Scheduler.init_request_dispatcher", after)


def _hook(target: str, after: Callable[..., None]) -> None:
    """Hook a method and make sure of it: the registry logs what it cannot do and goes on.

    Source: plugins/hook_registry.py, HookRegistry.apply_hooks (0.5.23).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    path, _, name = target.rpartition(".")
    module, _, owner = path.rpartition(".")
    holder = getattr(importlib.import_module(module), owner, None)
    if not callable(getattr(holder, name, None)):
        raise UnsupportedEngineError("sglang", sglang_version(), target)
    if getattr(getattr(holder, name), "calls_rdt", False):
        return
    HookRegistry.register(target, after, HookType.AFTER)
    HookRegistry.apply_hooks()
    hooked: Any = getattr(holder, name)
    if not hasattr(hooked, "__wrapped__"):
        raise UnsupportedEngineError("sglang", sglang_version(), f"a hook on {target}")
    hooked.calls_rdt = True
