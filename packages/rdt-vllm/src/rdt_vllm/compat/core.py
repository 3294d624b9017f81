"""vLLM's core and the client that an API process has of it: holding generation, and the flip itself."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Any

_LOOK_S = 1.0
"""How often a commit looks whether the core that carries it out is still there."""


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
