"""vLLM's workers: their control methods, and when the memory of their weights is away."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

from rdt_core.error_wire import to_wire
from rdt_core.errors import RdtError, UnsupportedEngineError
from rdt_vllm.compat.layouts import allow_amx, keep_plain_layouts
from rdt_vllm.compat.server import is_chosen, vllm_version

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

_WEIGHTS = "weights"
"""vLLM's tag for the memory of the weights, beside that of the KV cache."""


def watch_workers() -> None:
    """Prepare each worker of an ``rdt`` engine before it loads its model.

    The first point at which a worker knows its configuration and has not built its model is
    WorkerWrapperBase.init_device (v1/worker/worker_base.py, 0.26 to 0.32). Idempotent.

    Raises:
        UnsupportedEngineError: there is no such point.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: PLC0415

    original = getattr(WorkerWrapperBase, "init_device", None)
    if original is None:
        raise UnsupportedEngineError("vllm", vllm_version(), "WorkerWrapperBase.init_device")
    if getattr(original, "is_watched", False):
        return

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_chosen(self.vllm_config):
            prepare_worker(self.worker)
        return original(self, *args, **kwargs)

    init_device.is_watched = True  # type: ignore[attr-defined]  # marks our wrapper
    WorkerWrapperBase.init_device = init_device


def prepare_worker(worker: Any) -> None:
    """Give one worker of an ``rdt`` engine its control methods and, on CPU, plain weight layouts."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    worker.rdt_call = types.MethodType(_rdt_call, worker)
    worker.rdt_lifecycle = types.MethodType(_rdt_lifecycle, worker)
    worker.start_weight_update = types.MethodType(_start_weight_update, worker)
    watch_sleep(worker)
    if current_platform.is_cpu():
        allow_amx()
        keep_plain_layouts()


def _rdt_call(worker: Any, method: str, payload: dict[str, Any]) -> dict[str, Any]:
    if method == "commit":
        _wait_for_device(worker.device)
    answer: dict[str, Any] = worker.weight_transfer_engine.call(method, payload)
    return answer


def watch_sleep(worker: Any) -> None:
    """Have a worker tell when the memory of its weights goes away and comes back.

    Its physical memory: the addresses stay, and whoever touches them meanwhile ends the process. What comes
    back after level 2 and after a discard is empty.

    Source: v1/worker/gpu_worker.py, sleep and wake_up (0.26 to 0.32) and discard (0.32).
    """

    def note(*, is_asleep: bool) -> None:
        # There is none before the model is loaded.
        engine = getattr(worker, "weight_transfer_engine", None)
        if engine is not None:
            engine.note_sleep(is_asleep=is_asleep)

    def watch(name: str, act: Callable[..., None]) -> None:
        original = getattr(worker, name, None)
        if original is not None:
            setattr(worker, name, functools.partial(act, original))

    def sleep(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        note(is_asleep=True)
        original(*args, **kwargs)

    def discard(original: Callable[..., Any], tags: Sequence[str]) -> None:
        if _WEIGHTS in tags:
            note(is_asleep=True)
        original(tags)

    def wake_up(original: Callable[..., Any], tags: Sequence[str] | None = None) -> None:
        original(tags)
        if tags is None or _WEIGHTS in tags:
            note(is_asleep=False)

    watch("sleep", sleep)
    watch("discard", discard)
    watch("wake_up", wake_up)


def _wait_for_device(device: torch.device) -> None:
    """Until the device has done what the last step asked of it, beyond the tokens that were waited for."""
    if device.type != "cpu":
        import torch  # noqa: PLC0415  this file is imported by the entry point

        torch.get_device_module(device).synchronize(device)


def _rdt_lifecycle(worker: Any, method: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run one of vLLM's own weight-update methods and answer its error instead of raising it.

    When one worker raises, vLLM's executor leaves the other workers' answers in their queues, and takes them
    for the answers to later calls (v1/executor/multiproc_executor.py, collective_rpc, 0.32).
    """
    try:
        getattr(worker, method)(**kwargs)
    except RdtError as error:
        return {"ok": False, "error": to_wire(error)}
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return {"ok": False, "error": to_wire(RdtError(f"{method} failed: {type(error).__name__}: {error}"))}
    return {"ok": True, "result": None}


def _start_weight_update(worker: Any) -> None:
    """vLLM's own, but not refused because a failed update is still open on this rank.

    A worker whose update succeeded beside one that failed stays in it (v1/worker/gpu_worker.py, 0.32). Ours
    touches no parameter before it is finished, so a new start may always replace it.
    """
    worker._weight_update_active = False
    type(worker).start_weight_update(worker)
