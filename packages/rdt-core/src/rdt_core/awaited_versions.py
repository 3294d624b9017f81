"""Calls that wait for a version to be published, answered in the very moment in which waiting is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rdt_core.errors import RdtError
from rdt_core.signals import Signal
from rdt_core.words import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

_Answer = TypeVar("_Answer")


@dataclass(slots=True, eq=False)
class _Waiting:
    answer: Callable[[], Any]
    answered: Signal
    outcome: Outcome | None = None

    def settle(self) -> None:
        try:
            self.outcome = Outcome(self.answer())
        except RdtError as error:
            self.outcome = Outcome(error=error)
        self.answered.wake()


class AwaitedVersions:
    """Kept by the coordinator, on its event loop.

    A trainer rank may publish and begin its next step at once. Were those who wait only woken by the first,
    the second would come before them and take back what they waited for.

    Args:
        clock: seconds, growing; deadlines are measured on it.
        is_over: whether waiting for this version is over, held or not. Asked once a change, whoever waits.
    """

    def __init__(self, clock: Callable[[], float], is_over: Callable[[int], bool]) -> None:
        self._clock, self._is_over = clock, is_over
        self._waiting: dict[int, dict[_Waiting, None]] = {}

    async def wait(self, version: int, answer: Callable[[], _Answer], timeout_s: float) -> _Answer | None:
        """What ``answer`` gives or raises as soon as waiting is over; None after ``timeout_s`` seconds."""
        if self._is_over(version):
            return answer()
        waiting = _Waiting(answer, Signal(self._clock))
        self._waiting.setdefault(version, {})[waiting] = None

        def is_answered() -> bool:
            self.settle()
            return waiting.outcome is not None

        try:
            await waiting.answered.wait(is_answered, timeout_s)
        finally:
            self._forget(version, waiting)
        if waiting.outcome is None:
            return None
        if waiting.outcome.error is not None:
            raise waiting.outcome.error
        value: _Answer = waiting.outcome.value
        return value

    def settle(self) -> None:
        """Answer all whose waiting is over. Called with every change, before anything else can happen."""
        for version in [version for version in self._waiting if self._is_over(version)]:
            of_version = self._waiting[version]
            while of_version:
                waiting = next(iter(of_version))
                waiting.settle()
                del of_version[waiting]
            del self._waiting[version]

    def _forget(self, version: int, waiting: _Waiting) -> None:
        of_version = self._waiting.get(version, {})
        of_version.pop(waiting, None)
        if not of_version:
            self._waiting.pop(version, None)
