"""Calls that wait for a version to be published, answered in the very moment in which waiting is over."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rdt_core.errors import RdtError

if TYPE_CHECKING:
    from collections.abc import Callable

_Answer = TypeVar("_Answer")

_LOOK_S = 1.0
"""How often a call that waits looks at the clock and at the version, whatever it was told."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    version: int
    answer: Callable[[], Any]
    answered: asyncio.Future[Any]


class AwaitedVersions:
    """Kept by the coordinator, on its event loop.

    A trainer rank may publish and begin its next step at once. Were those who wait only woken by the first,
    the second would come before them and take back what they waited for.

    Args:
        clock: seconds, growing; deadlines are measured on it.
        is_over: whether waiting for this version is over, held or not.
    """

    def __init__(self, clock: Callable[[], float], is_over: Callable[[int], bool]) -> None:
        self._clock, self._is_over = clock, is_over
        self._waiting: list[_Waiting] = []

    async def wait(self, version: int, answer: Callable[[], _Answer], timeout_s: float) -> _Answer | None:
        """What ``answer`` gives or raises as soon as waiting is over; None after ``timeout_s`` seconds."""
        if self._is_over(version):
            return answer()
        deadline = self._clock() + timeout_s
        waiting = _Waiting(version, answer, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            while (left_s := deadline - self._clock()) > 0 and not waiting.answered.done():
                await asyncio.wait({waiting.answered}, timeout=min(left_s, _LOOK_S))
                self.settle()
            return waiting.answered.result() if waiting.answered.done() else None
        finally:
            self._waiting.remove(waiting)

    def settle(self) -> None:
        """Answer all whose waiting is over. Called with every change, before anything else can happen."""
        for waiting in self._waiting:
            if not waiting.answered.done() and self._is_over(waiting.version):
                try:
                    waiting.answered.set_result(waiting.answer())
                except RdtError as error:
                    waiting.answered.set_exception(error)
