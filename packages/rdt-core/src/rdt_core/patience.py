"""Calling a coordinator again that was lost and may be coming back."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from rdt_core.errors import CoordinatorLostError

if TYPE_CHECKING:
    from collections.abc import Callable

_RESTART_LOOK_S = 0.2
"""How often a member looks whether the coordinator is back."""


class RestartingError(CoordinatorLostError):
    """The coordinator's process is gone, and Ray may be starting another."""


def call_patiently(start: Callable[[float], Callable[[float], Any]], timeout_s: float) -> Any:
    """Call, and call again when the coordinator was lost and may be coming back, within the deadline.

    Every method may be called twice: what is told twice is known already, and a wait for what only the lost
    coordinator knew is refused by the ``life`` that it names.

    Args:
        start: begins the call, within that many seconds, and returns what waits for its result.
        timeout_s: for all of it.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        try:
            wait = start(max(0.001, deadline - time.monotonic()))
            return wait(max(0.001, deadline - time.monotonic()))
        except RestartingError as error:
            if time.monotonic() + _RESTART_LOOK_S > deadline:
                raise CoordinatorLostError(error.group, error.detail) from error
            pause.wait(_RESTART_LOOK_S)
