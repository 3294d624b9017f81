"""How calls of a coordinator wait for each other: on its event loop, each for one thing alone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rdt_core.timeouts import check_timeout

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S = 1.0
"""How often a call that waits looks at what it waits for, whatever it was told: silence tells nobody."""


class Signal:
    """Wakes those who wait for one thing to change. Lives on one event loop.

    A group has thousands of calls that wait at once. Were one of these for the whole group, every word of a
    rank would wake them all.

    Args:
        clock: seconds, growing; deadlines are measured on it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Have all who wait look again."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    async def wait(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        """Until the condition holds, or ``timeout_s`` seconds have passed: then False."""
        deadline = self._clock() + check_timeout(timeout_s)
        while not is_true():
            left_s = deadline - self._clock()
            if left_s <= 0:
                return False
            await self._rest(min(left_s, LOOK_S))
        return True

    async def _rest(self, timeout_s: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._waiting.add(woken)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await woken
        finally:
            self._waiting.discard(woken)
