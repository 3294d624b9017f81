"""A thread that reads, kept from connect to disconnect: waking it is cheaper than starting one a version."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class ReaderThread:
    """Runs what it is given, one after the other. What it is given must not raise.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def start(self, read: Callable[[], None]) -> None:
        """Have the thread run ``read`` when it has done what came before. Does not block."""
        self._todo.put(read)

    def close(self) -> None:
        """End the thread when it has done what it was given. Idempotent; does not wait."""
        self._todo.put(None)

    def _work(self) -> None:
        while (read := self._todo.get()) is not None:
            read()
