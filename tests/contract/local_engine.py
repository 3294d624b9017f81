"""An engine that a driver reaches by function calls: the real subscriber behind the real control border."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rdt_core import engine_rpc
from rdt_core.error_wire import from_wire
from rdt_core.errors import EngineUnreachableError
from tests.contract.world import Engine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdt_core.client import LocalChannel


class LocalEngine(Engine):
    """Implements :class:`rdt_core.member.EngineControl`; its model has a thread of its own."""

    def __init__(self, channel: LocalChannel, name: str) -> None:
        super().__init__(channel, name)
        self.url = name
        self.calls: list[str] = []
        self.is_dead = False
        self._model_thread = ThreadPoolExecutor(1)

    def call(self, method: str, payload: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        self.calls.append(method)
        if self.is_dead:
            raise EngineUnreachableError(self.url, "the test has killed it")
        started = time.perf_counter()
        running = self._model_thread.submit(engine_rpc.call, self.subscriber, method, payload)
        try:
            answer = running.result(timeout_s)
        except TimeoutError:
            raise EngineUnreachableError(self.url, f"no answer to {method} within {timeout_s} s") from None
        if not answer["ok"]:
            error = from_wire(answer["error"])
            error.failed_rank = 0
            raise error
        return {"ranks": [answer["result"]], "stall_s": time.perf_counter() - started}

    def announce(self, method: str, payload: Mapping[str, Any]) -> None:
        """A call of a function needs no announcement."""

    def retract(self, method: str) -> None:
        """See :meth:`announce`."""

    def is_listening(self) -> bool:
        return not self.is_dead

    def close(self) -> None:
        """The driver lets go; the engine lives on."""

    def stop(self) -> None:
        """End the engine's threads."""
        self.subscriber.disconnect()
        self._model_thread.shutdown()
