"""The back: one scheduler a rank, what holds it and what lets it go."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdt_sglang.compat.front import is_attention_parallel, world_size
from rdt_sglang.compat.model import model_of
from rdt_sglang.compat.pipeline import is_pipeline, retract_micro_batches, send_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_POLL_WHILE_READING_MS = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where one scheduler rank stands in its engine."""

    rank: int
    world_size: int
    device: torch.device


def find_place(scheduler: Any) -> Place:
    """This scheduler's rank among all ranks of the engine: data parallel, pipeline, tensor."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    parallel = get_parallel()
    # In 0.5.17 only the scheduler knows which replica it serves.
    dp_rank = (parallel if hasattr(parallel, "dp_rank") else scheduler.ps).dp_rank
    replica = 0 if is_attention_parallel(parallel) else (dp_rank or 0)
    rank = (replica * parallel.pp_size + parallel.pp_rank) * parallel.tp_size + parallel.tp_rank
    parameter = next(model_of(scheduler).parameters())
    return Place(int(rank), world_size(), parameter.device)


def handle_messages(scheduler: Any, handle: Callable[[Any], Any]) -> None:
    """Have the scheduler pass our messages to ``handle`` between two batches.

    What ``handle`` returns is sent as the answer of this rank's group; None answers nothing yet.
    """
    from sglang.utils import TypeBasedDispatcher  # noqa: PLC0415

    from rdt_sglang.messages import WeightSyncReqInput  # noqa: PLC0415

    def answer(request: Any) -> None:
        output = handle(request)
        if output is not None:
            send_answer(scheduler, output, request)

    scheduler._request_dispatcher += TypeBasedDispatcher([(WeightSyncReqInput, answer)])


def guard_resumption(scheduler: Any, may_resume: Callable[[], bool]) -> None:
    """Have the scheduler ignore requests to continue while its model is torn.

    Source: managers/scheduler.py, init_request_dispatcher (0.5.23).
    """
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # noqa: PLC0415

    original = scheduler._request_dispatcher._mapping[ContinueGenerationReqInput]

    def resume(request: Any) -> Any:
        return original(request) if may_resume() else None

    scheduler._request_dispatcher._mapping[ContinueGenerationReqInput] = resume


def gather(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every tensor-parallel rank's answer, on all of them. All ranks must call it in the same order."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    from rdt_sglang.gathering import gather_plain  # noqa: PLC0415  the entry point loads without torch

    group = get_parallel().tp_group
    return [answer] if group.world_size == 1 else gather_plain(answer, group.cpu_group)


def is_in_update(scheduler: Any) -> bool:
    """Whether one of SGLang's own update sessions is open, in which parameters may be laid out anew."""
    return getattr(scheduler.weight_updater, "_session", None) is not None


def are_weights_released(scheduler: Any) -> bool:
    """Whether a user has the scheduler release the memory of its weights.

    Its physical memory: the addresses stay, and whoever touches them meanwhile ends the process. What comes
    back is empty, unless the server was told to keep it on the CPU.

    Source: managers/scheduler_components/weight_updater.py, release_memory_occupation (0.5.17 to 0.5.23).
    """
    return "weights" in getattr(scheduler.weight_updater, "offload_tags", ())


def is_paused(scheduler: Any) -> bool:
    """Whether generation is held, by a user or by us."""
    return bool(scheduler._engine_paused)


def retract_all(scheduler: Any) -> None:
    """Hold generation, give up the KV cache of every request, and queue the requests to be computed again.

    Source: managers/scheduler.py, pause_generation in mode ``retract`` (0.5.23).
    """
    from sglang.srt.managers.io_struct import PauseGenerationReqInput  # noqa: PLC0415

    def retract() -> None:
        scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))

    if is_pipeline():
        retract_micro_batches(scheduler, retract)
    else:
        retract()


def hold(scheduler: Any) -> None:
    """Hold generation where it stands."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput  # noqa: PLC0415

    scheduler.pause_generation(PauseGenerationReqInput(mode="in_place"))


def let_go(scheduler: Any) -> None:
    """Resume generation."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # noqa: PLC0415

    scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))


def drop_caches(scheduler: Any) -> bool:
    """Drop what was computed with the old weights; False, and nothing is dropped, while something holds it.

    Called after :func:`retract_all`. What may still hold it: a grammar that is being compiled, a transfer of
    KV cache (managers/scheduler.py, is_fully_idle, 0.5.23).

    In 0.5.17 every waiting request does, those that were just retracted too; it is shown here those alone
    that own memory of the cache.
    """
    if _looks_past_waiting(type(scheduler).is_fully_idle):
        return bool(scheduler.flush_cache(empty_cache=False))
    waiting = scheduler.waiting_queue
    scheduler.waiting_queue = [request for request in waiting if request.kv is not None]
    try:
        return bool(scheduler.flush_cache(empty_cache=False))
    finally:
        scheduler.waiting_queue = waiting


@functools.cache
def _looks_past_waiting(is_fully_idle: Any) -> bool:
    """Whether schedulers of this make can be idle beside waiting requests; found once, not in every stall."""
    return "ignore_waiting" in inspect.signature(is_fully_idle).parameters


def label_outputs(scheduler: Any, version: str) -> None:
    """Label what is generated from now on (managers/scheduler.py, record_weight_version_change, 0.5.23).

    0.5.17 labels whole answers only, in its front (:func:`label_server`).
    """
    label = getattr(scheduler, "record_weight_version_change", None)
    if label is not None:
        label(new_version=version)


def yield_while(scheduler: Any, is_reading: Callable[[], bool]) -> None:
    """While a read is under way, have the idle scheduler wait for its sockets instead of asking them.

    A reader's thread takes the interpreter lock some dozens of times a read, and beside the asking loop each
    time costs a millisecond. A request that arrives ends the wait at once. SGLang's own ``--sleep-on-idle``
    does the same all the time and is left alone.

    Source: managers/scheduler.py, IdleSleeper and maybe_sleep_on_idle (0.5.23).
    """
    if getattr(scheduler, "idle_sleeper", None) is None and hasattr(scheduler, "maybe_sleep_on_idle"):
        scheduler.idle_sleeper = _SleepWhileReading(scheduler, is_reading)


class _SleepWhileReading:
    def __init__(self, scheduler: Any, is_reading: Callable[[], bool]) -> None:
        import zmq  # noqa: PLC0415  SGLang's own

        self._is_reading = is_reading
        self._poller = zmq.Poller()
        channels = scheduler.ipc_channels
        for socket in (channels.recv_from_tokenizer, channels.recv_from_rpc):
            if isinstance(socket, zmq.Socket):
                self._poller.register(socket, zmq.POLLIN)

    def maybe_sleep(self) -> None:
        if self._is_reading():
            self._poller.poll(_POLL_WHILE_READING_MS)
