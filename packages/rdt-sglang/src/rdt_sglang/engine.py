"""One scheduler rank's receiver: answers control messages at the scheduler's safe point."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rdt_core import engine_rpc, ray_session, wholeness
from rdt_core.error_wire import to_wire
from rdt_core.errors import (
    CannotLendError,
    EngineAsleepError,
    NotConnectedError,
    NotPreparedError,
    RdtError,
    UpdateFailedError,
)
from rdt_core.model_thread import BackgroundCall, ModelThread
from rdt_core.subscriber import WeightSubscriber
from rdt_sglang import compat
from rdt_sglang.messages import WeightSyncReqOutput
from rdt_sglang.model import SglangModel
from rdt_sglang.readiness import get_ready

if TYPE_CHECKING:
    from rdt_sglang.messages import WeightSyncReqInput

_ENGINE = "sglang"


class SchedulerReceiver:
    """Carries out control messages on one rank. Made in the scheduler's process when its model is loaded.

    Every rank of a tensor-parallel group handles the same messages in the same order, between the same two
    batches, and every answer holds what all of the group's ranks answered. Only ``commit`` changes weights.

    Args:
        scheduler: SGLang's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._model_thread = ModelThread()
        self._model = SglangModel(scheduler, self._model_thread)
        self._subscriber = WeightSubscriber(self._model)
        self._call: BackgroundCall | None = None
        self._times: dict[str, float] = {}
        self._is_blocked = self._resumes_later = False
        self._gate = compat.StageGate(scheduler) if compat.is_pipeline() else None
        compat.guard_resumption(scheduler, self._may_resume)
        compat.yield_while(scheduler, self._is_busy_beside)
        get_ready(self._model, *compat.model_source(scheduler))

    def _is_busy_beside(self) -> bool:
        """Whether a thread of ours is at work. Asked by the idle scheduler."""
        return self._subscriber.is_reading or (self._call is not None and self._call.is_running)

    def handle(self, request: WeightSyncReqInput) -> WeightSyncReqOutput | None:
        """Answer one message. Called by the scheduler between two batches; holds it for local work only.

        A commit of a pipeline is answered some turns later, and then None is returned here.
        """
        self._model_thread.take_turn()
        method, payload = request.method, request.payload
        if method != "commit":
            return WeightSyncReqOutput.make(compat.gather(self._named(self._answer(method, payload))))
        started = time.perf_counter()
        if self._gate is None:
            return WeightSyncReqOutput.make(self._commit(payload, started))
        if self._gate.is_draining:
            busy = _failed(RdtError("commit refused: another one is under way. Try again."))
            return WeightSyncReqOutput.make(compat.gather(self._named(busy)))
        self._gate.drain(lambda: self._commit_later(request, started))
        return None

    def _commit_later(self, request: WeightSyncReqInput, started: float) -> None:
        """Flip this stage of a pipeline, between the same two micro-batches as every other stage."""
        output = WeightSyncReqOutput.make(self._commit(request.payload, started))
        compat.send_answer(self._scheduler, output, request)

    def _answer(self, method: str, payload: dict[str, Any]) -> dict[str, Any]:
        if method == "start":
            return self._start(payload["call"], payload["method"], payload["payload"])
        if method == "poll":
            return self._poll(str(payload["call"]))
        if method == "hold":
            return self._hold()
        if method == "lend" and self._model.is_packed:
            return _failed(CannotLendError(self._model.rank, "they are packed for a kernel"))
        answer = engine_rpc.call(self._subscriber, method, payload)
        if method == "status":
            last = answer["result"]["last_commit"]
            answer["result"] |= {
                "last_commit": last and {**last, **self._times},
                "is_in_cluster": ray_session.is_joined(),
                "num_recorded": self._model.num_recorded,
            }
        return answer

    def _start(self, call: str, method: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Begin a method in a thread; its answer is asked for by ``poll`` with the same ``call``."""
        if self._call is not None and self._call.is_running:
            return _failed(
                RdtError(f"{method} refused: this engine is still busy with another call. Try again.")
            )

        def run() -> dict[str, Any]:
            compat.use_device(self._model.device)
            if method == "digest" and self._model.is_packed:
                # Digests are of weights as the loader writes them, so generation has to stand meanwhile.
                return self._model_thread.run(lambda: self._call_unpacked(method, payload))
            return engine_rpc.call(self._subscriber, method, payload)

        self._call = BackgroundCall(call, run)
        return {"ok": True, "result": {"is_running": True}}

    def _call_unpacked(self, method: str, payload: dict[str, Any]) -> dict[str, Any]:
        with self._model.unpacked():
            return engine_rpc.call(self._subscriber, method, payload)

    def _poll(self, call: str) -> dict[str, Any]:
        if self._call is None or self._call.number != call:
            return _failed(RdtError("another call has taken this one's place. Try again."))
        return self._call.answer or {"ok": True, "result": {"is_running": True}}

    def _hold(self) -> dict[str, Any]:
        """Hold generation, because other schedulers of this server hold another version."""
        self._block(was_paused=compat.is_paused(self._scheduler))
        return {"ok": True, "result": self._subscriber.status()}

    def _commit(self, payload: dict[str, Any], started: float) -> list[dict[str, Any]]:
        """Flip all ranks of the group, or none; the answers of all of them, with how long this one stood.

        That is ``stall_s``. ``drain_s`` is its part before the copy: until ranks have agreed and the device
        has done what was asked of it before. Where caches are kept that is the batch that ran, and otherwise
        the retraction of requests and the dropping of caches too.

        Args:
            payload: of the request.
            started: when the scheduler began to hold back batches for it.
        """
        refusals = compat.gather(self._named(self._check(payload)))
        if not _is_done(refusals):
            return _explain_to_the_others(payload, refusals)
        was_paused = compat.is_paused(self._scheduler)
        if payload.get("kv_cache") != "keep":
            compat.retract_all(self._scheduler)
            emptied = compat.gather(self._named(self._drop_caches(payload)))
            if not _is_done(emptied):
                self._resume(was_paused=was_paused)
                return emptied
        compat.wait_for_device(self._model.device)
        drained = time.perf_counter()
        with self._model.unpacked():
            done = engine_rpc.call(self._subscriber, "commit", payload)
        compat.wait_for_device(self._model.device)
        answers = compat.gather(self._named(done))
        if _is_done(answers):
            compat.label_outputs(self._scheduler, str(payload.get("label") or payload["version"]))
            self._resume(was_paused=was_paused and not self._unblock())
        elif self._is_whole():
            self._resume(was_paused=was_paused)
        else:
            self._block(was_paused=was_paused)
        times = {"drain_s": drained - started, "stall_s": time.perf_counter() - started}
        if done["ok"]:
            self._times = times
        return [{**answer, **times} for answer in answers]

    def _check(self, payload: dict[str, Any]) -> dict[str, Any]:
        try:
            version = engine_rpc.parse_version(payload)
        except RdtError as error:
            return _failed(error)
        state = self._subscriber.status()
        if state["group"] is None:
            return _failed(NotConnectedError("commit"))
        if state["is_asleep"]:
            return _failed(EngineAsleepError("commit"))
        if state["prepared"] != version:
            return _failed(NotPreparedError(version, state["prepared"]))
        if compat.is_in_update(self._scheduler):
            reason = "another weight update is open; end it (/end_weight_update), then commit again"
            return _failed(UpdateFailedError(version, "commit", _ENGINE, self._model.rank, reason))
        return {"ok": True, "result": None}

    def _drop_caches(self, payload: dict[str, Any]) -> dict[str, Any]:
        # Nothing is computed until generation resumes, so dropping the caches first is as good as last, and a
        # cache that cannot be dropped fails the commit before any parameter has changed.
        if compat.drop_caches(self._scheduler):
            return {"ok": True, "result": None}
        reason = "a transfer or a grammar in the making uses the old cache; commit again later"
        return _failed(UpdateFailedError(payload["version"], "commit", _ENGINE, self._model.rank, reason))

    def _is_whole(self) -> bool:
        """Whether all ranks of the group hold one version. When not, nothing may be computed."""
        return wholeness.are_whole(compat.gather(self._subscriber.status()))

    def _resume(self, *, was_paused: bool) -> None:
        if not was_paused:
            compat.let_go(self._scheduler)

    def _block(self, *, was_paused: bool) -> None:
        """Hold generation until a commit has succeeded, whoever asks to continue before."""
        self._is_blocked = True
        self._resumes_later = self._resumes_later or not was_paused
        compat.hold(self._scheduler)

    def _unblock(self) -> bool:
        """Whether generation, held by :meth:`_block`, is to go on."""
        resumes, self._is_blocked, self._resumes_later = self._resumes_later, False, False
        return resumes

    def _may_resume(self) -> bool:
        """Called when a user asks to continue."""
        self._resumes_later = self._is_blocked
        return not self._is_blocked

    def _named(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "rank": self._model.rank}


def _explain_to_the_others(payload: dict[str, Any], refusals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A commit that some ranks refuse fails on all; those that were ready are told which one refused."""
    if not any(answer["ok"] for answer in refusals):
        return refusals
    version = payload["version"]
    refused = next(answer for answer in refusals if not answer["ok"])
    error = UpdateFailedError(version, "commit", _ENGINE, refused["rank"], refused["error"]["message"])
    return [answer if not answer["ok"] else {**_failed(error), "rank": answer["rank"]} for answer in refusals]


def _failed(error: RdtError) -> dict[str, Any]:
    return {"ok": False, "error": to_wire(error)}


def _is_done(answers: list[dict[str, Any]]) -> bool:
    return all(answer["ok"] for answer in answers)
