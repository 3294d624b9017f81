"""Every difference between vLLM versions and platforms that this adapter knows, and nothing else does.

Each item names the vLLM file and version it mirrors. Layout changes decide at call time whether this worker's
backend is ``rdt``; without it they do what vLLM does.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import time
import types
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from rdt_core.error_wire import to_wire
from rdt_core.errors import RdtError, UnsupportedEngineError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    import torch
    from fastapi import APIRouter

BACKEND = "rdt"

_LOOK_S = 1.0
"""How often a commit looks whether the core that carries it out is still there."""

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


async def call_workers(client: Any, method: str, *args: Any) -> list[Any]:
    """Run a worker method by name on every worker of every data-parallel engine; one answer a rank.

    ``AsyncLLM.collective_rpc`` returns only the first data-parallel engine's answers
    (v1/engine/core_client.py, DPAsyncMPClient.call_utility_async, 0.32).
    """
    core = getattr(client, "engine_core", None)
    ask_all = getattr(core, "call_utility_all_async", None)
    if ask_all is None:
        return list(await client.collective_rpc(method, args=args))
    engines = await ask_all("collective_rpc", method, None, args, None)
    return [answer for answers in engines for answer in answers]


def dead_engine_error() -> type[Exception]:
    """What calls raise once a worker or the engine core has died (v1/engine/exceptions.py, 0.26 to 0.32)."""
    from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415  only in a process of the engine

    error: type[Exception] = EngineDeadError
    return error


def num_api_processes(client: Any) -> int:
    """How many API processes share this engine (``--api-server-count``; config/parallel.py, 0.26 to 0.32)."""
    return int(getattr(client.vllm_config.parallel_config, "_api_process_count", 1))


def flips_in_core(client: Any) -> bool:
    """Whether one message can have the engine commit: it has one core, whose step no other core waits for."""
    core = getattr(client, "engine_core", None)
    return hasattr(core, "call_utility_async") and client.vllm_config.parallel_config.data_parallel_size == 1


async def flip_in_core(client: Any, payload: dict[str, Any], *, was_torn: bool) -> dict[str, Any]:
    """Have the core hold generation, drop caches, commit on every worker, label, and let go.

    When each of these is a message of its own, generation stands from message to message as well, and every
    one of them waits for its turn between the requests of the server.

    Args:
        client: with one core (:func:`flips_in_core`).
        payload: of the commit.
        was_torn: whether generation is held because of an earlier commit, and goes on after this one.

    Returns:
        ``{"ranks": one answer a rank, "is_cache_dropped", "was_paused", "stall_s"}``. Unless all ranks have
        committed, generation is still held.

    Raises:
        EngineDeadError: vLLM's; the core has ended. vLLM itself would wait for its answer for ever
            (v1/engine/core_client.py, call_utility_async, 0.26 to 0.32), and a server that is told to end
            waits for its requests.
    """
    flip = asyncio.ensure_future(client.engine_core.call_utility_async("rdt_flip", payload, was_torn))
    try:
        while not (await asyncio.wait({flip}, timeout=_LOOK_S))[0]:
            if client.is_stopped:
                raise dead_engine_error()
        answer: dict[str, Any] = flip.result()
    finally:
        flip.cancel()
    return answer


def offer_flip() -> None:
    """Give the core's process what :func:`flip_in_core` asks for. Idempotent.

    vLLM looks utilities up by name on its core (v1/engine/core.py, _handle_client_request, 0.26 to 0.32).
    """
    from vllm.v1.engine.core import EngineCoreProc  # noqa: PLC0415  where there is an engine

    core: Any = EngineCoreProc
    core.rdt_flip = _rdt_flip


def _rdt_flip(core: Any, payload: dict[str, Any], was_torn: bool) -> Future[dict[str, Any]]:  # noqa: FBT001  by position
    """Pause as vLLM does, which lets steps under way end, and flip when they have. Called between two steps.

    Source: v1/engine/core.py, EngineCoreProc.pause_scheduler and _process_input_queue (0.26 to 0.32).
    """
    from vllm.v1.core.sched.interface import PauseState  # noqa: PLC0415  in the core's process only

    before = PauseState.UNPAUSED if was_torn else core.scheduler.pause_state
    flipped: Future[dict[str, Any]] = Future()

    def flip(paused: object = None) -> None:
        del paused
        try:
            flipped.set_result(_flip_now(core, payload, before))
        except Exception as error:  # noqa: BLE001  the caller gets it; a callback's own would be lost
            flipped.set_exception(error)

    paused = core.pause_scheduler("keep", clear_cache=False)
    if paused is None:
        flip()
    else:
        paused.add_done_callback(flip)
    return flipped


def _flip_now(core: Any, payload: dict[str, Any], before: Any) -> dict[str, Any]:
    from vllm.v1.core.sched.interface import PauseState  # noqa: PLC0415
    from vllm.v1.engine import EngineCoreRequestType  # noqa: PLC0415

    started = time.perf_counter()
    ranks: list[dict[str, Any]] = []
    # Nothing is computed while generation is held, so dropping the caches first is as good as last, and a
    # cache that cannot be dropped fails the commit before any parameter has changed.
    is_dropped = payload.get("kv_cache") == "keep" or _drop_caches_in_core(core)
    if is_dropped:
        ranks = core.collective_rpc("rdt_call", None, ("commit", payload), None)
    if ranks and all(answer["ok"] for answer in ranks):
        label = getattr(core, "set_weight_version", None)
        if label is not None:
            label(str(payload["version"]))
        core.scheduler.set_pause_state(before)
        # The core, which had nothing to do, would wait for its next request before it looks again.
        core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
    return {
        "ranks": ranks,
        "is_cache_dropped": is_dropped,
        "was_paused": before != PauseState.UNPAUSED,
        "stall_s": time.perf_counter() - started,
    }


def _drop_caches_in_core(core: Any) -> bool:
    """See :func:`drop_caches`."""
    is_dropped = core.reset_prefix_cache(True, True)  # noqa: FBT003  running requests, and the connector's
    if getattr(core.vllm_config.model_config, "is_multimodal_model", False):
        core.reset_encoder_cache()
    return is_dropped is not False


async def hold(client: Any) -> None:
    """Freeze generation after the step that runs; requests stay queued until :func:`let_go`.

    ``AsyncLLM.pause_generation`` sleeps 20 ms after the scheduler stands, so that late outputs reach their
    callers first; labels are attached in the engine's core, so a commit need not wait for that
    (v1/engine/async_llm.py and v1/engine/core.py, 0.32).
    """
    pause = getattr(getattr(client, "engine_core", None), "pause_scheduler_async", None)
    if pause is None:
        await client.pause_generation(mode="keep", clear_cache=False)
    else:
        await pause(mode="keep", clear_cache=False)


async def let_go(client: Any) -> None:
    """Resume generation."""
    await client.resume_generation()


async def abort_requests(client: Any) -> None:
    """End every request in flight and keep generation held. Called while it is held.

    Source: v1/engine/async_llm.py, AsyncLLM.pause_generation, 0.32.
    """
    await client.pause_generation(mode="abort", clear_cache=False)


async def drop_caches(client: Any) -> bool:
    """Drop what was computed with the old weights; held requests are computed again from their tokens.

    Called while generation is held. False when something still holds the cache (a KV transfer does).
    """
    is_dropped = await client.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    if getattr(client.model_config, "is_multimodal_model", False):
        await client.reset_encoder_cache()
    return is_dropped is not False


async def label_outputs(client: Any, version: int) -> None:
    """Label what is generated from now on (``weight_version``; since 0.30). Called while it is held."""
    label = getattr(client, "update_weight_version", None)
    if label is not None:
        await label(str(version))


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
    if current_platform.is_cpu():
        allow_amx()
        keep_plain_layouts()


def _rdt_call(worker: Any, method: str, payload: dict[str, Any]) -> dict[str, Any]:
    if method == "commit":
        _wait_for_device(worker.device)
    answer: dict[str, Any] = worker.weight_transfer_engine.call(method, payload)
    return answer


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


def allow_amx() -> None:
    """Ask the kernel for AMX in this process.

    A spawned worker lacks the permission and dies of SIGILL in its first bfloat16 attention
    (csrc/cpu attention kernels, 0.32).
    """
    import torch  # noqa: PLC0415

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def keep_plain_layouts() -> None:
    """Have the CPU platform keep weights as the loader wrote them, for models of ``rdt`` engines.

    Stock vLLM packs them away after a load, where no read can reach. Patches this process once.
    """
    from vllm.model_executor.layers import utils  # noqa: PLC0415
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention  # noqa: PLC0415
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts  # noqa: PLC0415

    if getattr(utils.dispatch_cpu_unquantized_gemm, "keeps_plain", False):
        return
    utils.dispatch_cpu_unquantized_gemm = _plain_gemm(utils.dispatch_cpu_unquantized_gemm)
    experts: Any = CPUUnquantizedExperts
    experts.process_weights_after_loading = _packing_aside(experts.process_weights_after_loading)
    experts.apply = _computing_on_packed(experts.apply)
    mla: Any = MLAAttention
    mla.process_weights_after_loading = _keeping_kv_b_proj(mla.process_weights_after_loading)


def _is_ours() -> bool:
    from vllm.config import get_current_vllm_config_or_none  # noqa: PLC0415

    return is_chosen(get_current_vllm_config_or_none())


def _plain_gemm(dispatch: Callable[..., None]) -> Callable[..., None]:
    """Matrix weights, embeddings and heads (model_executor/layers/utils.py, 0.32) stay plain parameters."""
    from torch.nn import functional  # noqa: PLC0415

    @functools.wraps(dispatch)
    def dispatch_plain(layer: Any, remove_weight: bool) -> None:  # noqa: FBT001  vLLM's signature
        if layer.weight.ndim != 2 or not _is_ours():  # noqa: PLR2004  a matrix
            dispatch(layer, remove_weight)
        else:
            layer.cpu_linear = functional.linear

    dispatch_plain.keeps_plain = True  # type: ignore[attr-defined]  # marks our wrapper
    return dispatch_plain


def _packing_aside(process: Callable[..., None]) -> Callable[..., None]:
    """Expert weights (fused_moe/experts/cpu_moe.py, 0.32) stay plain; the packed copy lies beside."""

    @functools.wraps(process)
    def pack_aside(self: Any, layer: Any) -> None:
        if not _is_ours() or _pads_bias(self, layer):
            process(self, layer)
            return
        plain = {name: getattr(layer, name) for name in ("w13_weight", "w2_weight")}
        try:
            process(self, layer)
            self.rdt_packed_w13, self.rdt_packed_w2 = layer.w13_weight.data, layer.w2_weight.data
        finally:
            for name, parameter in plain.items():
                setattr(layer, name, parameter)

    return pack_aside


def _computing_on_packed(apply: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(apply)
    def compute(self: Any, *, w1: Any, w2: Any, **kwargs: Any) -> None:
        w1, w2 = getattr(self, "rdt_packed_w13", w1), getattr(self, "rdt_packed_w2", w2)
        apply(self, w1=w1, w2=w2, **kwargs)

    return compute


def _pads_bias(experts: Any, layer: Any) -> bool:
    # The padded bias replaces the loader's in the parameter itself, so such a layer cannot stay plain.
    size = experts.moe_config.intermediate_size_per_partition
    return hasattr(layer, "w13_bias") and experts._padded_intermediate_size(experts.moe_config) != size


def repackable_experts(method: Any) -> Any | None:
    """The CPU experts of a MoE layer whose weights :func:`keep_plain_layouts` kept plain, else None."""
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return experts if hasattr(experts, "rdt_packed_w13") else None


def is_conv_packed(layer: torch.nn.Module) -> bool:
    """Whether a causal convolution's weight was packed in place (model_executor/layers/utils.py, 0.32)."""
    return hasattr(layer, "_cpu_unpacked_conv_weight")


def _keeping_kv_b_proj(process: Callable[..., None]) -> Callable[..., None]:
    """MLA's AMX kernels free ``kv_b_proj.weight`` after packing it (attention/mla_attention.py, 0.32)."""

    @functools.wraps(process)
    def derive(self: Any, act_dtype: torch.dtype) -> None:
        weight = self.kv_b_proj.weight
        process(self, act_dtype)
        if _is_ours():
            self.kv_b_proj.weight = weight

    return derive
