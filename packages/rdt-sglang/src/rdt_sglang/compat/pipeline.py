"""The stages of a pipeline: how each of them answers, and how all of them stand at one micro-batch.

SGLang's pipeline loop gives every message to every stage at the same turn of its loop, but only the first
stage answers, and a pause holds none of them (managers/scheduler_pp_mixin.py, event_loop_pp, 0.5.23). So the
leader of each later stage gets a socket of its own here, and a gate that hands out no micro-batch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_SENDER = "_rdt_sender"
_LAYER = re.compile(r"layers\.(\d+)\.")


def is_pipeline() -> bool:
    """Whether the layers of this engine are spread over several schedulers."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    return int(get_parallel().pp_size) > 1


def is_of_another_stage(model: Any, tensor: str) -> bool:
    """Whether a tensor may belong to another stage of the pipeline than the model does.

    One without a layer's number may belong to the first stage or to the last. Whichever stage has a
    parameter for it is found out when a recording leaves that parameter unfilled.

    Source: layers/utils/common.py, get_layer_id; start_layer and end_layer of models (0.5.23).
    """
    if not is_pipeline():
        return False
    layer = _LAYER.search(tensor)
    first, past = getattr(model, "start_layer", None), getattr(model, "end_layer", None)
    if layer is None or first is None or past is None:
        return layer is None
    return not first <= int(layer[1]) < past


def open_sender(scheduler: Any, port_args: Any) -> None:
    """Give the leader of a later stage its way to the server's front. Called when its channels are made.

    Source: managers/scheduler_components/ipc_channels.py, SchedulerIpcChannels.create (0.5.23).
    """
    import zmq  # noqa: PLC0415  SGLang's own
    from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper  # noqa: PLC0415
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415
    from sglang.srt.utils.network import get_zmq_socket  # noqa: PLC0415

    # In 0.5.17 the process groups are not there yet, and the scheduler knows its place itself.
    parallel = get_parallel() if hasattr(type(get_parallel()), "attn_dp_enabled") else scheduler.ps
    if parallel.pp_rank > 0 and parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0:
        context = zmq.Context.instance()
        socket = get_zmq_socket(context, zmq.PUSH, port_args.tokenizer_ipc_name, False)  # noqa: FBT003  theirs
        setattr(scheduler, _SENDER, SenderWrapper(socket))


def send_answer(scheduler: Any, output: Any, request: Any) -> None:
    """Answer a request of the server's front. Does nothing on ranks that do not speak for their group."""
    sender = getattr(scheduler, _SENDER, None) or scheduler.ipc_channels.send_to_tokenizer
    sender.send_output(output, request)


class StageGate:
    """Stands between one stage's scheduler and its next micro-batch.

    While the engine is paused it hands out none, which SGLang's own loop does not see to. All stages take
    the same turns, so what :meth:`drain` runs happens at the same turn on each, with no micro-batch between
    two stages.

    Args:
        scheduler: of this rank.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._next_batch = scheduler.get_next_batch_to_run
        self._when_empty: Callable[[], None] | None = None
        self._turns_left = 0
        self._slots_unplanned = 0
        self._sleep = scheduler.maybe_sleep_on_idle
        self._is_idle = scheduler.is_fully_idle
        scheduler.get_next_batch_to_run = self._plan
        scheduler.maybe_sleep_on_idle = self._sleep_unless_draining
        scheduler.is_fully_idle = self._is_fully_idle

    @property
    def is_draining(self) -> bool:
        """Whether something waits for the pipeline to be empty."""
        return self._when_empty is not None

    def drain(self, then: Callable[[], None]) -> None:
        """Let micro-batches under way come out, start none, then call ``then`` once. Does not wait."""
        self._when_empty = then
        # One turn for each micro-batch's slot; in the turn of a slot its last result has been taken.
        self._turns_left = int(self._scheduler.pp_loop_size)

    def _sleep_unless_draining(self) -> None:
        if not self.is_draining:
            self._sleep()

    def _is_fully_idle(self, **asked: bool) -> bool:
        """Whether no request holds memory; asked by SGLang before it looks for leaks, which would end it.

        Behind a closed gate a slot keeps the requests of a prefill that has come out in ``last_mbs``, where
        SGLang looks at one slot only: it moves them on when the slot's next micro-batch is planned. That is
        so until every slot has had its turn at the open gate.

        Source: managers/scheduler.py, is_fully_idle and on_idle (0.5.23).
        """
        is_closed = self.is_draining or self._scheduler._engine_paused
        if (is_closed or self._slots_unplanned) and any(
            batch is not None and not batch.is_empty() for batch in self._scheduler.last_mbs
        ):
            return False
        return bool(self._is_idle(**asked))

    def _plan(self, *, running_batch: Any, last_batch: Any) -> Any:
        """Source: managers/scheduler.py, get_next_batch_to_run (0.5.23)."""
        from sglang.srt.managers.schedule_batch import NextBatchPlan  # noqa: PLC0415

        nothing = NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        if self._when_empty is not None:
            self._slots_unplanned = int(self._scheduler.pp_loop_size)
            if self._turns_left:
                self._turns_left -= 1
                return nothing
            then, self._when_empty = self._when_empty, None
            then()
            last_batch = self._scheduler.last_batch
        if self._scheduler._engine_paused:
            self._slots_unplanned = int(self._scheduler.pp_loop_size)
            return nothing
        self._slots_unplanned = max(0, self._slots_unplanned - 1)
        return self._next_batch(running_batch=running_batch, last_batch=last_batch)


def retract_micro_batches(scheduler: Any, retract: Callable[[], None]) -> None:
    """Have SGLang's own retraction, which sees one micro-batch, go over all of them. The pipeline is empty.

    Source: managers/scheduler_pp_mixin.py, running_mbs and last_mbs (0.5.23).
    """
    current = scheduler.running_batch
    for slot, running in enumerate(scheduler.running_mbs):
        scheduler.running_batch, scheduler.last_batch = running, scheduler.last_mbs[slot]
        retract()
        scheduler.last_mbs[slot] = None
    scheduler.running_batch, scheduler.last_batch = current, None
