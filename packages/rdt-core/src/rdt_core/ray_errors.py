"""Ray's subscription to the cluster's errors, kept from spinning once the cluster's head is gone."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ray._private.worker import Worker

PAUSE_S = 1.0


class _Subscriber(Protocol):
    """What Ray's worker asks of one. Source: ray/_private/worker.py, listen_error_messages (2.60)."""

    def subscribe(self) -> None: ...

    def poll(self, timeout: float | None = None) -> tuple[Any, Any]: ...

    def close(self) -> None: ...


class PatientSubscriber:
    """Ray's own subscriber, that rests after a poll which came back empty at once.

    A poll lasts until there is an error. With the head gone it returns at once and with nothing, and the
    thread that Ray starts for it in every driver, which an engine rank is to Ray, asks again at once: a
    whole core beside the model, for as long as the engine serves.

    Args:
        inner: which is asked.
        pause_s: seconds.
    """

    def __init__(self, inner: _Subscriber, pause_s: float = PAUSE_S) -> None:
        self._inner, self._pause_s = inner, pause_s
        self._is_closed = threading.Event()

    def subscribe(self) -> None:
        """As the inner one."""
        self._inner.subscribe()

    def poll(self, timeout: float | None = None) -> tuple[Any, Any]:
        """As the inner one, and then the rest; blocks. Called by Ray's thread."""
        began = time.monotonic()
        key, error = self._inner.poll(timeout)
        if error is None and time.monotonic() - began < self._pause_s:
            self._is_closed.wait(self._pause_s)
        return key, error

    def close(self) -> None:
        """As the inner one; a rest ends."""
        self._is_closed.set()
        self._inner.close()


def calm(worker: Worker) -> None:
    """Have Ray's thread for errors, if this process has one, rest as above.

    It looks its subscriber up for every poll, so it goes on with the patient one after the poll it is in.
    """
    inner = getattr(worker, "gcs_error_subscriber", None)
    if inner is not None and not isinstance(inner, PatientSubscriber):
        worker.gcs_error_subscriber = PatientSubscriber(inner)
