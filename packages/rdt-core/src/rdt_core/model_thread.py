"""Lets an engine rank's slow control calls run beside its model, and still touch the model only at rest.

An engine whose control messages are handled by the thread that runs the model (SGLang's scheduler) must not
wait for Ray, a coordinator or a trainer there. :class:`BackgroundCall` runs such a call in a thread of its
own; where the call needs the model, :class:`ModelThread` takes that one part back to the model's thread.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, TypeVar

from rdt_core.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_TURN_TIMEOUT_S = 120.0


class ModelThread:
    """The thread that runs the model, as other threads see it. Made in that thread.

    Args:
        timeout_s: how long a function may wait for its turn, in seconds.
    """

    def __init__(self, *, timeout_s: float = _TURN_TIMEOUT_S) -> None:
        self._thread = threading.current_thread()
        self._timeout_s = timeout_s
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def run(self, function: Callable[[], T]) -> T:
        """Run a function in the model's thread and return its result; at once when called from there.

        Blocks until the model's thread takes its next turn. Raises whatever the function raises.

        Raises:
            DeadlineError: no turn came; the function will not run any more.
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        self._waiting.put((future, function))
        try:
            return future.result(self._timeout_s)
        except FutureTimeoutError:
            if not future.cancel():  # it has begun
                return future.result()
            raise DeadlineError(
                "the thread that runs the model", self._timeout_s, "Look for a scheduler that hangs."
            ) from None

    def take_turn(self) -> None:
        """Run what waits. Called in the model's thread, while the model does not run."""
        while not self._waiting.empty():
            future, function = self._waiting.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  raised again in the thread that asked
                future.set_exception(error)


class BackgroundCall:
    """One control call in a thread of its own. Starts at once.

    Args:
        number: names the call, so that whoever asks for its answer gets no other's.
        call: returns the answer; must not raise.
    """

    def __init__(self, number: str, call: Callable[[], dict[str, Any]]) -> None:
        self.number = number
        self._answer: dict[str, Any] | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name=f"rdt-call-{number}", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether there is no answer yet."""
        return self._thread.is_alive()

    @property
    def answer(self) -> dict[str, Any] | None:
        """What the call returned; None while it runs."""
        return None if self.is_running else self._answer

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended, or for ``timeout_s`` seconds."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._answer = self._call()
